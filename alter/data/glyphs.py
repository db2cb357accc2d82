"""Letters of the fonts that matplotlib ships, as grey images with classes, written as latents: no download."""

import math
import shutil
import string
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIZE = 32
CLASSES = tuple("ABCDEFGHIJ")
_SCALE = 4  # drawn larger and averaged, for smooth edges


@cache
def fonts() -> tuple[Path, ...]:
    """The files, in order of their names, whose glyphs of A-Z and a-z are these letters, not symbols instead."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    def has_letters(file: Path) -> bool:
        font = FT2Font(str(file))
        glyph_of = font.get_charmap()
        return all(ord(letter) in glyph_of and font.get_glyph_name(glyph_of[ord(letter)]) == letter
                   for letter in string.ascii_letters)

    return tuple(file for file in sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"))
                 if has_letters(file))


def draw_glyphs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` letters, float32 [count, 1, 32, 32] in [-1, 1], and which of CLASSES they are, int64 [count].

    White on black; font, size, width, rotation, slant and place are random.
    """
    rng = np.random.default_rng([seed, 12])
    labels = rng.integers(len(CLASSES), size=count)
    images = np.stack([_draw(rng, CLASSES[label]) for label in labels])
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels)


def write_glyphs(folder: Path, count: int, seed: int) -> None:
    """Write what `draw_glyphs` draws in fast-DiT's layout: one float32 [1, 1, 32, 32] and one label a file."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("glyphs_features", "glyphs_labels"):
        (partial / name).mkdir(parents=True)
    images, labels = (values.numpy() for values in draw_glyphs(count, seed))
    for i in range(count):
        np.save(partial / "glyphs_features" / f"{i}.npy", images[i : i + 1])
        np.save(partial / "glyphs_labels" / f"{i}.npy", labels[i : i + 1])
    partial.rename(folder)


def _draw(rng: np.random.Generator, letter: str) -> np.ndarray:
    side = SIZE * _SCALE
    upright = _letter(int(rng.integers(len(fonts()))), letter)
    angle, slant = rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1)
    height = rng.uniform(1.1, 1.35)
    width = height * rng.uniform(0.9, 1.1)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    back = np.linalg.inv(turn @ np.array([[width, -slant], [0, height]]))  # PIL asks where a pixel comes from
    from_where = side / 2 - back @ (side / 2 + rng.uniform(-0.05, 0.05, 2) * side)
    coefficients = (*back[0], from_where[0], *back[1], from_where[1])
    placed = upright.transform((side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    ink = placed.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(ink, dtype=np.float32) / 127.5 - 1


@cache
def _letter(font: int, letter: str) -> Image.Image:
    """The letter in white, in the middle of a black square, its capitals about half as tall as the square."""
    side = SIZE * _SCALE
    image = Image.new("L", (side, side))
    made = ImageFont.truetype(str(fonts()[font]), round(0.75 * side))
    left, top, right, bottom = made.getbbox(letter)
    ImageDraw.Draw(image).text(((side - left - right) / 2, (side - top - bottom) / 2), letter, fill=255, font=made)
    return image
