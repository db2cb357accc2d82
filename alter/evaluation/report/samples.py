"""Pictures of samples: the figure with a row per model, and strips of validation images with their captions."""

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin
from torch import Tensor

from .drawing import described, styled


@styled
def samples_figure(rows: dict[str, Tensor], labels: list[str]) -> Figure:
    """Images [N, C, S, S] in [-1, 1] by the name of their row; the label of each column, one seed each, above it."""
    wide, deep = max(map(len, labels)) > 12, 0.13 * max(name.count("\n") + 1 for name in rows)
    side, above = (1.35, 0.75) if wide else (0.65, 0.25)
    height = max(side, deep) + 0.08
    figure = Figure((1.4 + len(labels) * (side + 0.06), above + len(rows) * height), layout="constrained")
    axes = figure.subplots(len(rows), len(labels), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            show(axis, image)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", ma="left", labelpad=6)
    for axis, label in zip(axes[0], labels, strict=True):
        axis.set_title(textwrap.fill(label, 19) if wide else label, fontsize=8.5, loc="center")
    spoken = "; ".join(name.replace("\n", ", ") for name in rows)
    return described(figure, f"Images of {', '.join(labels)}. Rows: {spoken}.")


def show(axis: Any, image: Tensor) -> None:
    """An image [C, S, S] in [-1, 1], with a frame and without ticks."""
    axis.imshow((image.permute(1, 2, 0).numpy().squeeze() + 1).clip(0, 2) / 2, cmap="gray", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(True)


def plot_samples(rows: dict[str, Tensor], labels: list[str], path: Path) -> None:
    """samples.png, of as many columns as a page is wide: six with long labels, or twelve."""
    most = 6 if max(map(len, labels)) > 12 else 12
    shown = {name: images[:most] for name, images in rows.items()}
    samples_figure(shown, labels[:most]).savefig(path, dpi=160, facecolor="white")


def save_strip(pixels: np.ndarray, captions: list[str], file: Path) -> None:
    """Images uint8 [N, S, S, C] side by side as a PNG, whose text field "captions" has the caption of each, as JSON."""
    strip, text = np.concatenate(list(pixels), axis=1), PngImagePlugin.PngInfo()
    text.add_itxt("captions", json.dumps(captions))
    Image.fromarray(strip.squeeze(-1) if strip.shape[-1] == 1 else strip).save(file, pnginfo=text)


def read_strip(file: Path) -> tuple[list[Image.Image], list[str]]:
    """The images of a strip and their captions: those of `save_strip`, or else numbers."""
    with Image.open(file) as strip:
        strip.load()
        side, text = strip.height, getattr(strip, "text", {}).get("captions")
        images = [strip.crop((left, 0, left + side, side)) for left in range(0, strip.width, side)]
    return images, json.loads(text) if text else [f"image {i + 1}" for i in range(len(images))]
