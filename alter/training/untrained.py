"""Experts without training: a model's own images serve as data, and what is lost is drawn beside fewer steps."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..backbones.family import family_of
from ..backbones.inputs import is_class_conditional
from ..backbones.noising import Flow
from ..backbones.schedules import as_rows, hands_sigmas, make_solver, visited_timesteps
from ..common.config import Config
from ..common.errors import InputError
from ..data.drawn import Drawn
from ..evaluation.pairs import Estimate, drift, drifts, psnr
from ..experts.artefact import TemporalExperts
from ..method.budget import TOLERANCE
from ..method.measured import EARLY_FORWARDS, EARLY_SAMPLES
from ..method.measured import forwards as measured_forwards
from .probe import check_blocks
from .search.elastic import allocated, costs, ordered
from .search.measuring import sampler_of, views_of
from .setup.parts import Parts


@dataclass(frozen=True)
class Lost:
    """What a cheaper way to draw does to the dense model's images of the same seeds.

    Attributes:
        macs: of a whole drawing, as a share of the dense one's.
        latents, pixels: drifts (evaluation/pairs.py); pixels None where latents are no picture.
        psnr: in dB, mean over the pairs that differ; inf where none does. predicted: the drift of latents that measured
            errors foretell; None of the dense model.
    """

    name: str
    macs: float
    latents: Estimate
    pixels: Estimate | None
    psnr: float | None
    predicted: float | None


def find_untrained(config: Config, parts: Parts, conditions: Sequence[str] | Sequence[int], keeps: Sequence[float],
                   batch_size: int) -> tuple[TemporalExperts, list[Lost]]:
    """Experts of a pretrained model as it is, for every budget, and what they lose at `keeps`.

    Args:
        parts: with frozen weights. Where its source is `Drawn`, it gets the images that are drawn here.
        conditions: prompts or classes of the images. keeps: the first is chosen; those that are too low are left out.

    Raises:
        InputError: if no budget can be reached, or a layer cannot be skipped.
    """
    views_of(config, parts)  # refuses weights that cannot be read, before anything takes long
    steps, seed = config.evaluate.sampling_steps, config.seed
    batch: dict[str, Any] = {"captions": list(conditions)}
    if is_class_conditional(parts.backbone):
        batch = {"labels": torch.tensor(conditions, device=parts.backbone.device)}
    with parts.dense() as backbone:
        dense = parts.drawn(backbone, batch, steps, seed, batch_size)
    share_T = _visited(parts, steps, "captions" in batch)
    if isinstance(parts.source, Drawn):
        parts.source.latents = dense[1]
    check_blocks(config, parts)
    chains = ordered(config, parts, batch_size)
    keeps = _reachable(float(costs(parts, chains.mask_ML).min()), keeps)
    experts = allocated(config, parts, chains, keeps, tuned=False, batch_size=batch_size)
    lost = []
    for keep in keeps:
        chosen = experts.choose(keep)
        with chosen.serving(parts.simulator):
            drawn = parts.drawn(parts.backbone, batch, steps, seed, batch_size)
        macs = _share(parts, chosen, share_T)
        assert experts.measured is not None
        error = experts.measured.moved(chosen.rung.expert_T, "latents")
        lost.append(_compared(parts, f"keep {keep:g}", macs, drawn, dense, error))
        fewer = max(1, round(macs * steps))
        with parts.dense() as backbone:
            drawn = parts.drawn(backbone, batch, fewer, seed, batch_size)
        lost.append(_compared(parts, f"dense at {fewer} steps", fewer / steps, drawn, dense))
    return experts, lost


def check(config: Config, parts: Parts, keeps: Sequence[float]) -> list[float]:
    """The keep ratios that some mask of the search may reach; the others are named.

    Raises:
        InputError: if none is, or the backbone takes no experts.
    """
    budget, unknown = parts.budget, family_of(parts.backbone).unknown
    if unknown:
        raise InputError(f"backbone.pretrained={config.backbone.pretrained!r}: its {type(parts.backbone).__name__} "
                         f"takes no experts: {unknown}")
    return _reachable(budget.fixed + max(config.search.least * float(budget.share_L.sum()), float(budget.share_L.min())
                                         ) / budget.scale, keeps)


def _reachable(least: float, keeps: Sequence[float]) -> list[float]:
    said = f"{least:.3f} of this backbone's cost remains at least (search.least)"
    found = [keep for keep in keeps if keep + TOLERANCE >= least]
    if not found:
        raise InputError(f"--keep {' '.join(f'{keep:g}' for keep in keeps)}: {said}: choose more")
    for keep in set(keeps) - set(found):
        tqdm.write(f"keep {keep:g} is left out: {said}", file=sys.stderr)
    return found


def conditions_of(parts: Parts, count: int) -> list[str] | list[int]:
    """Prompts or classes of the first samples of a data set.

    Raises:
        InputError: if it holds encoded text instead.
    """
    samples = [parts.source[0, i] for i in range(min(count, len(parts.source)))]
    name = "labels" if is_class_conditional(parts.backbone) else "captions"
    if name not in samples[0]:
        raise InputError("--prompts: the data hold encoded text, of which no images can be drawn: name a file of "
                         "prompts")
    return [sample[name] for sample in samples]


def forwards(config: Config, parts: Parts, images: int, keeps: Sequence[float]) -> dict[str, int]:
    """About how many forwards of one sample each part of `find_untrained` takes, by what it is for."""
    layers, search, steps = len(parts.cost.sites), config.search, len(sampler_of(config, parts)().timesteps)
    counted = measured_forwards(layers, search.least, search.samples, search.bins, steps, parts.free_guidance != 1,
                                config.experts.count)
    drawing = config.evaluate.sampling_steps * (1 if parts.free_guidance == 1 else 2)
    return {
        f"draw {images} images": images * drawing,
        f"order {layers} layers": counted.order + EARLY_FORWARDS * min(search.samples, EARLY_SAMPLES),
        "measure errors": counted.errors // 2,  # once, without a training after which they are measured again
        "measure the response": counted.response,
        f"compare {len(keeps)} rungs": round(2 * sum(keeps) * images * drawing),
    }


def as_text(lost: Sequence[Lost]) -> str:
    """A table for the terminal, a line for each way to draw."""
    def shown(estimate: Estimate | None) -> str:
        return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})" if estimate else ""

    columns = {
        "": [one.name for one in lost],
        "MACs": [f"{one.macs:.1%}" for one in lost],
        "drift in pixels": [shown(one.pixels) for one in lost],
        "drift in latents": [shown(one.latents) for one in lost],
        "predicted": ["" if one.predicted is None else f"{one.predicted:.3f}" for one in lost],
        "PSNR": ["" if one.psnr is None else f"{one.psnr:.1f} dB" for one in lost],
    }
    told = [[head, *cells] for head, cells in columns.items() if any(cells)]
    widths = [max(map(len, column)) for column in told]
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in zip(*told, strict=True))


def verdict(lost: Sequence[Lost]) -> str:
    """In words, of the first pair: experts, and the dense model with fewer steps."""
    ours, control = lost[:2]
    low, high = sorted((ours.latents, control.latents), key=lambda estimate: estimate.value)
    wins = ours.latents.value < control.latents.value
    better, apart = "less than" if wins else "no less than", "" if wins else ": draw fewer steps, or train experts"
    if low.high >= high.low:
        apart = ", which these images cannot tell apart"
    return (f"{ours.name}, without training: latents drift by {ours.latents.value:.3f}, {better} {control.name} "
            f"({control.latents.value:.3f}){apart}")


def _visited(parts: Parts, steps: int, captions: bool) -> np.ndarray:
    """The training timesteps of each step of a drawing, int64 [steps]; those of another backbone are -1.

    captions: whether a pipeline draws, of a flow by its own scheduler."""
    own, scheduler = captions and isinstance(parts.noising, Flow), parts.scheduler
    if own and parts.conditioner is not None:
        timesteps = np.asarray(parts.conditioner.pipe.scheduler.timesteps.cpu(), dtype=np.float64)
    else:
        solver = type(scheduler).from_config(scheduler.config) if own else make_solver(scheduler, parts.tokens)
        timesteps = visited_timesteps(solver, steps, parts.tokens, own and hands_sigmas(parts.folder))
    rows = as_rows(timesteps, parts.scheduler)
    if isinstance(parts.noising, Flow):
        rows[~parts.noising.serves(torch.from_numpy(timesteps)).numpy()] = -1
    return rows


def _share(parts: Parts, experts: TemporalExperts, rows: np.ndarray) -> float:
    """MACs of a drawing that visits `rows`, as a share of the dense one's."""
    return float(np.where(rows < 0, 1.0, experts.macs_T[rows] / experts.macs_total).mean())


def _compared(parts: Parts, name: str, macs: float, drawn: tuple[Tensor, Tensor], dense: tuple[Tensor, Tensor],
              error: float | None = None) -> Lost:
    (images, latents), (images_before, latents_before) = drawn, dense
    predicted = None
    if error is not None:  # mean squared displacement of an element
        predicted = error * latents[0].numel() / float(drifts(latents, latents_before)[1].mean())
    if not parts.has_pictures:
        return Lost(name, macs, drift(latents, latents_before), None, None, predicted)
    each = psnr(images, images_before)
    differ = each.isfinite()
    return Lost(name, macs, drift(latents, latents_before), drift(images, images_before),
                float(each[differ].mean()) if differ.any() else float("inf"), predicted)
