"""Folders of image files: one sub-folder per class, or captions beside them."""

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..common.config import DataConfig
from ..common.errors import InputError
from .base import Framing, Plain, draw_caption, is_inside, list_files, list_images, read_captions

METADATA = "metadata.jsonl"


class ImageFolder(Plain):
    """Images in one sub-folder per class, as in ImageNet; classes are numbered in the order of their names."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        folder = Path(str(config.path))
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        labels = {name: label for label, name in enumerate(classes)}
        names = [name for name in list_images(folder) if "/" in name]
        # Arrays: workers copy a page of memory for every object that they look at, and there may be millions.
        self.names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.labels = np.array([labels[name.split("/")[0]] for name in names], dtype=np.int32)
        self.folder = folder
        if not names:
            raise InputError(f"data.path={config.path!r}: no images in class sub-folders: expected "
                             f"<path>/<class>/<image>, or a {METADATA} with captions, or data.prompt")
        self.num_classes = len(classes)
        self.framing = Framing(config, seed)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return {"images": self.framing(self._file(key[1]), *key), "labels": int(self.labels[key[1]])}

    def describe(self, index: int) -> str:
        return str(self._file(index))

    def _file(self, index: int) -> Path:
        return self.folder / os.fsdecode(bytes(self.names[index]))


class CaptionedFolder(Plain):
    """A folder of images with captions, by Hugging Face's convention: each line of its metadata.jsonl is an object
    with `file_name`, relative to the folder, and one caption or a list of them in `data.caption_column`.

    With `data.prompt`, that is the caption of every image anywhere below the folder instead.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.folder, self.seed, self.framing = Path(str(config.path)), seed, Framing(config, seed)
        if config.prompt is None:
            self.samples = _read_metadata(self.folder, config.caption_column)
        else:
            self.samples = [(name, config.prompt, "data.prompt") for name in list_images(self.folder)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        caption = self.caption(key)
        return {"images": self.framing(self.folder / self.samples[key[1]][0], *key), "captions": caption}

    def caption(self, key: tuple[int, int]) -> str:
        """The caption that is used at (epoch, index), without reading the image."""
        captions = self.captions(key[1])
        return captions[draw_caption(len(captions), self.seed, *key)]

    def captions(self, index: int) -> list[str]:
        return read_captions(*self.samples[index][1:])

    def describe(self, index: int) -> str:
        return str(self.folder / self.samples[index][0])


def _read_metadata(folder: Path, column: str) -> list[tuple[str, Any, str]]:
    """For each line of metadata.jsonl: the image's path in the folder, what the column holds, and where that is."""
    files = set(list_files(folder))
    columns: set[str] = set()
    samples = []
    for number, line in enumerate((folder / METADATA).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"data.path: {folder / METADATA} line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not JSON ({error}): correct or remove it") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise InputError(f"{place}: no file_name: expected an object with file_name and {column}")
        path = PurePosixPath(entry["file_name"])
        if not is_inside(entry["file_name"]):
            raise InputError(f"{place}: file_name={entry['file_name']!r} leaves the folder: name a file in it")
        if path.as_posix() not in files:
            raise InputError(f"{place}: file_name={entry['file_name']!r}: no such file: correct or remove the line")
        columns |= entry.keys()
        samples.append((path.as_posix(), entry.get(column), f"{METADATA} line {number}, {column!r}"))
    if samples and column not in columns:
        raise InputError(f"data.caption_column={column!r}: no such column in {folder / METADATA}: choose one of "
                         f"{', '.join(sorted(columns))}")
    return samples
