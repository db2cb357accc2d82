"""Figures of finished experts: their layers, their timesteps and their cost."""

import textwrap
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ...experts.artefact import TemporalExperts
from .drawing import (
    BLUE,
    EXPERTS,
    INK,
    ORANGE,
    ROW,
    WIDTH,
    add_colorbar,
    described,
    draw_rows,
    layers,
    make_figure,
    name_rows,
    styled,
)
from .words import macs, percent, used


def kept_frequency(mask_EL: np.ndarray, expert_T: np.ndarray) -> np.ndarray:
    """Share of the timesteps at which each layer runs, float64 [L]."""
    return np.bincount(expert_T, minlength=len(mask_EL)) / len(expert_T) @ mask_EL


def similarity(experts: TemporalExperts) -> np.ndarray:
    """MACs of the layers that both experts keep, divided by those of the layers that either keeps, float64 [U, U].

    Of the U experts that are used.
    """
    kept, macs = experts.mask_EL[experts.used], np.array(experts.macs, dtype=np.float64)
    both = (kept * macs) @ kept.T
    either = (kept @ macs)[:, None] + kept @ macs - both
    return np.divide(both, either, out=np.ones_like(both), where=either > 0)


def identical(experts: TemporalExperts) -> list[list[int]]:
    """Groups of two or more used experts with the same mask."""
    groups: dict[bytes, list[int]] = {}
    for e in experts.used:
        groups.setdefault(experts.mask_EL[e].tobytes(), []).append(e)
    return [group for group in groups.values() if len(group) > 1]


def colours(experts: TemporalExperts) -> dict[int, str]:
    """Of each used expert."""
    return {e: EXPERTS[place % len(EXPERTS)] for place, e in enumerate(experts.used)}


@styled
def masks_figure(experts: TemporalExperts, into: Any = None) -> Figure:
    """Which layers each used expert keeps, drawn `into` a SubFigure, if given.

    A kept layer has the colour of its share of the MACs or, where all layers cost the same, of the timesteps.
    """
    mask_LU, (order, names) = experts.mask_EL[experts.used].T, layers(experts.sites)
    figure, axis = make_figure(1.4 + ROW * len(names), width=max(WIDTH, 1.5 + 0.24 * mask_LU.shape[1]), into=into)
    value_L, label = np.array(experts.macs) / experts.macs_total, "the layer's share of the dense MACs"
    if len(set(experts.macs)) == 1:
        value_L, label = kept_frequency(experts.mask_EL, experts.expert_T), "share of the timesteps that run the layer"
    value_LU = np.ma.masked_where(~mask_LU, mask_LU * value_L[:, None])
    mesh = draw_rows(axis, experts.sites, value_LU, vmin=0, vmax=value_LU.max(), edgecolors=INK, linewidth=0.5)
    rows, columns = np.nonzero(~mask_LU[order])
    axis.scatter(columns + 0.5, rows + 0.5, marker="x", color=INK, s=9, linewidth=0.7)
    axis.set_xticks(np.arange(mask_LU.shape[1]) + 0.5, experts.used)
    alike = "; ".join(" = ".join(map(str, group)) for group in identical(experts))
    notes = [f"Identical experts: {alike}"] if alike else []
    if len(experts.used) < len(experts.mask_EL):
        notes.append(used(experts).capitalize())
    lines = ["Layers: filled if run, × if skipped", *(textwrap.fill(note, 44) for note in notes)]
    axis.set(xlabel="expert", title="\n".join(lines))
    add_colorbar(figure, axis, mesh, label)
    return described(figure, *(
        f"Expert {e} keeps {mask_L.sum()} of {len(mask_L)} layers and skips "
        f"{', '.join(name for name, keeps in zip(names, mask_L[order], strict=True) if not keeps) or 'none'}."
        for e, mask_L in zip(experts.used, mask_LU.T, strict=True)), *(f"{note}." for note in notes))


@styled
def routes_figure(experts: TemporalExperts, into: Any = None) -> Figure:
    """Which training timesteps each expert serves."""
    number, total = len(experts.used), len(experts.expert_T)
    figure, axis = make_figure(0.8 + 0.28 * number, into=into)
    borders = [*np.flatnonzero(np.diff(experts.expert_T, prepend=-1)).tolist(), total]
    texts = []
    for row, (e, colour) in enumerate(colours(experts).items()):
        spans = [(low, high - low) for low, high in pairwise(borders) if experts.expert_T[low] == e]
        axis.broken_barh(spans, (row - 0.42, 0.84), color=colour, linewidth=0.2)
        axis.axhline(row + 0.5, color=INK, linewidth=0.4, alpha=0.4)
        texts.append(f"Expert {e} serves {sum(length for _, length in spans)} of {total} timesteps, in {len(spans)} "
                     f"intervals from {spans[0][0]} to {sum(spans[-1]) - 1}.")
    axis.set_yticks(range(number), [f"{e} ({(experts.expert_T == e).mean():.0%})" for e in experts.used])
    axis.set(xlim=(0, total), ylim=(number - 0.5, -0.5), xlabel="training timestep (high: noise)", ylabel="expert",
             title="Timesteps per expert (share of all)")
    return described(figure, *texts)


