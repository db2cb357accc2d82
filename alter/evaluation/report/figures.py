"""The drawing: figures of experts, of their search and of their samples, for PNGs, the HTML page and the notebook.

Every `..._figure` function returns a matplotlib Figure, made without pyplot and without changing rcParams. Its label
(`get_label()`) says in words what it shows. Text and lines have the colour INK, which the page replaces by its own.
"""

import re
import textwrap
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from torch import Tensor

from ...experts.artefact import TemporalExperts
from ...method.sensitivity import Sensitivity

INK = "#010203"
BLUE, ORANGE = "#0072B2", "#D55E00"
EXPERTS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#808080")  # Okabe and Ito's that stand out on white and on black
LOSSES = {"perf": "weighted sum (L_perf)", "denoise": "denoising error", "output_kd": "error of the teacher's output",
          "feature_kd": "error of its activations", "ratio": "distance to the budget", "balance": "router's balance"}
_WIDTH, _ROW = 3.5, 0.18  # inches: a phone's width, and the height of a layer's row
_STYLE: dict[Any, Any] = {
    "font.size": 8.5, "axes.titlesize": 9, "axes.titlelocation": "left", "legend.frameon": False, "figure.dpi": 130,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "text.parse_math": False,
    "axes.formatter.use_mathtext": False, "grid.alpha": 0.25, "grid.linewidth": 0.5,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color",
                     "ytick.color", "grid.color"), INK),
}
_SITE = re.compile(r"(?:(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnet|attention)s\.(\d+)\.?)?"
                   r"(?:transformer_blocks\.(\d+))?(?::residual)?")
_styled = matplotlib.rc_context(_STYLE)
count = EngFormatter(places=1, sep="\N{NO-BREAK SPACE}")  # of operations, as text: 12.5 M


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


def kept_frequency(mask_EL: np.ndarray, expert_T: np.ndarray) -> np.ndarray:
    """Share of the timesteps at which each layer runs, float64 [L]."""
    return np.bincount(expert_T, minlength=len(mask_EL)) / len(expert_T) @ mask_EL


def similarity(experts: TemporalExperts) -> np.ndarray:
    """MACs of the layers that both experts keep over those of the layers that either keeps, float64 [E, E]."""
    kept, macs = experts.mask_EL, np.array(experts.macs, dtype=np.float64)
    both = (kept * macs) @ kept.T
    either = (kept @ macs)[:, None] + kept @ macs - both
    return np.divide(both, either, out=np.ones_like(both), where=either > 0)


@_styled
def masks_figure(experts: TemporalExperts, into: Any = None) -> Figure:
    """Which layers each expert keeps, coloured by their share of the MACs; drawn `into` a SubFigure, if given."""
    mask_LE, (order, names) = experts.mask_EL.T, layers(experts.sites)
    figure, axis = _figure(1.1 + _ROW * len(names), width=max(_WIDTH, 1.5 + 0.24 * mask_LE.shape[1]), into=into)
    share_LE = np.ma.masked_where(~mask_LE, mask_LE * np.array(experts.macs)[:, None] / experts.macs_total)
    mesh = _draw_rows(axis, experts.sites, share_LE, vmin=0, vmax=share_LE.max(), edgecolors=INK, linewidth=0.5)
    rows, columns = np.nonzero(~mask_LE[order])
    axis.scatter(columns + 0.5, rows + 0.5, marker="x", color=INK, s=9, linewidth=0.7)
    ticks = [f"{e}" if e in experts.used else f"{e}\nunused" for e in range(mask_LE.shape[1])]
    axis.set_xticks(np.arange(len(ticks)) + 0.5, ticks)
    axis.set(xlabel="expert", title="Layers kept (filled) and skipped (×)")
    _colorbar(figure, axis, mesh, "the layer's share of the dense MACs")
    return _described(figure, *(
        f"Expert {e} keeps {mask_L.sum()} of {len(mask_L)} layers and skips "
        f"{', '.join(name for name, keeps in zip(names, mask_L[order], strict=True) if not keeps) or 'none'}."
        for e, mask_L in enumerate(experts.mask_EL)))


