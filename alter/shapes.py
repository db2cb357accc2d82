"""A toy text-to-image data set drawn here: coloured shapes and captions such as "a small red circle left of a blue
square"; written as an image folder with `metadata.jsonl`."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

SIZE = 32
COLOURS = {"red": (214, 48, 49), "green": (39, 174, 96), "blue": (41, 98, 255), "yellow": (241, 196, 15)}
SHAPES = ("circle", "square", "triangle")
RADII = {"small": 5.0, "large": 7.5}
RELATIONS = {"left of": (-1, 0), "above": (0, -1)}
KINDS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
_WORDS = re.compile("|".join(KINDS))


def draw_shapes(count: int, seed: int) -> tuple[list[Image.Image], list[list[str]]]:
    """`count` images of 32 × 32 pixels, each of one or two different shapes, and two captions for each image."""
    rng = np.random.default_rng([seed, 7])
    drawn = [_draw(rng) for _ in range(count)]
    return [image for image, _ in drawn], [captions for _, captions in drawn]


def write_shapes(folder: Path, count: int, seed: int) -> None:
    """Write NNNNN.png and `metadata.jsonl` (`file_name`, `text`: a list of captions)."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    lines = []
    for i, (image, captions) in enumerate(zip(*draw_shapes(count, seed), strict=True)):
        image.save(partial / f"{i:05d}.png")
        lines.append(json.dumps({"file_name": f"{i:05d}.png", "text": captions}) + "\n")
    (partial / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    partial.rename(folder)


def kinds(caption: str) -> Tensor:
    """Which of KINDS, colour and shape, a caption asks for: float32 [12] of zeros and ones."""
    named = _WORDS.findall(caption)
    return torch.tensor([float(kind in named) for kind in KINDS])


def _draw(rng: np.random.Generator) -> tuple[Image.Image, list[str]]:
    scale = 4  # drawn larger and averaged, for smooth edges
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), (245, 245, 245))
    canvas = ImageDraw.Draw(image)
    chosen = [KINDS[k] for k in rng.choice(len(KINDS), size=int(rng.integers(1, 3)), replace=False)]
    sizes = [str(rng.choice(list(RADII))) for _ in chosen]
    relation = str(rng.choice(list(RELATIONS)))
    for i, (kind, size) in enumerate(zip(chosen, sizes, strict=True)):
        centre = SIZE / 2 + rng.uniform(-5, 5, 2)
        if len(chosen) == 2:
            direction = np.array(RELATIONS[relation]) * (1 if i == 0 else -1)
            centre = SIZE / 2 + 8 * direction + rng.uniform(-1, 1, 2) + rng.uniform(-4, 4, 2) * (direction == 0)
        colour, shape = kind.split()
        _shape(canvas, shape, centre * scale, RADII[size] * scale, COLOURS[colour])
    full = [f"a {size} {kind}" for size, kind in zip(sizes, chosen, strict=True)]
    short = [f"a {kind}" for kind in chosen]
    return image.resize((SIZE, SIZE), Image.Resampling.BOX), [f" {relation} ".join(full), f" {relation} ".join(short)]


def _shape(canvas: ImageDraw.ImageDraw, shape: str, centre: np.ndarray, radius: float, colour: tuple) -> None:
    if shape == "circle":
        canvas.ellipse([*(centre - radius), *(centre + radius)], fill=colour)
        return
    corners, turned = (4, math.pi / 4) if shape == "square" else (3, -math.pi / 2)
    angles = turned + 2 * math.pi * np.arange(corners) / corners
    points = centre + radius * 1.15 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    canvas.polygon([(float(x), float(y)) for x, y in points], fill=colour)
