"""Decodes one image file of any kind to RGB pixels of a given size."""

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

Image.preinit()
Image.init()
FORMATS = [name for name in Image.OPEN if name != "EPS"]  # a program, which Pillow hands to Ghostscript to run

_ORIENTATION = 0x0112  # EXIF's tag
_UPRIGHT: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unreadable(Exception):
    """A sample that cannot be used; the message is the reason."""


def load_pixels(content: Path | bytes, sizes: Sequence[tuple[int, int]], crop: tuple[float, float],
                mirror: bool) -> dict[str, Tensor]:
    """The largest part of an image that has the shape of one of `sizes`, the nearest to its own, resized.

    Args:
        content: an image file, or its bytes; of an animation the first frame is used.
        sizes: (height, width) in pixels.
        crop: position of the part, horizontally and vertically: 0 left or top, 0.5 centre, 1 right or bottom.
        mirror: swap left and right of the result.

    Returns:
        "images" float32 [3, height, width] in [-1, 1]; transparent parts are white, and the EXIF orientation is
        applied. "sizes" int64 [4]: height and width of the whole image, top and left of the part in the resized (and
        mirrored) image.

    Raises:
        Unreadable: if it is not a complete image, or has more pixels than PIL.Image.MAX_IMAGE_PIXELS.
    """
    return frame(decode(content)[0], sizes, crop, mirror)


def frame(image: Image.Image, sizes: Sequence[tuple[int, int]], crop: tuple[float, float],
          mirror: bool) -> dict[str, Tensor]:
    """As `load_pixels`, of RGB pixels."""
    (across, down), (whole_width, whole_height) = crop, image.size
    height, width = sizes[nearest(sizes, whole_height, whole_width)]
    if whole_width * height >= whole_height * width:
        part_width, part_height = whole_height * width / height, float(whole_height)
    else:
        part_width, part_height = float(whole_width), whole_width * height / width
    left = min(round(across * (whole_width - part_width)), whole_width - part_width)
    top = min(round(down * (whole_height - part_height)), whole_height - part_height)
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + part_width,
                                                                         top + part_height), reducing_gap=3.0)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    corner = (round(down * (whole_height - part_height) * height / part_height),
              round((1 - across if mirror else across) * (whole_width - part_width) * width / part_width))
    return {"images": pixels.flip(-1) if mirror else pixels,
            "sizes": torch.tensor([whole_height, whole_width, *corner])}


def bucket_sizes(resolution: int, step: int) -> list[tuple[int, int]]:
    """The shapes (height, width) of about resolution² pixels, ascending, with sides that are multiples of `step` and
    at least half and at most twice `resolution`."""
    sides = range(-(-resolution // (2 * step)) * step, 2 * resolution + 1, step)
    pairs = {(side, min(sides, key=lambda other: abs(side * other - resolution**2))) for side in sides}
    pairs = {(height, width) for height, width in pairs if abs(height * width / resolution**2 - 1) <= 0.25}
    return sorted(pairs | {(width, height) for height, width in pairs})


def measure(file: Path) -> tuple[int, int] | None:
    """Height and width of an image file as it is shown, from its header; None if that cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                return (image.width, image.height) if _lies(image) else (image.height, image.width)
    except Exception:  # of the many kinds that broken files raise
        return None


def _lies(image: Image.Image) -> bool:
    """Whether an opened image is shown turned by a quarter; Pillow tells a TIFF's size as it is shown."""
    if image.format == "TIFF":
        return False
    try:
        return image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    except Exception:  # a broken profile, without which the image is shown as it is
        return False


def nearest(sizes: Sequence[tuple[int, int]], height: int, width: int) -> int:
    """Which of `sizes` (height, width) has the ratio of sides nearest to an image's."""
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][1] * height / (sizes[i][0] * width))))


def square(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square, resized to size × size (bicubic, antialiased)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def decode(content: Path | bytes) -> tuple[Image.Image, str]:
    """An image file, or its bytes, as RGB, and the mode that it had.

    Raises:
        Unreadable: whatever Pillow raises: its decoders raise exceptions of every kind for broken files.
    """
    try:
        if isinstance(content, Path) and not content.is_file():
            raise Unreadable("no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
                pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
                if limit is not None and pixels > limit:
                    raise Unreadable(f"{pixels} pixels, more than the limit of {limit}")
                image.load()
                return _rgb(_upright(image)), image.mode
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable("not an image") from None
    except Exception as error:
        raise Unreadable(" ".join(str(error).split())[:200] or type(error).__name__) from None


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says, if that can be read: whole pixels with a broken one are used as they are."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION))
    except Exception:  # of the many kinds that broken EXIF raises
        return image
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode == "F":
        raise Unreadable("floating-point pixels, whose white is unknown")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image)
    return canvas


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Unreadable("more than 16 bits a pixel")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
