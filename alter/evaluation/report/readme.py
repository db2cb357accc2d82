"""README's pictures: samples with their cost, and the map from timestep to expert to layers, on light and on dark."""

import statistics
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from ...backbones.dit import null_class
from ...backbones.sampling import sample_latents
from ...backbones.schedules import load_scheduler, make_solver
from ...common.errors import InputError
from ...experts.artefact import TemporalExperts
from ...experts.ladder import Rung
from .drawing import INK, described, layers, styled
from .experts import colours
from .runs import Run
from .samples import show
from .words import duration, macs, quality

_WIDTH = 8.4  # inches: README's column
_INKS = {"light": "#1f2328", "dark": "#e6edf3"}  # GitHub's text colours


@dataclass(frozen=True)
class Row:
    """Images [N, C, S, S] in [-1, 1] of one model, and the line under them."""

    images: Tensor
    text: str


def sample_rows(run: Run, conditions: list[Any]) -> list[Row]:
    """Images of these prompts or classes: dense in 50 steps, dense and experts in the run's number of steps.

    Each image is drawn and timed alone, on this machine, with the models in turn; the seconds are medians.
    """
    if run.config is None:
        raise InputError(f"--run {run.folder}: has no config.yaml: name a finished run")
    before = Path(str(run.config.backbone.pretrained))
    if not before.is_dir():
        raise InputError(f"--run {run.folder}: the dense model {before} is no folder here: start in the folder in "
                         "which the run was started")
    steps, guidance = run.config.evaluate.sampling_steps, run.config.evaluate.guidance_scale
    dense, tuned = _Model(before, run, guidance), _Model(run.final, run, guidance)
    run.experts.apply(tuned.target)
    kinds = (("dense_50", dense, 50), ("dense", dense, steps), ("experts", tuned, steps))
    images: dict[str, list[Tensor]] = {name: [] for name, _, _ in kinds}
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in kinds}
    for _, model, _ in kinds:
        model.draw(conditions[0], 1, 0)  # the first call of a model is slower
    for seed, condition in enumerate(conditions):
        for name, model, count in kinds:
            started = time.perf_counter()
            images[name].append(model.draw(condition, count, seed))
            seconds[name].append(time.perf_counter() - started)
    slowest, rows = statistics.median(seconds["dense_50"]), []
    for name, model, count in kinds:
        taken = statistics.median(seconds[name])
        parts = [f"{name.removesuffix('_50')}, {count} steps",
                 f"{macs(run.macs_per_image(count, dense=model is dense))} and {duration(taken)} per image"]
        if name != "dense_50":
            parts[-1] += f" ({slowest / taken:.1f}× as fast)"
        rows.append(Row(torch.stack(images[name]), " · ".join([*parts, *filter(None, [quality(run.summary, name)])])))
    return rows


def strip_rows(run: Run, conditions: list[Any], keep_ratios: Sequence[float]) -> list[Row]:
    """Images of these prompts or classes at several rungs of a ladder, from the same seeds; at 1 of every layer."""
    assert run.config is not None
    steps, rows = run.config.evaluate.sampling_steps, []
    model = _Model(run.final, run, run.config.evaluate.guidance_scale)
    with run.experts.apply(model.target):
        for keep_ratio in keep_ratios:
            asked: Any = keep_ratio
            if keep_ratio == 1:
                full = int(run.experts.mask_EL.all(axis=1).argmax())
                asked = Rung(1.0, np.full(len(run.experts.expert_T), full))
            with run.experts.at(asked) as rung:
                images = [model.draw(condition, steps, seed) for seed, condition in enumerate(conditions)]
            rows.append(Row(torch.stack(images), f"{run.experts.only(rung).keep_ratio:.0%} of the MACs"))
    return rows


class _Model:
    """A saved pipeline, or a class-conditioned backbone without an autoencoder."""

    def __init__(self, folder: Path, run: Run, guidance: float) -> None:
        self.guidance = guidance
        self.scheduler = make_solver(load_scheduler(run.final), run.tokens)
        if (folder / "vae").is_dir():
            self.target: Any = DiffusionPipeline.from_pretrained(folder)
            self.target.scheduler = self.scheduler
            self.target.set_progress_bar_config(disable=True)
        else:
            self.target = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer").eval()

    def draw(self, condition: Any, steps: int, seed: int) -> Tensor:
        """One image [C, S, S] in [-1, 1]."""
        if isinstance(self.target, DiTTransformer2DModel):
            config, label = self.target.config, torch.tensor([condition])
            nothing = torch.full_like(label, null_class(self.target))
            latents = sample_latents(
                self.target, self.scheduler, (config.in_channels, config.sample_size, config.sample_size),
                {"class_labels": label}, {"class_labels": nothing}, steps, seed, self.guidance)
            return latents[0].clamp(-1, 1)
        (image,) = self.target([condition], num_inference_steps=steps, guidance_scale=self.guidance,
                               generator=torch.Generator().manual_seed(seed), output_type="pt").images
        return image.cpu().float() * 2 - 1


