"""The figure of an ablation: quality against measured time."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .drawing import EXPERTS, INK, WIDTH, styled


@styled
def quality_figure(rows: list[dict[str, Any]]) -> Figure:
    """A column per keep ratio and a point per variant, with the standard deviation over its seeds."""
    experts = [row for row in rows if row["variant"] != "dense"]
    variants, keeps = sorted({row["variant"] for row in experts}), sorted({row["keep_ratio_target"] for row in experts})
    figure = Figure((2 * WIDTH, 6), layout="constrained")
    axes, drawn = figure.subplots(2, len(keeps), sharex="col", sharey="row", squeeze=False), {}
    for column, keep in zip(axes.T, keeps, strict=True):
        for axis, name in zip(column, ("output_error", "fd"), strict=True):
            for index, variant in enumerate(variants):
                points = np.array([(row["time_ratio"], row[name]) for row in experts
                                   if (row["variant"], row["keep_ratio_target"]) == (variant, keep)])
                if len(points):
                    (x, y), (wide, high) = points.mean(0), points.std(0, ddof=1) if len(points) > 1 else (0, 0)
                    drawn[variant.replace("_", " ")] = axis.errorbar(
                        x, y, high, wide, marker="osD^v<>ph*XPd"[index % 13], markersize=4.5, linestyle="",
                        elinewidth=0.5, color=EXPERTS[index % len(EXPERTS)])
            axis.set(ylim=(0, None))
            axis.grid()
        steps = {row["sampling_steps"] for row in experts}
        dense = [row["fd"] for row in rows if row["variant"] == "dense" and row["sampling_steps"] in steps]
        if dense:
            drawn["dense"] = column[1].axhline(np.mean(dense), color=INK, linewidth=0.8)
        column[0].set_title(f"keep ratio {keep:g}")
        column[1].set_xlabel("measured time (dense: 1)")
    for axis, label in zip(axes[:, 0], ("output error", "Fréchet distance"), strict=True):
        axis.set_ylabel(label)
    columns = max(1, 90 // (6 + max(map(len, drawn))))
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=columns)
    return figure


def plot_quality(rows: list[dict[str, Any]], path: Path) -> None:
    """An ablation's rows (see `scripts/ablate.py`): output error and Fréchet distance against measured time."""
    quality_figure(rows).savefig(path, facecolor="white", dpi=160)
