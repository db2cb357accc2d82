"""Folders of image files: one sub-folder per class, or captions beside them."""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..common.config import DataConfig
from ..common.errors import InputError
from ..common.files import decode_text, read_text, split_lines
from .base import (
    IMAGE_SUFFIXES,
    Framing,
    SourceDefaults,
    draw_caption,
    is_inside,
    list_files,
    list_images,
    number_classes,
    read_captions,
    read_label,
    visible,
)
from .images import Unreadable

PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
METADATA = ("metadata.jsonl", "metadata.jsonl.gz", "metadata.csv")


class ImageFolder(SourceDefaults):
    """Images in one sub-folder per class, as in ImageNet, with the labels of `number_classes`.

    Args:
        names: of the images, relative to the folder; None: they are listed here.
    """

    def __init__(self, config: DataConfig, seed: int, names: list[str] | None = None) -> None:
        folder = Path(str(config.path))
        names = [name for name in (list_images(folder) if names is None else names) if "/" in name]
        if not names:
            raise InputError(f"data.path={config.path!r}: no images in class sub-folders: expected "
                             f"<path>/<class>/<image>, captions in {METADATA[0]}, {METADATA[2]} or .txt files beside "
                             "the images, or data.prompt")
        # Arrays: workers copy a page of memory for every object that they look at, and there may be millions.
        self.names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        folders = [name.split("/")[0] for name in names]
        if set(map(str.lower, folders)) <= PARTS:
            raise InputError(f"data.path={config.path!r}: its sub-folders are parts of a data set, no classes: set "
                             f"it to {folder / folders[0]}")
        self.classes = number_classes(folders, config.path)
        self.labels = np.array([self.classes[name] for name in folders], dtype=np.int32)
        self.num_classes = 1 + max(self.classes.values())
        self.folder, self.framing = folder, Framing(config, seed)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return {**self.framing(self._file(key[1]), *key), "labels": int(self.labels[key[1]])}

    def describe(self, index: int) -> str:
        return str(self._file(index))

    def _file(self, index: int) -> Path:
        return self.folder / os.fsdecode(bytes(self.names[index]))