@_styled
def routes_figure(experts: TemporalExperts, into: Any = None) -> Figure:
    """Which expert serves each training timestep."""
    number, total = len(experts.mask_EL), len(experts.expert_T)
    figure, axis = _figure(0.8 + 0.28 * number, into=into)
    borders = [*np.flatnonzero(np.diff(experts.expert_T, prepend=-1)).tolist(), total]
    texts = []
    for e in range(number):
        spans = [(low, high - low) for low, high in pairwise(borders) if experts.expert_T[low] == e]
        axis.broken_barh(spans, (e - 0.42, 0.84), color=EXPERTS[e % len(EXPERTS)], linewidth=0.2)
        axis.axhline(e + 0.5, color=INK, linewidth=0.4, alpha=0.4)
        where = f", in {len(spans)} intervals from {spans[0][0]} to {sum(spans[-1]) - 1}" if spans else ""
        texts.append(f"Expert {e} serves {sum(length for _, length in spans)} of {total} timesteps{where}.")
    axis.set_yticks(range(number), [f"{e} ({(experts.expert_T == e).mean():.0%})" for e in range(number)])
    axis.set(xlim=(0, total), ylim=(number - 0.5, -0.5), xlabel="training timestep (high: noise)", ylabel="expert",
             title="Timesteps of each expert (its share)")
    return _described(figure, *texts)


@_styled
def macs_figure(experts: TemporalExperts, into: Any = None) -> Figure:
    """What a step costs at each training timestep."""
    figure, axis = _figure(2.2, into=into)
    share_T, dense = experts.macs_T / experts.macs_total, count(experts.macs_total)
    where = "all timesteps" if experts.timesteps is None else f"{len(experts.timesteps)} sampling steps"
    axis.step(range(len(share_T)), share_T, where="mid", color=INK, linewidth=0.7)
    axis.axhline(experts.keep_ratio, color=ORANGE, linestyle="--", linewidth=1.4,
                 label=f"mean over {where}: {experts.keep_ratio:.3f}")
    axis.set(xlim=(0, len(share_T)), ylim=(0, 1.05), xlabel="training timestep (high: noise)",
             ylabel="share of the dense MACs", title=f"MACs of a step (dense: {dense})")
    axis.legend(loc="lower left")
    return _described(figure, f"A step costs between {share_T.min():.1%} and {share_T.max():.1%} of the dense model's "
                              f"{dense} MACs; the mean over {where} is {experts.keep_ratio:.1%}.")


@_styled
def steps_figure(experts: TemporalExperts, timesteps: list[int]) -> Figure:
    """Expert and cost of each step of a sampler that visits these training timesteps, in this order."""
    expert_S, share_S = experts.expert_T[timesteps], experts.macs_T[timesteps] / experts.macs_total
    figure, axis = _figure(2.5, width=max(_WIDTH, 0.5 + 0.15 * len(timesteps)))
    bars = axis.bar(range(len(timesteps)), share_S, edgecolor=INK, linewidth=0.5,
                    color=[EXPERTS[e % len(EXPERTS)] for e in expert_S])
    axis.bar_label(bars, list(map(str, expert_S)), fontsize=7.5, padding=1)
    axis.axhline(1, color=INK, linestyle="--", linewidth=0.8)
    axis.set_xticks(range(len(timesteps)), list(map(str, timesteps)), rotation=90, fontsize=7.5)
    total = f"{count(share_S.sum() * experts.macs_total)} MACs, {share_S.mean():.1%} of dense"
    axis.set(ylim=(0, 1.1), xlim=(-0.7, len(timesteps) - 0.3), ylabel="share of the dense MACs",
             xlabel="timestep, in the order of denoising",
             title=f"{len(timesteps)} steps: {total}\nAbove each bar: its expert; dashed: dense")
    return _described(figure, f"{len(timesteps)} denoising steps take {total}. Their experts, in order: "
                              f"{' '.join(map(str, expert_S))}.")


