"""What the elastic search measures: the order of the layers, errors of masks, and the response of samples."""

from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from ...backbones.schedules import as_rows, make_sampler, make_solver, set_timesteps
from ...common.config import Config
from ...method.budget import Budget
from ...method.measured import Measured
from ...method.noising import Flow, edges_of
from ..probe import Probe, View
from ..setup.parts import Parts

_CANDIDATES = 8  # layers that are measured again after each removal, the cheapest of the round before
_GROUPS = 10  # of a sampler's steps, in which the response is measured


def order_layers(probe: Probe, budget: Budget, least: float, weight_T: np.ndarray) -> np.ndarray:
    """Nested masks, the dense model's first: each skips one layer more, the one that costs least per share of the cost.

    Greedy removal on the dense model: after each removal the candidates are measured again, and the layer goes whose
    removal adds least to the mean squared change of the output, in proportion to its cost.

    Args:
        least: share of the prunable cost that remains at least. weight_T: of errors, float64 [T].

    Returns: bool [M, L].
    """
    share_L = budget.share_L / budget.share_L.sum()
    mask_L, error, masks = np.ones(len(share_L), dtype=bool), 0.0, [np.ones(len(share_L), dtype=bool)]
    candidates, steps = np.arange(len(share_L)), len(weight_T)
    bar = tqdm(total=len(share_L), unit="layer", desc="order of the layers", dynamic_ncols=True)
    while True:
        candidates = candidates[mask_L[candidates] & (share_L[mask_L].sum() - share_L[candidates] >= least - 1e-9)]
        if not len(candidates) or mask_L.sum() == 1:
            bar.close()
            return np.array(masks)
        tried = np.repeat(mask_L[None], len(candidates), axis=0)
        tried[np.arange(len(candidates)), candidates] = False
        errors, _ = probe.errors(tried, 0, steps, weight_T)
        order = np.argsort((errors - error) / share_L[candidates], kind="stable")
        mask_L, error = tried[order[0]], float(errors[order[0]])
        masks.append(mask_L)
        kept = np.flatnonzero(mask_L)
        nearest = candidates[order[1 : _CANDIDATES + 1]]
        candidates = nearest if len(nearest) == _CANDIDATES else kept
        bar.update()


def ordering_forwards(layers: int, samples: int) -> int:
    """About how many forwards of one sample `order_layers` takes."""
    return samples * (layers + layers * min(_CANDIDATES, (layers + 1) // 2) + layers)


def early_response(probe: Probe, layers: int, bins: int = 10) -> np.ndarray:
    """The response of the dense model's samples to errors in equal bins, as a weight of timesteps, float64 [T]."""
    mask_L = np.arange(layers) % 4 != 1 if layers > 2 else np.arange(layers) != 1
    edges = edges_of(probe.parts.noising, bins)
    return np.repeat(probe.amplification(mask_L[None], edges), np.diff(edges))


def measure_response(config: Config, parts: Parts, probe: Probe, mask_L: np.ndarray, edges: np.ndarray,
                     error_B: np.ndarray, views: dict[str, View]) -> tuple[dict[str, np.ndarray], str, int]:
    """How far samples move, squared, for a unit of error of the output in each bin, by the sampler that will be used.

    The mask is in force at some consecutive steps of the sampler alone, and the displacement of the final samples is
    divided by the change of the output there and shared between the bins. All is then scaled so that `error_B` gives
    the displacement that the mask causes at all steps.

    Args:
        edges: bin b holds the training timesteps from edges[b] up to edges[b+1]. error_B: of the mask, float64 [B].

    Returns: float64 [B] for each view, the sampler's name and its steps.
    """
    budget, guidance = config.budget, parts.free_guidance
    steps = config.evaluate.sampling_steps if budget.sampler in (None, "uniform") else budget.sampling_steps

    def prepare() -> Any:
        solver = make_solver(parts.scheduler, parts.tokens) if budget.sampler in (None, "uniform") else make_sampler(
            str(budget.sampler), "budget.sampler=", parts.scheduler, parts.tokens)
        set_timesteps(solver, steps, parts.tokens)
        if isinstance(parts.noising, Flow) and parts.noising.within:  # the steps of this one of two backbones
            own = parts.noising.serves(solver.timesteps)
            solver.set_begin_index(int(own.nonzero()[0]))
            solver.timesteps = solver.timesteps[own]
        return solver

    solver = prepare()
    visited = as_rows(np.asarray(solver.timesteps, dtype=np.float64), parts.scheduler)
    groups = [range(part[0], part[-1] + 1) for part in np.array_split(np.arange(len(visited)), min(
        _GROUPS, len(visited)))]
    moved, caused = probe.displacement(mask_L[None], [*groups, range(len(visited))], prepare, guidance, views)
    middle_G = np.array([visited[group.start : group.stop].mean() for group in groups])[::-1]
    middle_B = (edges[:-1] + edges[1:] - 1) / 2
    response = {}
    for name, value in moved.items():
        each_G = np.divide(value[:-1], caused[:-1], out=np.zeros(len(groups)), where=caused[:-1] > 0)[::-1]
        response_B = np.interp(middle_B, middle_G, each_G)
        total = float(response_B @ error_B)
        response[name] = response_B * (value[-1] / total if total > 0 else 1.0)
    return response, type(solver).__name__, len(visited)


def views_of(parts: Parts) -> dict[str, View]:
    """What of final latents is compared: the latents and, where the VAE is at hand and decodes them, the pixels."""
    views: dict[str, View] = {"latents": lambda latents: latents}
    if parts.vae is not None and len(parts.latent_shape) == 3 and type(parts.vae).__name__ == "AutoencoderKL":
        views["pixels"] = partial(parts.images)
    return views


def measured_family(config: Config, parts: Parts, masks: np.ndarray, edges: np.ndarray, at: int,
                    batch_size: int = 16) -> tuple[Measured, np.ndarray]:
    """Errors of masks bool [M, L] against the teacher, and the response with mask `at`; errors of each sample, float64
    [M, B, S], beside."""
    probe = Probe(config, parts, config.search.samples, batch_size)
    error_MBS = probe.against_teacher(masks, edges)
    error_MB = error_MBS.mean(axis=2)
    fewer = Probe(config, parts, min(config.search.samples, 32), batch_size)
    response, sampler, steps = measure_response(config, parts, fewer, masks[at], edges, error_MB[at], views_of(parts))
    return Measured(tuple(map(int, edges)), error_MB, response, sampler, steps, config.evaluate.guidance_scale,
                    config.search.samples), error_MBS
