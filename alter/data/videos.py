"""Short videos, or folders of their frames, with captions beside them."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..common.config import DataConfig
from ..common.errors import InputError
from .base import IMAGE_SUFFIXES, Framing, list_files, visible
from .folders import TextsBeside
from .images import Unreadable, decode, frame

VIDEO_SUFFIXES = {".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v"}


class VideoFolder(TextsBeside):
    """Clips anywhere below a folder, each with its caption in a .txt file of the same name beside it.

    A clip is a video file (read by PyAV), or a folder of images, its frames in the order of the numbers in their names.
    A sample has `data.frames` consecutive frames, from the middle or, with data.crop=random, from anywhere: "images"
    float32 [3, F, H, W].

    Raises:
        InputError: if there are videos, and PyAV is not installed.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        if config.bucket_step is not None:
            raise InputError(f"data.bucket_step={config.bucket_step}: is for images: set null")
        self.frames, files = config.frames, list_files(Path(str(config.path)))
        videos = visible(files, VIDEO_SUFFIXES)
        self.images: dict[str, list[str]] = {}
        for name in visible(files, IMAGE_SUFFIXES):
            if "/" in name:
                self.images.setdefault(name.rpartition("/")[0], []).append(name)
        if videos and importlib.util.find_spec("av") is None:
            raise InputError(f"data.path={config.path!r}: {videos[0]} needs the package av: pip install av, or give "
                             "folders of frames")
        for frames in self.images.values():
            frames.sort(key=_by_number)
        super().__init__(config, seed, sorted([*videos, *self.images]), visible(files, {".txt"}))
        self.framing: Framing

    def stem(self, name: str) -> str:
        return name if name in self.images else super().stem(name)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        across, down, when, mirror = self.framing.place(*key)
        name = self.samples[key[1]][0]
        images = self._frames(name, when) if name in self.images else _video(self.folder / name, self.frames, when)
        shown = [frame(image, self.framing.sizes, (across, down), mirror) for image in images]
        return {"images": torch.stack([each["images"] for each in shown], dim=1), "sizes": shown[0]["sizes"],
                "captions": self.caption(key)}

    def _frames(self, name: str, when: float) -> list[Image.Image]:
        names = self.images[name]
        first = _first(len(names), self.frames, when)
        return [decode(self.folder / each)[0] for each in names[first : first + self.frames]]


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key by which 2.png comes before 10.png."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", name)]


def _first(there: int, wanted: int, when: float) -> int:
    if there < wanted:
        raise Unreadable(f"has {there} frames, and data.frames={wanted}")
    return round(when * (there - wanted))


def _video(file: Path, wanted: int, when: float) -> list[Image.Image]:
    """Consecutive frames of a video file."""
    import av

    try:
        with av.open(os.fspath(file)) as container:
            there = container.streams.video[0].frames or sum(1 for _ in container.decode(video=0))
        first, images = _first(there, wanted, when), []
        with av.open(os.fspath(file)) as container:
            for number, shown in enumerate(container.decode(video=0)):
                if number >= first:
                    images.append(shown.to_image())
                if len(images) == wanted:
                    return images
    except (OSError, ValueError, IndexError, av.FFmpegError) as error:
        raise Unreadable(f"no video ({' '.join(str(error).split())[:200]})") from None
    raise Unreadable(f"ends after {len(images)} of {wanted} frames")