@_styled
def frequency_figure(experts: TemporalExperts) -> Figure:
    """How often each layer runs over the training timesteps."""
    order, names = layers(experts.sites)
    kept_L = kept_frequency(experts.mask_EL, experts.expert_T)[order]
    figure, axis = _figure(0.8 + _ROW * len(names))
    bars = axis.barh(np.arange(len(names)) + 0.5, kept_L, color=BLUE)
    axis.bar_label(bars, [f"{share:.0%}" if share else "never" for share in kept_L], fontsize=7.5, padding=2)
    _name_rows(axis, names)
    axis.set(xlim=(0, 1.18), xticks=[0, 0.5, 1], xticklabels=["0%", "50%", "100%"],
             title="Timesteps that run each layer")
    return _described(figure, "Share of the timesteps that run each layer: "
                      + ", ".join(f"{name} {share:.0%}" for name, share in zip(names, kept_L, strict=True)) + ".")


@_styled
def similarity_figure(experts: TemporalExperts) -> Figure:
    """How alike the experts are: see `similarity`."""
    alike, number = similarity(experts), len(experts.mask_EL)
    side = max(2.6, 0.4 + 0.32 * number)
    figure, axis = _figure(side + 0.2, width=max(_WIDTH, side))
    axis.pcolormesh(alike, cmap="cividis", vmin=0, vmax=1, rasterized=True)
    for (row, column), value in np.ndenumerate(alike):
        axis.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7.5,
                  color="black" if value > 0.47 else "white")
    ticks = np.arange(number) + 0.5
    axis.set(xticks=ticks, yticks=ticks, xticklabels=range(number), yticklabels=range(number), aspect="equal",
             xlabel="expert", ylabel="expert", ylim=(number, 0), title="MACs kept by both / MACs kept by either")
    pairs = sorted((alike[a, b], f"experts {a} and {b}") for a, b in combinations(range(number), 2))
    texts = [f"{which} alike are {pair} ({value:.2f})." for which, (value, pair)
             in zip(("Most", "Least"), pairs[-1:] + pairs[:1], strict=False)]
    return _described(figure, *texts or ["There is one expert, like itself alone."])


@_styled
def evolution_figure(history: list[dict[str, Any]], experts: TemporalExperts) -> Figure:
    """Keep ratio and masks over the search; `history` as `read_history` returns it."""
    steps, edges = _steps(history)
    kept_LR = np.stack([kept_frequency(record["mask_EL"], record["expert_T"]) for record in history], axis=1)
    height = 0.15 * len(kept_LR)
    figure, (ratio, kept) = _figure(2.6 + height, 2, sharex=True, height_ratios=[1.2, 0.7 + height])
    ratios = [record["keep_ratio"] for record in history]
    ratio.plot(steps, ratios, color=INK, marker=".", markersize=3, linewidth=1)
    ratio.axhline(experts.keep_ratio_target, color=ORANGE, linestyle="--", linewidth=1)
    ratio.set_title(f"Keep ratio (dashed: target {experts.keep_ratio_target:g})")
    mesh = _draw_rows(kept, experts.sites, kept_LR, edges, vmin=0, vmax=1, rasterized=True)
    kept.set(xlabel="step", title="Timesteps that run each layer")
    _colorbar(figure, kept, mesh, "share of the timesteps")
    return _described(figure, f"From step {steps[0]} to step {steps[-1]} the keep ratio went from {ratios[0]:.3f} to "
                              f"{ratios[-1]:.3f}, and the layers that some timestep skips from "
                              f"{(kept_LR[:, 0] < 1).sum()} to {(kept_LR[:, -1] < 1).sum()} of {len(kept_LR)}.")


@_styled
def mask_history_figure(history: list[dict[str, Any]], experts: TemporalExperts) -> Figure:
    """Which layers each expert kept in the course of the search: a strip an expert, a row a layer."""
    (order, _), (steps, edges) = layers(experts.sites), _steps(history)
    mask_ELR = np.stack([record["mask_EL"] for record in history], axis=2)[:, order]
    number, depth = mask_ELR.shape[:2]
    figure, strips = _figure(0.6 + (0.4 + 0.04 * depth) * number, number, sharex=True, squeeze=False)
    texts = []
    for e, (axis, mask_LR) in enumerate(zip(strips[:, 0], mask_ELR, strict=True)):
        axis.pcolormesh(edges, range(depth + 1), mask_LR, vmin=0, vmax=1, cmap="cividis", rasterized=True)
        changed = int((mask_LR[:, 1:] != mask_LR[:, :-1]).sum())
        axis.set(ylim=(depth, 0), yticks=[0, depth], title=f"Layers of expert {e} ({mask_LR[:, -1].sum()} at the end)")
        texts.append(f"Expert {e} keeps {mask_LR[:, 0].sum()} layers at step {steps[0]}, {mask_LR[:, -1].sum()} at "
                     f"{steps[-1]}, with {changed} changes of a layer between.")
    strips[-1, 0].set_xlabel("step")
    return _described(figure, *texts)


