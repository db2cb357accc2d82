"""The pairs of images that differ most, in one PNG with what was measured of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

AGAINST = "against"  # .json and .png in a run's directory: its images against the dense model's


@dataclass(frozen=True)
class Pair:
    """A pair's file name, its prompt or class, what was measured of it, and its two RGB images of one size."""

    name: str
    title: str
    values: dict[str, float]
    image: Image.Image
    dense: Image.Image


def save_pairs(pairs: list[Pair], file: Path) -> None:
    """Pairs side by side, the dense image above; the PNG's text field "pairs" says what each is, as JSON."""
    width, height = (max(sides) for sides in zip(*(pair.dense.size for pair in pairs), strict=True))
    sheet, text = Image.new("RGB", (width * len(pairs), 2 * height), "white"), PngImagePlugin.PngInfo()
    for i, pair in enumerate(pairs):
        sheet.paste(pair.dense, (i * width, 0))
        sheet.paste(pair.image, (i * width, height))
    text.add_itxt("pairs", json.dumps([
        {"file": pair.name, "title": pair.title, "size": pair.dense.size,
         "values": {name: f"{value:.4g}" for name, value in pair.values.items()}} for pair in pairs]))
    partial = file.with_name(f".{file.name}")
    sheet.save(partial, "PNG", pnginfo=text)
    partial.replace(file)


def read_pairs(file: Path) -> list[tuple[dict[str, Any], Image.Image, Image.Image]]:
    """What `save_pairs` wrote: of each pair what it is, its dense image, and the other one."""
    with Image.open(file) as sheet:
        sheet.load()
        found = json.loads(getattr(sheet, "text", {})["pairs"])
        across, down = sheet.width // len(found), sheet.height // 2
        boxes = [(i * across, top, i * across + about["size"][0], top + about["size"][1])
                 for i, about in enumerate(found) for top in (0, down)]
        pictures = [sheet.crop(box) for box in boxes]
    return list(zip(found, pictures[::2], pictures[1::2], strict=True))
