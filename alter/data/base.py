"""The interface of a data set, and what its kinds share: listing files, framing images, drawing captions."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ..common.config import DataConfig
from ..common.errors import InputError
from ..common.files import folder_fault
from .images import Unreadable, bucket_sizes, load_pixels, measure, nearest

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
NO_DATA = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}  # folders that systems make
LABELS = range(2**31)


@dataclass(frozen=True)
class Encoding:
    """How latents were made, as far as it was recorded; None where it was not.

    Attributes:
        maker: whose convention it is, for messages.
        vae_settings: keys of the VAE's configuration by which latents are normalised.
        vae, text_encoders: `weights_hash` of the folders, of text encoders by name.
        pipeline: its class. resolution: in pixels. mirrored: whether mirror images were encoded as well.
        told: `data.max_tokens` and, of a backbone that is told its guidance, `evaluate.guidance_scale`.
    """

    maker: str
    vae_settings: Mapping[str, Any]
    vae: str | None = None
    text_encoders: Mapping[str, str] = field(default_factory=dict)
    pipeline: str | None = None
    resolution: int | None = None
    mirrored: bool = False
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Common:
    """What encoded captions have in common, as `backbones.conditioning` names it.

    Attributes:
        shared: of all samples: positions, sizes, settings. same: rows [1, ...] that no prompt changes.
        dropped: the other rows [1, ...], of the dropped prompt.
    """

    shared: dict[str, Any]
    same: dict[str, Any]
    dropped: dict[str, Any]


class Source(Protocol):
    """A data set of `len()` samples, addressed by (epoch, index).

    A sample is {"images" float32 [C, H, W] in [-1, 1], "latents" float32 [C, h, w] or "moments" float32 [2C, h, w],
    means and standard deviations of latents} and {"labels" int, "captions" str, "conditioning" rows [1, ...] by name or
    "encoder_hidden_states" float32 [tokens, D]}, and of images "sizes" int64 [4] as `load_pixels` gives them and, of
    several shapes, "bucket" int; what is random about it is a function of (seed, epoch, index).
    """

    num_classes: int | None  # 0 where the condition is text; None where only all labels together would tell
    classes: dict[str, int]  # name → label, where the data name their classes
    encoded: bool  # True: samples are latents; False: images for the VAE
    empty_text: Tensor | None  # where samples have "encoder_hidden_states": those of a dropped prompt
    common: Sequence[Common]  # where they have "conditioning": for each shape
    buckets: np.ndarray | None  # the number of each sample's shape, int64 [len()]; None: all have one
    encoding: Encoding | None  # where samples are encoded
    shards: list[int] | None  # lengths of the runs that are stored together; None: each sample is on its own

    def __len__(self) -> int: ...
    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]: ...  # Unreadable: if it cannot be used
    def captions(self, index: int) -> list[str]: ...  # where the condition is text: all that the sample has
    def describe(self, index: int) -> str: ...  # the sample's name in reports


class SourceDefaults:
    """Defaults that most kinds share: images with text, each stored on its own."""

    num_classes: int | None = 0
    classes: dict[str, int] = {}
    encoded = False
    empty_text: Tensor | None = None
    common: Sequence[Common] = ()
    buckets: np.ndarray | None = None
    encoding: Encoding | None = None
    shards: list[int] | None = None

    def captions(self, index: int) -> list[str]:
        raise TypeError(f"{type(self).__name__} has no captions")


class Framing:
    """The part that is cut from an image at (epoch, index), mirrored or not."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.bucketed = config.bucket_step is not None
        self.sizes = [(config.resolution, config.resolution)]
        if config.bucket_step is not None:
            if config.resolution % config.bucket_step:
                raise InputError(f"data.bucket_step={config.bucket_step}: choose a divisor of data.resolution="
                                 f"{config.resolution}")
            self.sizes = bucket_sizes(config.resolution, config.bucket_step)
        self.crop, self.flip, self.seed = config.crop, config.flip, seed

    def __call__(self, content: Path | bytes, epoch: int, index: int) -> dict[str, Any]:
        """What `load_pixels` gives, and "bucket", the number of the shape where there are several; raises Unreadable if
        it is no complete image."""
        across, down, _, mirror = self.place(epoch, index)
        shown: dict[str, Any] = load_pixels(content, self.sizes, (across, down), mirror)
        return {**shown, "bucket": self.sizes.index(tuple(shown["images"].shape[1:]))} if self.bucketed else shown

    def place(self, epoch: int, index: int) -> tuple[float, float, float, bool]:
        """Where the part is, across, down and (of a video) in time, each in [0, 1]; and whether it is mirrored."""
        place = 0.5, 0.5, 0.5
        if self.crop == "random":
            place = tuple(np.random.default_rng([self.seed, 6, epoch, index]).random(3))
        return *place, self.flip and coin(self.seed, epoch, index)

    def buckets(self, files: Sequence[Path]) -> np.ndarray | None:
        """The number of each image's shape, int64 [len(files)], from its header; None where there is one shape."""
        if not self.bucketed:
            return None
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(measure, files))
        return with_usual(np.array([nearest(self.sizes, *size) if size else -1 for size in found], dtype=np.int64))