@_styled
def routing_figure(history: list[dict[str, Any]], experts: TemporalExperts) -> Figure:
    """Which timesteps each expert served in the course of the search: a strip an expert, in a hundred bins."""
    number, timesteps = len(experts.mask_EL), len(experts.expert_T)
    (steps, edges), expert_TR = _steps(history), np.stack([record["expert_T"] for record in history], axis=1)
    figure, strips = _figure(0.6 + 0.8 * number, number, sharex=True, squeeze=False)
    texts = []
    for e, axis in enumerate(strips[:, 0]):
        share_BR = np.stack([part.mean(axis=0) for part in np.array_split(expert_TR == e, min(100, timesteps))])
        borders = np.linspace(0, timesteps, len(share_BR) + 1)
        axis.pcolormesh(edges, borders, share_BR, vmin=0, vmax=1, cmap="cividis", rasterized=True)
        first, last = ((expert_TR[:, r] == e).mean() for r in (0, -1))
        axis.set(yticks=[0, timesteps], title=f"Timesteps of expert {e} ({last:.0%} at the end)")
        texts.append(f"Expert {e} serves {first:.0%} of the timesteps at step {steps[0]}, {last:.0%} at {steps[-1]}.")
    strips[-1, 0].set_xlabel("step")
    return _described(figure, *texts)


@_styled
def losses_figure(lines: list[dict[str, Any]]) -> Figure:
    """Losses of both updates over the run, from lines of metrics.jsonl, which have some; the search is shaded."""
    names = [name for name in LOSSES if any({f"search/{name}", f"train/{name}"} & line.keys() for line in lines)]
    figure, axes = _figure(0.7 + 1.25 * len(names), len(names), sharex=True, squeeze=False)
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
    return _described(figure, *texts)


@_styled
def sensitivity_figure(table: Sensitivity) -> Figure:
    """What skipping each layer alone costs at each timestep."""
    relative_LB, bins = table.relative_LB, [f"{low}-{high - 1}" for low, high in pairwise(table.edges)]
    figure, axis = _figure(1.9 + _ROW * len(relative_LB), width=max(_WIDTH, 1.5 + 0.2 * len(bins)))
    high = max(relative_LB.max(), 1e-9)
    low = min(max(relative_LB.min(), high / 1e4), high / 1.01)
    mesh = _draw_rows(axis, table.sites, relative_LB.clip(low), norm=LogNorm(low, high), rasterized=True)
    axis.set_xticks(np.arange(len(bins)) + 0.5, bins, rotation=90, fontsize=7.5)
    axis.set(xlabel="timesteps", title="Effect of skipping one layer")
    figure.colorbar(mesh, location="bottom", label="in units of the dense model's error there", aspect=30,
                    pad=0.02, ticks=np.geomspace(low, high, 4), format="{x:.2g}").minorticks_off()
    names = dict(zip(*layers(table.sites), strict=True))
    worst, where = np.unravel_index(relative_LB.argmax(), relative_LB.shape)
    return _described(figure, f"Skipping {names[int(worst)]} at timesteps {bins[where]} changes the output most, by "
                              f"{high:.2g} of the dense model's error there.")


