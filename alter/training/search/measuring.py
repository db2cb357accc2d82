"""What the elastic search measures: the order of the layers, errors of masks, and the response of samples."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from ...backbones.family import predict
from ...backbones.noising import Flow, Noising, edges_of
from ...backbones.pretrained import load_vae
from ...backbones.schedules import as_rows, hands_sigmas, make_sampler, make_solver, set_timesteps
from ...common.config import Config
from ...common.errors import InputError
from ...evaluation.networks import ClipVision, embedded
from ...method.budget import Budget
from ...method.measured import CANDIDATES, EARLY_BINS, RESPONSE_SAMPLES, WINDOWS, Measured
from ..probe import Probe, View
from ..setup.noise import response_sampler
from ..setup.parts import Parts


def order_layers(probe: Probe, budget: Budget, least: float, weight_T: np.ndarray, low: int = 0,
                 high: int | None = None) -> np.ndarray:
    """Nested masks, the dense model's first: each skips one layer more, the one that costs least per share of the cost.

    Greedy removal on the dense model: the layer goes whose removal adds least to the mean squared change of the output,
    in proportion to its cost. After each removal those are measured again that added least when they were measured
    last, CANDIDATES of them.

    Args:
        least: share of the prunable cost that remains at least. weight_T: of errors, float64 [T].
        low, high: timesteps low..high-1 count; None: up to the last.

    Returns: bool [M, L].
    """
    share_L = budget.share_L / budget.share_L.sum()
    mask_L = np.ones(len(share_L), dtype=bool)
    masks, error, added_L = [mask_L], 0.0, np.zeros(len(share_L))
    bar = tqdm(total=len(share_L), unit="layer", desc="order of the layers", dynamic_ncols=True,
               disable=not PartialState().is_main_process)
    while True:
        candidates = np.flatnonzero(mask_L & (share_L[mask_L].sum() - share_L >= least - 1e-9))
        if not len(candidates) or mask_L.sum() == 1:
            bar.close()
            return np.array(masks)
        if len(masks) > 1:
            candidates = candidates[np.argsort(added_L[candidates], kind="stable")[:CANDIDATES]]
        tried = np.repeat(mask_L[None], len(candidates), axis=0)
        tried[np.arange(len(candidates)), candidates] = False
        errors, _ = probe.errors(tried, low, len(weight_T) if high is None else high, weight_T)
        added_L[candidates] = (errors - error) / share_L[candidates]
        best = int(added_L[candidates].argmin())
        mask_L, error = tried[best], float(errors[best])
        masks.append(mask_L)
        bar.update()


def early_response(probe: Probe, layers: int, bins: int = EARLY_BINS) -> np.ndarray:
    """The response of the dense model's samples to errors in equal bins, as a weight of timesteps, float64 [T]."""
    mask_L = np.arange(layers) % 4 != 1 if layers > 2 else np.arange(layers) != 1
    edges = edges_of(probe.parts.noising, bins)
    return np.repeat(probe.amplification(mask_L[None], edges), np.diff(edges))


