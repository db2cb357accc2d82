"""Image sets to be measured: a folder, or the images of a reference batch in one .npz file."""

import hashlib
import json
import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common.errors import InputError
from ..common.files import folder_fault, read_text
from ..data.base import IMAGE_SUFFIXES, list_images
from ..data.images import decode, square


class ImageSet:
    """RGB images by index, of any size each.

    Attributes:
        names: of the images, relative to the folder, sorted, 2 before 10.
        resize: side of the square that every image is made to, from its centre, with antialiasing, before anything
            else; None: as it is.
    """

    def __init__(self, source: str | Path, resize: int | None = None) -> None:
        self.source, self.resize = Path(source), resize
        self.array: np.ndarray | None = None
        if self.source.suffix == ".npz":
            self.array = load_npz(self.source).get("arr_0")
            if self.array is None or self.array.ndim != 4 or self.array.dtype != np.uint8 or self.array.shape[3] != 3:
                raise InputError(f"{source}: holds no images (arr_0, uint8 [N, H, W, 3]): use a metric that its "
                                 "statistics allow, or a folder of images")
            self.names = [f"arr_0[{i}]" for i in range(len(self.array))]
        else:
            fault = folder_fault(self.source)
            if fault is not None:
                raise InputError(f"{source}: {fault}: name a folder of images or an .npz file")
            self.names = sorted(list_images(self.source, str(source)), key=_by_number)
        if not self.names:
            raise InputError(f"{source}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        """The RGB image, and what was found: its mode and size.

        Raises:
            images.Unreadable: with the reason.
        """
        if self.array is not None:
            image, mode = Image.fromarray(self.array[index]), "RGB"
        else:
            image, mode = decode(self.source / self.names[index])
        found = {"mode": mode, "size": f"{image.width}x{image.height}"}
        if self.resize is not None:
            image = square(image, self.resize)
        return image, found

    @cached_property
    def hashes(self) -> list[str]:
        """SHA-256 of every file, or image of the array."""
        if self.array is not None:
            return [hashlib.sha256(image.tobytes() + str(image.shape).encode()).hexdigest() for image in self.array]
        return [hashlib.sha256(self._content(name)).hexdigest() for name in self.names]

    def _content(self, name: str) -> bytes:
        try:
            return (self.source / name).read_bytes()
        except OSError as error:
            raise InputError(f"{self.source / name}: cannot be read ({error.strerror}): mend it or take it out of the "
                             "set") from None

    @cached_property
    def digest(self) -> str:
        """Of all contents, in order, and of the resizing."""
        return hashlib.sha256("\n".join([*self.hashes, f"resize {self.resize}"]).encode()).hexdigest()

    @property
    def protocol(self) -> str:
        return "images as they are" if self.resize is None else (
            f"centre square resized to {self.resize} (bicubic, antialiased)")

    @property
    def repeated_names(self) -> list[str]:
        """File names, without folder and ending, that several images have."""
        return [stem for stem, count in Counter(Path(name).stem for name in self.names).items() if count > 1]

    def warnings(self) -> list[str]:
        """What may be a mistake: equal images, equal names."""
        repeated = sum(count - 1 for count in Counter(self.hashes).values())
        lines = [f"{self.source}: {repeated} of {len(self)} images repeat another one"] if repeated else []
        names = self.repeated_names
        return lines + ([f"{self.source}: {len(names)} names occur several times ({names[0]}, ...)"] if names else [])


def _by_number(name: str) -> list[str | int]:
    """Splits at numbers, so that names sort by them."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


def read_manifest(folder: Path, remedy: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]] | None:
    """What `alter sample` wrote beside its images: settings, and "condition" and "seed" by file; None without it.

    Raises:
        InputError: ending in `remedy`, if it is anything else.
    """
    file = folder / "manifest.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(read_text(file, "manifest"))
        images = {image["file"]: {key: image[key] for key in ("condition", "seed")} for image in content["images"]}
        return dict(content["settings"]), images
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not as `alter sample` writes it ({error}): {remedy}") from None


def load_npz(file: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, none unpickled.

    Raises:
        InputError: if it is missing, damaged or holds Python objects.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except Exception as error:  # of a damaged archive: zip, zlib, header and pickle errors of every kind
        raise InputError(f"{file}: not a readable .npz file ({' '.join(str(error).split())[:200]})") from None