@styled
def macs_figure(experts: TemporalExperts, into: Any = None) -> Figure:
    """MACs of a step at each training timestep."""
    figure, axis = make_figure(2.2, into=into)
    share_T, dense = experts.macs_T / experts.macs_total, macs(experts.macs_total)
    where = "all timesteps" + (f", by those of {len(experts.timesteps)} sampling steps" if experts.timesteps else "")
    axis.step(range(len(share_T)), share_T, where="mid", color=INK, linewidth=0.7)
    axis.axhline(experts.keep_ratio, color=ORANGE, linestyle="--", linewidth=1.4,
                 label=f"mean over {where}: {percent(experts.keep_ratio)}")
    axis.set(xlim=(0, len(share_T)), ylim=(0, 1.05), xlabel="training timestep (high: noise)",
             ylabel="share of the dense MACs", title=f"MACs per step (dense: {dense})")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.legend(loc="lower left")
    return described(figure, f"A step takes between {share_T.min():.1%} and {share_T.max():.1%} of the dense model's "
                             f"{dense}; the mean over {where} is {experts.keep_ratio:.1%}.")


@styled
def steps_figure(experts: TemporalExperts, timesteps: list[int]) -> Figure:
    """Expert and cost of each step of a sampler that visits these training timesteps, in this order."""
    expert_S, share_S = experts.expert_T[timesteps], experts.macs_T[timesteps] / experts.macs_total
    figure, axis = make_figure(2.5, width=max(WIDTH, 0.5 + 0.15 * len(timesteps)))
    bars = axis.bar(range(len(timesteps)), share_S, edgecolor=INK, linewidth=0.5,
                    color=[colours(experts)[e] for e in expert_S])
    axis.bar_label(bars, list(map(str, expert_S)), fontsize=7.5, padding=1)
    axis.axhline(1, color=INK, linestyle="--", linewidth=0.8)
    axis.set_xticks(range(len(timesteps)), list(map(str, timesteps)), rotation=90, fontsize=7.5)
    total = f"{macs(share_S.sum() * experts.macs_total)}, {share_S.mean():.1%} of dense"
    axis.set(ylim=(0, 1.1), xlim=(-0.7, len(timesteps) - 0.3), ylabel="share of the dense MACs",
             xlabel="timestep, in the order of denoising",
             title=f"{len(timesteps)} steps: {total}\nNumbers: experts. Dashed: dense")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    return described(figure, f"{len(timesteps)} denoising steps take {total}. Their experts, in order: "
                              f"{' '.join(map(str, expert_S))}.")


@styled
def frequency_figure(experts: TemporalExperts) -> Figure:
    """How often each layer runs over the training timesteps."""
    order, names = layers(experts.sites)
    kept_L = kept_frequency(experts.mask_EL, experts.expert_T)[order]
    figure, axis = make_figure(0.8 + ROW * len(names))
    bars = axis.barh(np.arange(len(names)) + 0.5, kept_L, color=BLUE)
    axis.bar_label(bars, [f"{share:.0%}" if share else "never" for share in kept_L], fontsize=7.5, padding=2)
    name_rows(axis, names)
    axis.set(xlim=(0, 1.18), xticks=[0, 0.5, 1], xticklabels=["0%", "50%", "100%"],
             title="How often each layer runs")
    return described(figure, "Share of the timesteps that run each layer: "
                      + ", ".join(f"{name} {share:.0%}" for name, share in zip(names, kept_L, strict=True)) + ".")


@styled
def similarity_figure(experts: TemporalExperts) -> Figure:
    """How similar the experts are: see `similarity`."""
    alike, names = similarity(experts), experts.used
    number = len(names)
    side = max(2.6, 0.4 + 0.32 * number)
    figure, axis = make_figure(side + 0.2, width=max(WIDTH, side))
    axis.pcolormesh(alike, cmap="cividis", vmin=0, vmax=1, rasterized=True)
    for (row, column), value in np.ndenumerate(alike):
        axis.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7.5,
                  color="black" if value > 0.47 else "white")
    ticks = np.arange(number) + 0.5
    axis.set(xticks=ticks, yticks=ticks, xticklabels=names, yticklabels=names, aspect="equal",
             xlabel="expert", ylabel="expert", ylim=(number, 0), title="Similarity: MACs in both / MACs in either")
    pairs = sorted((alike[a, b], f"experts {names[a]} and {names[b]}") for a, b in combinations(range(number), 2))
    texts = [f"{which} similar: {pair} ({value:.2f})." for which, (value, pair)
             in zip(("Most", "Least"), pairs[-1:] + pairs[:1], strict=False)]
    return described(figure, *texts or ["There is only one expert."])


@styled
def plot_experts(experts: TemporalExperts, path: Path) -> None:
    """experts.png: layers of each expert, timesteps of each expert, MACs at each timestep."""
    figure = Figure((9, max(4.4, 1.6 + ROW * len(experts.sites))), layout="constrained")
    halves: Any = figure.subfigures(1, 2)
    above, below = halves[1].subfigures(2, 1)
    for draw, into in ((masks_figure, halves[0]), (routes_figure, above), (macs_figure, below)):
        draw(experts, into)
    figure.savefig(path, dpi=130)
