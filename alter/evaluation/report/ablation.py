"""The figure of an ablation: quality against the MACs of all denoising steps."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from .drawing import EXPERTS, INK, WIDTH, name_ends, styled

_COLORS = (*EXPERTS, "#8C564B", "#56B4E9")
_SERIES = {  # in the order in which they take colours, after the dense model
    "dense_chosen": "dense, chosen timesteps", "planned": "steps and depth planned",
    "elastic_range": "elastic, one run", "elastic": "elastic", "hypernetwork": "hypernetwork",
    "one_mask": "one measured mask", "paper": "paper's search",
}


@styled
def fronts_figure(rows: list[dict[str, Any]]) -> Figure:
    """Fréchet distance and drift over the share of the MACs of all dense steps: a line per variant, named at its end,
    with the standard deviation over seeds as a band; the dense model with fewer steps is the line to beat."""
    figure = Figure((2 * WIDTH, 3.4), layout="constrained")
    for axis, name, label in zip(figure.subplots(1, 2), ("fd", "drift"),
                                 ("Fréchet distance", "drift from 50 dense steps"), strict=True):
        ends: list[tuple[float, float, str, str]] = []
        for index, (variant, title) in enumerate({"dense": "dense, fewer steps", **_SERIES}.items()):
            chosen = [row for row in rows if row["variant"] == variant and " " not in row["run"]]
            places = {(row["budget"], row.get("rung")) for row in chosen}
            groups = [[(row["share"], row[name]) for row in chosen if (row["budget"], row.get("rung")) == place]
                      for place in places]
            if not groups:
                continue
            points = np.array([(*np.mean(group, axis=0), _spread([y for _, y in group])) for group in groups])
            x, y, spread = points[np.argsort(points[:, 0])].T
            color = INK if variant == "dense" else _COLORS[index - 1]
            axis.plot(x, y, color=color, linewidth=2 if variant == "dense" else 1.2, marker=".", markersize=5)
            if len(x) > 1:
                axis.fill_between(x, y - spread, y + spread, color=color, alpha=0.15, linewidth=0)
            else:
                axis.vlines(x, y - spread, y + spread, color=color, linewidth=1)
            ends.append((x[-1], y[-1], title, color))
        axis.set(xlabel="MACs of all steps (20 dense steps: 1)", ylabel=label, yscale="log", xlim=(None, 1.8))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_xticks([0.25, 0.5, 0.75, 1.0])
        axis.grid()
        name_ends(axis, ends)
    return figure


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def plot_fronts(rows: list[dict[str, Any]], path: Path) -> None:
    """An ablation's rows (see `alter ablate`), as a picture."""
    fronts_figure(rows).savefig(path, facecolor="white", dpi=160)
