"""Figures of a run: its search, its losses, and the effect of skipping each layer."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ...experts.artefact import TemporalExperts
from ...method.sensitivity import Sensitivity
from .drawing import INK, ORANGE, ROW, WIDTH, add_colorbar, described, draw_rows, layers, make_figure, styled
from .experts import kept_frequency

LOSSES = {"perf": "weighted sum (L_perf)", "denoise": "denoising error", "output_kd": "error of the teacher's output",
          "feature_kd": "error of the activations", "ratio": "distance to the budget", "balance": "router's balance"}


@styled
def evolution_figure(history: list[dict[str, Any]], experts: TemporalExperts) -> Figure:
    """Keep ratio and masks over the search; `history` as `read_history` returns it."""
    steps, edges = _steps(history)
    kept_LR = np.stack([kept_frequency(record["mask_EL"], record["expert_T"]) for record in history], axis=1)
    height = 0.15 * len(kept_LR)
    figure, (ratio, kept) = make_figure(2.6 + height, 2, sharex=True, height_ratios=[1.2, 0.7 + height])
    ratios = [record["keep_ratio"] for record in history]
    ratio.plot(steps, ratios, color=INK, marker=".", markersize=3, linewidth=1)
    ratio.axhline(experts.keep_ratio_target, color=ORANGE, linestyle="--", linewidth=1)
    ratio.set_title(f"Keep ratio (dashed: target {experts.keep_ratio_target:g})")
    mesh = draw_rows(kept, experts.sites, kept_LR, edges, vmin=0, vmax=1, rasterized=True)
    kept.set(xlabel="step", title="Timesteps that run each layer")
    add_colorbar(figure, kept, mesh, "share of the timesteps")
    return described(figure, f"From step {steps[0]} to step {steps[-1]} the keep ratio went from {ratios[0]:.3f} to "
                              f"{ratios[-1]:.3f}, and the layers that some timestep skips from "
                              f"{(kept_LR[:, 0] < 1).sum()} to {(kept_LR[:, -1] < 1).sum()} of {len(kept_LR)}.")


@styled
def mask_history_figure(history: list[dict[str, Any]], experts: TemporalExperts) -> Figure:
    """Which layers each expert kept during the search: a strip per expert that some record uses, a row per layer."""
    (order, _), (steps, edges) = layers(experts.sites), _steps(history)
    ever = _used(history)
    mask_ULR = np.stack([record["mask_EL"][ever] for record in history], axis=2)[:, order]
    number, depth = mask_ULR.shape[:2]
    figure, strips = make_figure(0.6 + (0.4 + 0.04 * depth) * number, number, sharex=True, squeeze=False)
    texts = []
    for e, axis, mask_LR in zip(ever, strips[:, 0], mask_ULR, strict=True):
        axis.pcolormesh(edges, range(depth + 1), mask_LR, vmin=0, vmax=1, cmap="cividis", rasterized=True)
        changed = int((mask_LR[:, 1:] != mask_LR[:, :-1]).sum())
        axis.set(ylim=(depth, 0), yticks=[0, depth], title=f"Layers of expert {e} ({mask_LR[:, -1].sum()} at the end)")
        texts.append(f"Expert {e} keeps {mask_LR[:, 0].sum()} layers at step {steps[0]}, {mask_LR[:, -1].sum()} at "
                     f"{steps[-1]}, with {changed} changes between.")
    strips[-1, 0].set_xlabel("step")
    return described(figure, *texts)


@styled
def routing_figure(history: list[dict[str, Any]], experts: TemporalExperts) -> Figure:
    """Which timesteps each expert served during the search: a strip per expert that served some, in a hundred bins."""
    ever, timesteps = _used(history), len(experts.expert_T)
    (steps, edges), expert_TR = _steps(history), np.stack([record["expert_T"] for record in history], axis=1)
    figure, strips = make_figure(0.6 + 0.8 * len(ever), len(ever), sharex=True, squeeze=False)
    texts = []
    for e, axis in zip(ever, strips[:, 0], strict=True):
        share_BR = np.stack([part.mean(axis=0) for part in np.array_split(expert_TR == e, min(100, timesteps))])
        borders = np.linspace(0, timesteps, len(share_BR) + 1)
        axis.pcolormesh(edges, borders, share_BR, vmin=0, vmax=1, cmap="cividis", rasterized=True)
        first, last = ((expert_TR[:, r] == e).mean() for r in (0, -1))
        axis.set(yticks=[0, timesteps], title=f"Timesteps of expert {e} ({last:.0%} at the end)")
        texts.append(f"Expert {e} serves {first:.0%} of the timesteps at step {steps[0]}, {last:.0%} at {steps[-1]}.")
    strips[-1, 0].set_xlabel("step")
    return described(figure, *texts)


@styled
def losses_figure(lines: list[dict[str, Any]]) -> Figure:
    """Losses of both updates over the run, from lines of metrics.jsonl that hold losses; the search is shaded."""
    names = [name for name in LOSSES if any({f"search/{name}", f"train/{name}"} & line.keys() for line in lines)]
    figure, axes = make_figure(0.7 + 1.25 * len(names), len(names), sharex=True, squeeze=False)
    searched = [line["step"] for line in lines if any(key.startswith("search/") for key in line)]
    texts = []
    for axis, name in zip(axes[:, 0], names, strict=True):
        seen = []
        for key, who, colour, style in ((f"search/{name}", "hypernetwork's update", ORANGE, "--"),
                                        (f"train/{name}", "backbone's update", INK, "-")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, linewidth=0.9, label=who)
                texts.append(f"{LOSSES[name]}, {who}: from {points[0][1]:.3g} to {points[-1][1]:.3g}.")
                seen += [value for _, value in points]
        if max(seen) > 10 * min(seen) > 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 3) if max(seen) < 1000 * min(seen) else (1,)))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter("{x:g}")
        if searched:
            axis.axvspan(min(searched), max(searched), color=INK, alpha=0.08, linewidth=0)
        axis.set_title(LOSSES[name] + (", log scale" if axis.get_yscale() == "log" else ""))
        axis.grid(axis="y")
    axes[-1, 0].set_xlabel("step (shaded: the search)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return described(figure, *texts)


@styled
def sensitivity_figure(table: Sensitivity) -> Figure:
    """How much the output changes when one layer is skipped, at each timestep."""
    relative_LB, bins = table.relative_LB, [f"{low}-{high - 1}" for low, high in pairwise(table.edges)]
    figure, axis = make_figure(1.9 + ROW * len(relative_LB), width=max(WIDTH, 1.5 + 0.2 * len(bins)))
    high = max(relative_LB.max(), 1e-9)
    low = min(max(relative_LB.min(), high / 1e4), high / 1.01)
    mesh = draw_rows(axis, table.sites, relative_LB.clip(low), norm=LogNorm(low, high), rasterized=True)
    axis.set_xticks(np.arange(len(bins)) + 0.5, bins, rotation=90, fontsize=7.5)
    axis.set(xlabel="timesteps", title="Effect of skipping one layer")
    figure.colorbar(mesh, location="bottom", label="in units of the dense model's error", aspect=30,
                    pad=0.02, ticks=np.geomspace(low, high, 4), format="{x:.2g}").minorticks_off()
    names = dict(zip(*layers(table.sites), strict=True))
    worst, where = np.unravel_index(relative_LB.argmax(), relative_LB.shape)
    return described(figure, f"Skipping {names[int(worst)]} at timesteps {bins[where]} changes the output most, by "
                              f"{high:.2g} of the dense model's error there.")


def plot_sensitivity(table: Sensitivity, path: Path) -> None:
    """sensitivity.png."""
    sensitivity_figure(table).savefig(path, dpi=110)


def _used(history: list[dict[str, Any]]) -> list[int]:
    """The experts that some record's timesteps use."""
    return np.unique([record["expert_T"] for record in history]).tolist()


def _steps(history: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """The records' steps, and the edges of the cells in which each holds until the next."""
    steps = [record["step"] for record in history]
    return steps, [*steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1]