@_styled
def samples_figure(rows: dict[str, Tensor], labels: list[str]) -> Figure:
    """A row of images [N, C, S, S] in [-1, 1] a model; the same seed, and the label below, in each column."""
    wide = max(map(len, labels)) > 12
    width, height = (1.5, 1.5) if wide else (0.9, 1.0)
    figure = Figure((len(labels) * width + 0.3, len(rows) * height + (0.9 if wide else 0.3)), layout="constrained")
    axes = figure.subplots(len(rows), len(labels), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow((image.permute(1, 2, 0).numpy().squeeze() + 1).clip(0, 2) / 2, cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(True)
        line[0].set_ylabel(name)
    for axis, label in zip(axes[-1], labels, strict=True):
        axis.set_xlabel(textwrap.fill(label, 18))
    return _described(figure, f"Images of {', '.join(labels)}; a row each: {', '.join(rows)}.")


@_styled
def _quality_figure(rows: list[dict[str, Any]]) -> Figure:
    """A column a keep ratio; a point a variant, with the standard deviation over its seeds."""
    experts = [row for row in rows if row["variant"] != "dense"]
    variants, keeps = sorted({row["variant"] for row in experts}), sorted({row["keep_ratio_target"] for row in experts})
    figure = Figure((2 * _WIDTH, 6), layout="constrained")
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


@_styled
def plot_experts(experts: TemporalExperts, path: Path) -> None:
    """experts.png: mask of every expert, expert of every timestep, MACs over timesteps."""
    figure = Figure((8, max(4.2, 1.3 + _ROW * len(experts.sites))), layout="constrained")
    halves: Any = figure.subfigures(1, 2)
    above, below = halves[1].subfigures(2, 1)
    for draw, into in ((masks_figure, halves[0]), (routes_figure, above), (macs_figure, below)):
        draw(experts, into)
    figure.savefig(path, dpi=110)


def plot_sensitivity(table: Sensitivity, path: Path) -> None:
    """sensitivity.png."""
    sensitivity_figure(table).savefig(path, dpi=110)


def plot_quality(rows: list[dict[str, Any]], path: Path) -> None:
    """An ablation's rows (see `scripts/ablate.py`): output error and Fréchet distance against measured time."""
    _quality_figure(rows).savefig(path, facecolor="white", dpi=160)


def plot_samples(rows: dict[str, Tensor], labels: list[str], path: Path) -> None:
    """samples.png."""
    samples_figure(rows, labels).savefig(path, dpi=110)


def summary_table(summary: dict[str, Any]) -> str:
    """The summary as two columns."""
    width = max(map(len, summary))
    return "\n".join(f"{name:{width}}  {readable(value)}" for name, value in summary.items())


def readable(value: Any) -> str:
    """A number, a list of them, or anything else, as text."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2e}"
    if isinstance(value, list):
        return " ".join(map(readable, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _figure(height: float, rows: int = 1, width: float = _WIDTH, into: Any = None, **grid: Any) -> tuple[Any, Any]:
    figure = into or Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, 1, **grid)


def _described(figure: Figure, *sentences: str) -> Figure:
    figure.set_label(" ".join(sentences))
    return figure


def _steps(history: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """The records' steps, and the edges of the cells in which each holds until the next."""
    steps = [record["step"] for record in history]
    return steps, [*steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1]


def _name_rows(axis: Axes, names: list[str]) -> None:
    """Row l, from l to l + 1, is layer l; a line under the last layer of the down and of the mid part."""
    axis.set_yticks(np.arange(len(names)) + 0.5, names)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(names), 0)
    for row, (before, after) in enumerate(pairwise(names), 1):
        if before.partition(" ")[0] != after.partition(" ")[0]:
            axis.axhline(row, -0.5, color=INK, linewidth=1, clip_on=False).set_in_layout(False)


def _draw_rows(axis: Axes, sites: tuple[str, ...], values_LX: np.ndarray, edges: Any = None, **how: Any) -> Any:
    order, names = layers(sites)
    edges = range(values_LX.shape[1] + 1) if edges is None else edges
    mesh = axis.pcolormesh(edges, range(len(names) + 1), values_LX[order], cmap="cividis", **how)
    _name_rows(axis, names)
    return mesh


def _colorbar(figure: Figure, axis: Axes, mesh: Any, label: str) -> None:
    figure.colorbar(mesh, ax=axis, location="bottom", aspect=30, pad=0.02, label=label,
                    format=lambda x, _: f"{100 * x:g}%")