class CaptionedFolder(SourceDefaults):
    """A folder of images with captions, by Hugging Face's convention: each line of its METADATA file has `file_name`,
    relative to the folder, and one caption or a list of them in `data.caption_column`.

    Its condition is `data.label_column` where there are no captions, or `wanted` is "class" and there are labels. With
    `data.prompt`, that is the caption of every image anywhere below the folder instead.
    """

    def __init__(self, config: DataConfig, seed: int, wanted: str | None = None) -> None:
        self.folder, self.seed, self.framing = Path(str(config.path)), seed, Framing(config, seed)
        self.samples: list[tuple[str, Any, str]]  # image, condition as it is stored, where that is
        if config.prompt is None:
            self._take(config, wanted, find_metadata(self.folder) or METADATA[0])
        else:
            self.samples = [(name, config.prompt, "data.prompt") for name in list_images(self.folder)]
        self.buckets = self.framing.buckets([self.folder / name for name, _, _ in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        condition = ({"captions": self.caption(key)} if self.num_classes == 0
                     else {"labels": read_label(*self.samples[key[1]][1:])})
        return {**self.framing(self.folder / self.samples[key[1]][0], *key), **condition}

    def caption(self, key: tuple[int, int]) -> str:
        """The caption that is used at (epoch, index), without reading the image."""
        captions = self.captions(key[1])
        return captions[draw_caption(len(captions), self.seed, *key)]

    def captions(self, index: int) -> list[str]:
        return read_captions(*self.samples[index][1:])

    def describe(self, index: int) -> str:
        return str(self.folder / self.samples[index][0])

    def _take(self, config: DataConfig, wanted: str | None, file: str) -> None:
        entries = _read_metadata(self.folder / file, config)
        columns = {column for _, entry in entries for column in entry}
        captioned, labelled = config.caption_column in columns, config.label_column in columns
        if entries and not labelled and config.label_column != DataConfig.label_column and wanted != "text":
            raise InputError(f"data.label_column={config.label_column!r}: no such column in {self.folder / file}: "
                             f"choose one of {', '.join(sorted(columns))}")
        if entries and not captioned and (not labelled or wanted == "text"):
            raise InputError(f"data.caption_column={config.caption_column!r}: no such column in {self.folder / file}: "
                             f"choose one of {', '.join(sorted(columns))}")
        column = config.label_column if labelled and (wanted == "class" or not captioned) else config.caption_column
        self.samples = [(entry["file_name"], entry.get(column), f"{file} line {number}, {column!r}")
                        for number, entry in entries]
        if column == config.label_column:
            self.num_classes = None


class TextsBeside(CaptionedFolder):
    """Images anywhere below a folder, each with its caption in a .txt file of the same name beside it.

    Args:
        images: their names, relative to the folder. texts: those of the .txt files.
    """

    def __init__(self, config: DataConfig, seed: int, images: list[str], texts: list[str]) -> None:
        self.folder, self.seed, self.framing = Path(str(config.path)), seed, Framing(config, seed)
        beside = {os.path.splitext(text)[0]: text for text in texts}
        self.samples = [(name, beside.get(self.stem(name)), "") for name in images]
        self.buckets = self.framing.buckets([self.folder / name for name in images])

    def stem(self, name: str) -> str:
        """Of a sample's name, that of its text without .txt."""
        return os.path.splitext(name)[0]

    def captions(self, index: int) -> list[str]:
        name, text, _ = self.samples[index]
        if text is None:
            raise Unreadable(f"no {PurePosixPath(self.stem(name)).name}.txt beside it")
        try:
            return read_captions(decode_text((self.folder / text).read_bytes()).strip(), text)
        except (OSError, ValueError) as error:
            raise Unreadable(f"{text}: no caption ({getattr(error, 'strerror', None) or error})") from None


def open_folder(config: DataConfig, seed: int, wanted: str | None) -> ImageFolder | CaptionedFolder:
    """The images of a folder with their captions or classes; where it has both, those that are `wanted`."""
    folder = Path(str(config.path))
    if config.prompt is not None or find_metadata(folder) is not None:
        return CaptionedFolder(config, seed, wanted)
    files = list_files(folder)
    images, texts = visible(files, IMAGE_SUFFIXES), visible(files, {".txt"})
    captioned = {os.path.splitext(text)[0] for text in texts} & {os.path.splitext(name)[0] for name in images}
    if captioned and wanted != "class":
        return TextsBeside(config, seed, images, texts)
    return ImageFolder(config, seed, images)


def find_metadata(folder: Path) -> str | None:
    """The name of the folder's METADATA file.

    Raises:
        InputError: if it has several.
    """
    found = [name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise InputError(f"data.path={str(folder)!r}: has {' and '.join(found)}: keep one")
    return found[0] if found else None


def _read_metadata(file: Path, config: DataConfig) -> list[tuple[int, dict[str, Any]]]:
    """The number and the columns of each line, of which `file_name` is that of a file in the folder."""
    files = set(list_files(file.parent))
    entries = []
    for number, entry in (_read_csv if file.suffix == ".csv" else _read_jsonl)(file):
        place, name = f"data.path: {file} line {number}", entry.get("file_name")
        if not isinstance(name, str):
            raise InputError(f"{place}: no file_name: expected file_name and {config.caption_column}")
        if not is_inside(name):
            raise InputError(f"{place}: file_name={name!r} leaves the folder: name a file in it")
        if PurePosixPath(name).as_posix() not in files:
            raise InputError(f"{place}: file_name={name!r}: no such file: correct or remove the line")
        entries.append((number, {**entry, "file_name": PurePosixPath(name).as_posix()}))
    return entries


def _read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(split_lines(read_text(file, "data.path")), start=1):
        if not line.strip():
            continue
        place = f"data.path: {file} line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not JSON ({error}): correct or remove it") from None
        if not isinstance(entry, dict):
            raise InputError(f"{place}: no file_name: expected an object with it")
        yield number, entry


def _read_csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.reader(io.StringIO(read_text(file, "data.path"), newline=""), strict=True)
    header: list[str] | None = None
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise InputError(f"data.path: {file} line {number}: not CSV ({error}): correct or remove it") from None
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
            if "file_name" not in header or len(set(header)) < len(header):
                raise InputError(f"data.path: {file}: its first line is {','.join(row)!r:.80}: expected names of "
                                 "columns, each once, with commas between them, of which one is file_name")
            continue
        if len(row) != len(header):
            raise InputError(f"data.path: {file} line {number}: {len(row)} cells for {len(header)} columns: put text "
                             'with commas between "quotes"')
        yield number, dict(zip(header, row, strict=True))
