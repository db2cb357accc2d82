"""Toy data sets, drawn here: coloured shapes with captions such as "a small red circle left of a blue square", written
as an image folder with `metadata.jsonl`; and scenes with classes, written as latents."""

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
    """`count` images of 32 × 32 pixels, each with one or two different shapes, and two captions per image."""
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


def write_scenes(folder: Path, count: int, seed: int) -> None:
    """Write `count` scenes and their classes in fast-DiT's layout: pixels float32 [1, 3, 16, 16] in [-1, 1].

    A scene is a shape, whose kind is the class, of any size, place and rotation, in front of another one and a coloured
    grating: hard enough that a network of a few layers does worse than a deeper one.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("scenes_features", "scenes_labels"):
        (partial / name).mkdir(parents=True)
    rng = np.random.default_rng([seed, 10])
    for i in range(count):
        label = int(rng.integers(len(KINDS)))
        pixels = np.asarray(_draw_scene(rng, label), dtype=np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        np.save(partial / "scenes_features" / f"{i}.npy", pixels)
        np.save(partial / "scenes_labels" / f"{i}.npy", np.array([label]))
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


def _draw_scene(rng: np.random.Generator, label: int, side: int = 16, scale: int = 4) -> Image.Image:
    row, column = np.mgrid[: side * scale, : side * scale] / (side * scale)
    angle, waves, phase = rng.uniform(0, math.pi), rng.uniform(1, 4), rng.uniform(0, 2 * math.pi)
    grating = 0.5 + 0.5 * np.sin(2 * math.pi * waves * (row * math.sin(angle) + column * math.cos(angle)) + phase)
    ends = rng.uniform(40, 215, (2, 3))
    image = Image.fromarray((grating[..., None] * ends[0] + (1 - grating[..., None]) * ends[1]).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    for kind, radius in ((int(rng.integers(len(KINDS))), rng.uniform(1.5, 2.5)), (label, rng.uniform(3, 5))):
        colour, shape = KINDS[kind].split()
        bright = tuple(int(value) for value in np.clip(np.array(COLOURS[colour]) + rng.uniform(-30, 30, 3), 0, 255))
        _shape(canvas, shape, rng.uniform(0.3, 0.7, 2) * side * scale, radius * scale, bright, rng.uniform(0, math.pi))
    return image.resize((side, side), Image.Resampling.BOX)


def _shape(canvas: ImageDraw.ImageDraw, shape: str, centre: np.ndarray, radius: float, colour: tuple,
           turn: float = 0.0) -> None:
    if shape == "circle":
        canvas.ellipse([*(centre - radius), *(centre + radius)], fill=colour)
        return
    corners, turned = (4, math.pi / 4) if shape == "square" else (3, -math.pi / 2)
    angles = turn + turned + 2 * math.pi * np.arange(corners) / corners
    points = centre + radius * 1.15 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    canvas.polygon([(float(x), float(y)) for x, y in points], fill=colour)