def with_usual(buckets: np.ndarray) -> np.ndarray:
    """With the commonest number in place of -1, those of unusable samples, which are replaced by others."""
    known = buckets[buckets >= 0]
    return np.where(buckets < 0, np.bincount(known).argmax() if len(known) else 0, buckets)


def coin(seed: int, epoch: int, index: int) -> bool:
    """Whether the sample is mirrored at (epoch, index)."""
    return bool(np.random.default_rng([seed, 3, epoch, index]).integers(2))


def draw_caption(count: int, seed: int, epoch: int, index: int) -> int:
    """Which of a sample's `count` captions is used at (epoch, index)."""
    return int(np.random.default_rng([seed, 8, epoch, index]).integers(count))


def read_captions(value: Any, where: str) -> list[str]:
    """A sample's captions; a blank one is the empty prompt. `value` is what the data hold, `where` names its place for
    the message.

    Raises:
        Unreadable: unless it is a caption or a list of them.
    """
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not captions or not all(map(_is_caption, captions)):
        raise Unreadable(f"{where}: expected a caption or a list of them, found {value!r:.60}")
    return [caption if caption.strip() else "" for caption in captions]


def _is_caption(text: Any) -> bool:
    """Whether it is text that a tokenizer accepts: without halves of surrogate pairs."""
    return isinstance(text, str) and not re.search(r"[\ud800-\udfff]", text)


def read_label(value: Any, where: str) -> int:
    """A sample's class, from a whole number or its digits; arguments as for `read_captions`.

    Raises:
        Unreadable: unless it is one of LABELS.
    """
    try:
        label = int(value)
        if label in LABELS and (label == value or isinstance(value, (str, bytes))):
            return label
    except (TypeError, ValueError, OverflowError):
        pass
    raise Unreadable(f"{where}: expected a class number, found {value!r:.40}")


def number_classes(names: Iterable[str], path: str | None) -> dict[str, int]:
    """The labels of class folders: the numbers that are their names, or else their places in the names' order.

    Raises:
        InputError: if a number is no label, or is given twice.
    """
    ordered = sorted(set(names))
    if not all(re.fullmatch(r"-?[0-9]+", name) for name in ordered):
        return {name: label for label, name in enumerate(ordered)}
    folder_of: dict[int, str] = {}
    for name in ordered:
        label = int(name)
        if label not in LABELS:
            raise InputError(f"data.path={path!r}: the class folder {name} is no label: number them from 0")
        if label in folder_of:
            raise InputError(f"data.path={path!r}: the class folders {folder_of[label]} and {name} are both label "
                             f"{label}: rename one")
        folder_of[label] = name
    return {name: label for label, name in sorted(folder_of.items())}


def require_folder(key: str, path: str) -> Path:
    """A folder that can be listed.

    Raises:
        InputError: saying what the path is instead.
    """
    fault = folder_fault(path)
    if fault is not None:
        raise InputError(f"data.{key}={path!r}: {fault}: set it to the folder of your data set")
    return Path(path)


def is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def list_files(folder: Path, field: str = "data.path") -> list[str]:
    """The paths, relative to the folder, of all files below it; links to folders are followed, once each.

    Args:
        field: what named the folder, for the message.

    Raises:
        InputError: if a folder below it that is not hidden cannot be listed.
    """
    def refuse(error: OSError) -> None:
        if not os.path.basename(error.filename).startswith("."):
            raise InputError(f"{field}: {error.filename} cannot be listed ({error.strerror}): allow it, or take it "
                             "out") from None

    names, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(set(folders) - NO_DATA)
        place = os.path.relpath(root, folder)
        names += files if place == "." else [f"{place}/{file}" for file in files]
    return sorted(names)


def visible(names: list[str], suffixes: set[str]) -> list[str]:
    """Those with one of the suffixes and nothing hidden in their path."""
    return [name for name in names if PurePosixPath(name).suffix.lower() in suffixes
            and not any(part.startswith(".") for part in name.split("/"))]


def list_images(folder: Path, field: str = "data.path") -> list[str]:
    """Of the files that `list_files` finds, the images that are not hidden."""
    return visible(list_files(folder, field), IMAGE_SUFFIXES)
