"""Pictures and tables of a finished run."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)
from torch import Tensor  # noqa: E402

from .experts import TemporalExperts  # noqa: E402


def plot_experts(experts: TemporalExperts, path: Path) -> None:
    """experts.png: mask of every expert, expert of every timestep, MACs over timesteps."""
    count, sites = experts.mask_EL.shape
    figure, (masks, routes, macs) = plt.subplots(
        3, 1, figsize=(max(7.0, 0.32 * sites + 2), 3.2 + 0.35 * count + 3.5), layout="constrained",
        height_ratios=[0.6 + 0.35 * count, 1.6, 1.6],
    )
    masks.imshow(experts.mask_EL, cmap="Blues", vmin=-0.25, vmax=1.25, aspect="auto")
    masks.set_title(f"Sites that each expert runs (dark): {experts.keep_ratio:.1%} of all MACs kept")
    masks.set_ylabel("expert")
    masks.set_yticks(range(count), [f"{e}" + ("" if e in experts.used else " unused") for e in range(count)])
    masks.set_xticks(range(sites), experts.sites, rotation=90, fontsize=6)
    routes.step(range(len(experts.expert_T)), experts.expert_T, where="mid", color="tab:blue")
    routes.set(ylabel="expert", yticks=range(count), title="Expert of each training timestep", xlabel="timestep")
    macs.plot(experts.macs_T / experts.macs_total, color="tab:blue")
    macs.axhline(experts.keep_ratio, color="tab:orange", linestyle="--", label=f"mean {experts.keep_ratio:.3f}")
    macs.set(ylim=(0, 1.05), ylabel="share of MACs", xlabel="timestep", title="MACs of a step, dense = 1")
    macs.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_samples(rows: dict[str, Tensor], labels: list[str], path: Path) -> None:
    """A row of images [N, C, S, S] in [-1, 1] a model; the same seed, and the label below, in each column."""
    wide = max(map(len, labels)) > 12
    width, height = (1.5, 1.5) if wide else (0.9, 1.0)
    figure, axes = plt.subplots(len(rows), len(labels), squeeze=False, layout="constrained",
                                figsize=(len(labels) * width + 0.3, len(rows) * height + (0.9 if wide else 0.3)))
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            pixels = (image.permute(1, 2, 0).numpy() + 1) / 2
            axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=8)
    for axis, label in zip(axes[-1], labels, strict=True):
        axis.set_xlabel(textwrap.fill(label, 18), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def summary_table(summary: dict[str, Any]) -> str:
    """The summary as two columns."""
    width = max(map(len, summary))
    return "\n".join(f"{name:{width}}  {_readable(value)}" for name, value in summary.items())


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2e}"
    return f"{value:,}" if isinstance(value, int) else str(value)