@styled
def rows_figure(rows: list[Row], titles: list[str]) -> Figure:
    """The images of each row side by side, the row's line below them."""
    side = _WIDTH / len(titles)
    titles = [textwrap.fill(title, int(13 * side)) for title in titles]
    above, below = 0.16 * max(title.count("\n") + 1 for title in titles) + 0.06, 0.3
    heights = [above + side + below, *[side + below] * (len(rows) - 1)]
    figure = Figure((_WIDTH, sum(heights)))
    parts: Any = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)
    for part, row, height in zip(parts[:, 0], rows, heights, strict=True):
        axes = part.subplots(1, len(titles), gridspec_kw={
            "left": 0, "right": 1, "wspace": 0.06, "bottom": below / height, "top": (side + below) / height})
        for axis, image, title in zip(np.atleast_1d(axes), row.images, titles, strict=True):
            show(axis, image)
            axis.spines[:].set(edgecolor="#808080", linewidth=0.4)
            if row is rows[0]:
                axis.set_title(title, fontsize=8.5, loc="center", pad=3)
        part.text(0.002, (below - 0.02) / height, row.text, va="top", fontsize=10)
    return described(figure, f"Images of {', '.join(titles)}. Rows: {'; '.join(row.text for row in rows)}.")


@styled
def map_figure(experts: TemporalExperts, timesteps: list[int]) -> Figure:
    """Expert and layers of each denoising step, from noise (left) to the image; skipped layers are pale."""
    order, names = layers(experts.sites)
    expert_S, keeps_LS = experts.expert_T[timesteps], experts.mask_EL[experts.expert_T[timesteps]].T[order]
    high = min(0.2, 3.6 / len(names))
    figure = Figure((_WIDTH, 1.5 + high * len(names)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[0.28, high * len(names)])
    for s, expert in enumerate(expert_S):
        colour = colours(experts)[expert]
        above.bar(s, 1, 0.9, color=colour)
        above.text(s, 0.5, str(expert), ha="center", va="center", color="white", fontsize=9, fontweight="bold")
        for row, keeps in enumerate(keeps_LS[:, s]):
            below.bar(s, 0.86, 0.9, row + 0.07, color=colour if keeps else "#80808030")
    above.set(ylim=(0, 1), yticks=[0.5], yticklabels=["expert"])
    share = experts.macs_T[timesteps].mean() / experts.macs_total
    above.set_title(f"{len(timesteps)} denoising steps. Each has an expert; each expert skips layers (grey). "
                    f"{share:.0%} of the dense MACs", fontsize=10)
    every = 1 if len(names) <= 20 else 2
    below.set_yticks(np.arange(0, len(names), every) + 0.5, names[::every], fontsize=8 if every == 1 else 7)
    below.set(ylim=(len(names), 0), xlim=(-0.6, len(timesteps) - 0.4))
    below.set_xticks(range(len(timesteps)), [str(t) for t in timesteps], fontsize=7.5)
    below.set_xlabel("training timestep of each step, from noise (left) to image (right)")
    for axis in (above, below):
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    return described(figure, f"The experts of {len(timesteps)} denoising steps, in order: "
                             f"{' '.join(map(str, expert_S))}.")


def draw_map(run: Run) -> Figure:
    """The map of the run's sampler."""
    steps = run.config.evaluate.sampling_steps if run.config else 20
    return map_figure(run.experts, run.visited(run.sampler, steps))


def save_in_both(figure: Figure, folder: Path, name: str) -> list[Path]:
    """NAME-light.png and NAME-dark.png, with transparent ground and the text in a colour that suits it."""
    files = []
    texts = [text for text in figure.findobj(Text) if text.get_color() == INK]
    for scheme, ink in _INKS.items():
        for text in texts:
            text.set_color(ink)
        files.append(folder / f"{name}-{scheme}.png")
        figure.savefig(files[-1], dpi=200, transparent=True)
    return files
