"""What all figures share: style, colours, names and order of the layers, rows and colour bars.

Figures are made without pyplot and without changing rcParams. A figure's label (`get_label()`) says in words what it
shows. Text and lines have the colour INK, which the page replaces by its text colour.
"""

import re
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"
BLUE, ORANGE = "#0072B2", "#D55E00"
EXPERTS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#808080")  # Okabe and Ito's that stand out on white and on black
_LINE, _LETTER = 14.0, 5.5  # pixels: between names of series, and a letter of them
WIDTH, ROW = 3.5, 0.18  # inches: a phone's width, and the height of a layer's row
_STYLE: dict[Any, Any] = {
    "font.size": 8.5, "axes.titlesize": 9, "axes.titlelocation": "left", "legend.frameon": False, "figure.dpi": 130,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "text.parse_math": False,
    "axes.formatter.use_mathtext": False, "grid.alpha": 0.25, "grid.linewidth": 0.5,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color",
                     "ytick.color", "grid.color"), INK),
}
_SITE = re.compile(r"(?:(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnet|attention)s\.(\d+)\.?)?"
                   r"(?:transformer_blocks\.(\d+))?(?::residual)?")
styled = matplotlib.rc_context(_STYLE)


def layers(sites: tuple[str, ...]) -> tuple[list[int], list[str]]:
    """The sites' indices, as data passes them (down, mid, up), and their short names in that order."""
    found = []
    for index, site in enumerate(sites):
        match = _SITE.fullmatch(site)
        part, block, kind, number, inner = match.groups() if match else (None,) * 5
        key = (("down", "mid", "up", None).index(part), int(block or 0), int(number or 0), kind == "attention",
               int(inner or 0), index)
        name = " ".join(filter(None, (part, block, kind, number))) + (f".{inner}" if int(inner or 0) else "")
        found.append((key, name if part else f"block {inner}" if match else site))
    return [key[-1] for key, _ in sorted(found)], [name for _, name in sorted(found)]


def make_figure(height: float, rows: int = 1, width: float = WIDTH, into: Any = None, **grid: Any) -> tuple[Any, Any]:
    """A figure, or the given SubFigure, and its axes, one below the other."""
    figure = into or Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, 1, **grid)


def described(figure: Figure, *sentences: str) -> Figure:
    """The figure, with these sentences as its label."""
    figure.set_label(" ".join(sentences))
    return figure


def name_rows(axis: Axes, names: list[str]) -> None:
    """Row l, from l to l + 1, is layer l; a line under the last layer of the down and of the mid part."""
    axis.set_yticks(np.arange(len(names)) + 0.5, names)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(names), 0)
    for row, (before, after) in enumerate(pairwise(names), 1):
        if before.partition(" ")[0] != after.partition(" ")[0]:
            axis.axhline(row, -0.5, color=INK, linewidth=1, clip_on=False).set_in_layout(False)


def draw_rows(axis: Axes, sites: tuple[str, ...], values_LX: np.ndarray, edges: Any = None, **how: Any) -> Any:
    """A coloured cell per value, a row per layer in the order of `layers`; returns the mesh."""
    order, names = layers(sites)
    edges = range(values_LX.shape[1] + 1) if edges is None else edges
    mesh = axis.pcolormesh(edges, range(len(names) + 1), values_LX[order], cmap="cividis", **how)
    name_rows(axis, names)
    return mesh


def add_colorbar(figure: Figure, axis: Axes, mesh: Any, label: str) -> None:
    """A horizontal bar below the axis, in percent."""
    figure.colorbar(mesh, ax=axis, location="bottom", aspect=30, pad=0.02, label=label,
                    format=lambda x, _: f"{100 * x:g}%")


def name_ends(axis: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """The names of series right of their ends, those that end below one another without overlap."""
    axis.figure.canvas.draw()
    placed: list[tuple[float, float, float]] = []
    for x, y, title, color in sorted(ends, key=lambda end: end[1]):
        left, bottom = axis.transData.transform((x, y))
        right = left + _LETTER * len(title)
        lifted = max([bottom, *(height + _LINE for start, end, height in placed if start < right and left < end)])
        placed.append((left, right, lifted))
        lift = (lifted - bottom) * 72 / axis.figure.dpi
        axis.annotate(title, (x, y), (5, lift), textcoords="offset points", fontsize=7, color=color, va="center")
