"""Samples that are stored together in shards: tar files as webdataset and img2dataset write them."""

import json
import os
import re
import statistics
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..common.config import DataConfig
from ..common.errors import InputError
from ..common.files import decode_text
from .base import (
    IMAGE_SUFFIXES,
    Framing,
    SourceDefaults,
    draw_caption,
    list_files,
    read_captions,
    read_label,
    require_folder,
    visible,
)
from .images import Unreadable

Content = TypeVar("Content")
Members = dict[str, tuple[int, int]]  # of one sample: file's ending, lower case → (offset, size) of its content
_TEXT = "text"  # the default of data.caption_column: the .txt file


class Shards(Generic[Content]):
    """Shards of samples, addressed by one index; the contents of the `most` last used ones are kept in memory.

    Args:
        lengths: samples of each shard; None for one that is missing or broken, which counts as the median of the
            others.
        open: gives the content of shard number s.
    """

    def __init__(self, lengths: list[int | None], open: Callable[[int], Content], most: int) -> None:
        known = [length for length in lengths if length is not None]
        usual = round(statistics.median(known)) if known else 0
        self.lengths = [usual if length is None else length for length in lengths]
        self.ends = list(accumulate(self.lengths))
        self.open, self.most = open, most
        self.contents: OrderedDict[int, Content] = OrderedDict()

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the shard that holds sample `index`, and the sample's position in it."""
        shard = bisect_right(self.ends, index)
        return shard, index - (self.ends[shard] - self.lengths[shard])

    def __getitem__(self, shard: int) -> Content:
        if shard not in self.contents:
            self.contents[shard] = self.open(shard)
            if len(self.contents) > self.most:
                self.contents.popitem(last=False)
        self.contents.move_to_end(shard)
        return self.contents[shard]


class TarShards(SourceDefaults):
    """Tar files below a folder, in which the files of a sample have one name up to its first dot.

    The condition is `.cls`, a class, or else a caption: `.txt`, or the key `data.caption_column` of `.json` where that
    is not "text"; where the first sample with an image has both, the one that is `wanted`. Endings may be upper case.
    A file that belongs to no image is an unreadable sample. Three kinds of shards count as many unreadable samples as
    they should have had samples: those that cannot be read, those whose number is missing between its neighbours', and
    those with img2dataset's `_stats.json` but no tar.
    """

    def __init__(self, config: DataConfig, seed: int, wanted: str | None = None) -> None:
        self.folder, self.seed, self.framing = require_folder("path", str(config.path)), seed, Framing(config, seed)
        self.image, self.column = config.image_column.lower(), config.caption_column
        self.text = "txt" if self.column == _TEXT else "json"
        files = list_files(self.folder)
        tars = visible(files, {".tar"})
        if not tars:
            raise InputError(f"data.path={config.path!r}: no .tar files: set it to the folder of the shards")
        names = [name.removesuffix("_stats.json") + ".tar" for name in files if name.endswith("_stats.json")]
        promised = [name for name in names if self._promised(name) is not None]
        self.names = sorted({*tars, *promised, *left_out(tars)})
        lengths = [self._length(name) for name in self.names]
        self.stored = Shards(lengths, self._open, most=2 * config.shuffle_shards)
        self.shards = self.stored.lengths
        first: Members = next((members for name in tars for members in list_samples(self.folder / name)
                               if self._image(members) in members), {})
        self.num_classes = None if "cls" in first and not (wanted == "text" and self.text in first) else 0

    def __len__(self) -> int:
        return self.stored.ends[-1]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        path, members = self._sample(key[1])
        condition: dict[str, Any]
        if self.num_classes is None:
            condition = {"labels": read_label(_read(path, members, "cls"), ".cls")}
        else:
            captions = self._captions(path, members)
            condition = {"captions": captions[draw_caption(len(captions), self.seed, *key)]}
        return {**self.framing(_read(path, members, self._image(members)), *key), **condition}

    def captions(self, index: int) -> list[str]:
        return self._captions(*self._sample(index))

    def describe(self, index: int) -> str:
        shard, position = self.stored.locate(index)
        return f"{self.folder / self.names[shard]} sample {position}"

    def _image(self, members: Members) -> str:
        """The ending of the sample's image; `data.image_column` if it has none."""
        return self.image if self.image in members else next(
            (kind for kind in members if f".{kind.rpartition('.')[2]}" in IMAGE_SUFFIXES), self.image)

    def _open(self, shard: int) -> list[Members]:
        return list_samples(self.folder / self.names[shard])

    def _sample(self, index: int) -> tuple[Path, Members]:
        shard, position = self.stored.locate(index)
        path = self.folder / self.names[shard]
        if not path.is_file():
            raise Unreadable("the shard is missing")
        members = self.stored[shard]
        if position >= len(members) or not members[position]:
            raise Unreadable("the shard is damaged or cut short: "
                             f"{len(list(filter(None, members)))} samples can be read")
        return path, members[position]

    def _captions(self, path: Path, members: Members) -> list[str]:
        try:
            value = decode_text(_read(path, members, self.text))
            if self.text == "json":
                value = json.loads(value)[self.column]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise Unreadable(f".{self.text}: no caption ({type(error).__name__}: {error})") from None
        return read_captions(value, f".{self.text}")

    def _length(self, name: str) -> int | None:
        """The number of the shard's samples, by img2dataset's statistics or else by its headers; None if neither tells
        it."""
        promised = self._promised(name)
        return promised if promised is not None else len(list_samples(self.folder / name)) or None

    def _promised(self, name: str) -> int | None:
        path = self.folder / name
        try:
            count = json.loads(path.with_name(f"{path.stem}_stats.json").read_bytes())["successes"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return count if type(count) is int and count >= 0 else None


def list_samples(path: Path) -> list[Members]:
    """The samples of a tar file, in its order; if it is damaged, a sample without files ends the list."""
    samples: dict[str, Members] = {}
    try:
        length = os.path.getsize(path)
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.offset_data + member.size > length:
                    raise EOFError
                name, dot, kind = member.name.rpartition("/")[2].partition(".")
                if member.isreg() and name and dot:
                    members = samples.setdefault(member.name.removesuffix(kind), {})
                    members[kind.lower()] = member.offset_data, member.size
            with open(path, "rb") as file:
                file.seek(archive.offset)
                if file.read(512) != bytes(512):  # with which an archive ends; at a broken header tarfile just stops
                    raise EOFError
    except (OSError, tarfile.TarError, ValueError, EOFError):
        if samples:
            samples[""] = {}
    return list(samples.values())


def left_out(names: list[str]) -> list[str]:
    """Names that are missing from series of numbered file names: between first and last, or up to "-of-N"."""
    series: dict[tuple[str, str], list[str]] = {}
    for name in names:
        found = re.fullmatch(r"(.*?)(\d+)(-of-\d+)?(\D*)", name)
        if found:
            series.setdefault((found[1], (found[3] or "") + found[4]), []).append(found[2])
    missing = []
    for (before, after), numbers in series.items():
        there = set(map(int, numbers))
        total = re.match(r"-of-(\d+)", after)
        wanted = range(int(total[1])) if total else range(min(there), max(there))
        if len(wanted) > (10 if total else 2) * len(there):  # numbers that count something else
            continue
        width = min(map(len, numbers))
        missing += [f"{before}{number:0{width}d}{after}" for number in wanted if number not in there]
    return missing


def _read(path: Path, members: Members, kind: str) -> bytes:
    if kind not in members:
        raise Unreadable(f"no .{kind} file in the shard ({', '.join(members)})")
    offset, size = members[kind]
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from None