def measure_response(config: Config, parts: Parts, probe: Probe, masks: tuple[np.ndarray, np.ndarray],
                     edges: np.ndarray, error_B: np.ndarray, views: dict[str, View]) -> tuple[
                         dict[str, np.ndarray], str, int]:
    """How far samples move, squared, for a unit of error of the output in each bin, by the sampler that will be used.

    With masks in force at all steps of the sampler samples move by ‖d‖², at all but those of a window (some consecutive
    steps, all windows as long) by ‖d₋w‖². The window's share is ‖d‖² - ‖d₋w‖²: what errors do there depends on the
    errors elsewhere, which point the same way, and which no dense step repairs. ‖d_w‖², of masks in the window alone,
    is the lower bound. The share is divided by the change of the output there and interpolated to the bins. All is then
    scaled so that `error_B` gives the displacement that the masks cause at all steps.

    Args:
        masks: bool [M, L], and which of them is in force at each training timestep, int64 [T].
        edges: bin b, for about as many steps as any, holds the training timesteps from edges[b] up to edges[b+1].
        error_B: of the masks, float64 [B].

    Returns: float64 [B] for each view, the sampler's name and its steps.
    """
    prepare = sampler_of(config, parts)
    solver = prepare()
    visited = visited_by(solver, parts)
    steps = len(visited)
    length = -(-steps // WINDOWS)
    firsts = np.unique(np.linspace(0, steps - length, min(WINDOWS, steps)).round().astype(int)).tolist()
    windows = [range(first, first + length) for first in firsts]
    mask_ML, mask_T = masks
    mask_NL = mask_ML[mask_T[visited.astype(int)]]
    without = [[step for step in range(steps) if step not in window] for window in windows]
    moved, caused = probe.displacement(mask_NL[None], [*windows, range(steps)], prepare, parts.free_guidance, views,
                                       without)
    middle_W = np.array([visited[window.start : window.stop].mean() for window in windows])[::-1]
    middle_B = (edges[:-1] + edges[1:] - 1) / 2
    response = {}
    for name, value in moved.items():
        alone_W, whole, without_W = np.split(value, [len(windows), len(windows) + 1])
        share_W = np.maximum(whole - without_W, alone_W)
        each_W = np.divide(share_W, caused[:-1], out=np.zeros(len(windows)), where=caused[:-1] > 0)[::-1]
        response_B = np.interp(middle_B, middle_W, each_W)
        total = float(response_B @ error_B)
        response[name] = response_B * (whole[0] / total if total > 0 else 1.0)
    return response, type(solver).__name__, steps


def sampler_of(config: Config, parts: Parts) -> Callable[[], Any]:
    """Makes the sampler that the run is for, with its steps set: `budget.sampler`; for flow matching, unless it is
    `uniform`, the pipeline's own; else `make_solver`'s, in `evaluate.sampling_steps` steps. For one of two backbones it
    is `make_solver`'s, since others cannot begin within their steps.

    Raises:
        InputError: if it visits no timestep of the component that is trained.
    """
    budget, scheduler, flow = config.budget, parts.scheduler, isinstance(parts.noising, Flow)
    solvers, steps = response_sampler(config, flow)
    even = flow and hands_sigmas(parts.folder)
    part = parts.noising if isinstance(parts.noising, Flow) and parts.noising.within is not None else None
    if not flow:  # a learned variance is not handed on
        scheduler = type(scheduler).from_config(scheduler.config, variance_type="fixed_small")

    def prepare() -> Any:
        if solvers or part:
            sampler = make_solver(scheduler, parts.tokens)
        elif budget.sampler is None:
            sampler = type(scheduler).from_config(scheduler.config)
        else:
            sampler = make_sampler(budget.sampler, "budget.sampler=", scheduler, parts.tokens)
        set_timesteps(sampler, steps, parts.tokens, even)
        if part:  # the steps of this one of two backbones
            own = part.serves(sampler.timesteps).nonzero()[:, 0]
            if not len(own):
                key = "evaluate" if solvers else "budget"
                raise InputError(f"{key}.sampling_steps={steps}: visits no timestep of {parts.component}, which is "
                                 "trained: set more steps")
            sampler.set_begin_index(int(own[0]))
            sampler.timesteps = sampler.timesteps[own]
        return sampler

    prepare()
    return prepare


def visited_by(sampler: Any, parts: Parts) -> np.ndarray:
    """The training timesteps of the steps that are set, int64 [steps]."""
    return as_rows(np.asarray(sampler.timesteps, dtype=np.float64), parts.scheduler)


def views_of(config: Config, parts: Parts) -> dict[str, View]:
    """What of final latents is compared: the latents; the dense model's `residuals`, where it knows such noise; where
    the VAE is at hand and decodes them, the pixels; and the features of `search.features`.

    Raises:
        InputError: if that network cannot be loaded.
    """
    views: dict[str, View] = {"latents": lambda latents, *_: latents}
    if (row := _half_noise(parts.noising)) is not None:
        views["residuals"] = partial(residuals, parts, row)
    decoded = type(parts.vae).__name__ == "AutoencoderKL" and len(parts.latent_shape) == 3
    asked = config.search.features
    has_vae = decoded or asked is not None and (parts.folder / "vae").is_dir()
    vae = parts.vae
    if has_vae and (vae is None or vae.dtype != torch.float32):
        vae = load_vae(parts.folder, parts.backbone.device, torch.float32)
    last: list[Tensor] = []  # latents and their images, which two views look at in turn

    def images(latents: Tensor, *_: Any) -> Tensor:
        if not last or last[0] is not latents:
            last[:] = latents, parts.images(latents, vae)
        return last[1]

    if decoded:
        views["pixels"] = images
    if asked is not None:
        network = ClipVision(Path(asked), "search.features=").to(parts.backbone.device)
        views["features"] = lambda latents, *_: embedded(network, images(latents))
    return views


def _half_noise(noising: Noising) -> Tensor | None:
    """The trained row at which signal and noise are most alike. None where one is more than e² times the other, and of
    the high-noise part of two backbones, whose samples stay noisy."""
    rows = noising.trained
    away = noising.log_snr(noising.at(rows)).abs()
    noisy = isinstance(noising, Flow) and noising.within is not None and noising.within[0] > 0
    return None if noisy or away.min() > 4 else rows[away.argmin()]


@torch.no_grad()
def residuals(parts: Parts, row: Tensor, latents: Tensor, noise: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
    """The dense model's error in denoising clean latents [B, ...] that are noised to a row: output minus target, of
    their shape. It is proportional to the latents minus what they are denoised to, so that it hardly changes while
    samples move to others that the model could have drawn."""
    timesteps = parts.noising.at(row.expand(len(latents))).to(latents.device)
    arithmetic = torch.autocast(latents.device.type, parts.precision, parts.precision != torch.float32)
    with parts.dense() as teacher, arithmetic:
        output = predict(teacher, parts.noising.noised(latents, noise, timesteps), timesteps, conditioning)
    return output[:, : latents.shape[1]].float() - parts.noising.target(latents, noise, timesteps)


def measured_family(config: Config, parts: Parts, mask_ML: np.ndarray, edges: np.ndarray, near_T: np.ndarray,
                    batch_size: int = 16, shared: bool = False) -> tuple[Measured, np.ndarray, np.ndarray]:
    """Errors of masks bool [M, L] against the teacher, and the response with mask near_T[t] at timestep t; the errors
    of each sample, float64 [M, B, S], and its image, int64 [S], beside. shared: as of `Probe`."""
    probe = Probe(config, parts, config.search.samples, batch_size, shared)
    error_MBS = probe.against_teacher(mask_ML, edges)
    error_MB = error_MBS.mean(axis=2)
    fewer = Probe(config, parts, min(config.search.samples, RESPONSE_SAMPLES), batch_size, shared)
    # Displacements are those from the backbone's own full depth, which is not the teacher any more.
    own_B = np.array([probe.errors(mask_ML[near_T[low]][None], int(low), int(high))[0][0]
                      for low, high in pairwise(edges)])
    response, sampler, steps = measure_response(config, parts, fewer, (mask_ML, near_T), edges, own_B,
                                                views_of(config, parts))
    return Measured(tuple(map(int, edges)), error_MB, response, sampler, steps, config.evaluate.guidance_scale,
                    config.search.samples), error_MBS, probe.image_S
