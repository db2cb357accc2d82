"""The measured search: layers are ordered once, the weights train at random depths of this order, and depths over time
are allocated by their errors, for every budget at once."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from ...common.config import Config
from ...experts.artefact import TemporalExperts
from ...experts.ladder import Rung
from ...method.allocation import Frontier, Gain, gain
from ...method.budget import TOLERANCE
from ...method.measured import Measured
from ...method.noising import edges_of
from ..batch import Batch
from ..probe import Probe
from ..setup.parts import Parts
from ..update import Update
from .measuring import early_response, measured_family, order_layers, ordering_forwards

_SPREAD = 0.2  # of the depths that are trained around the budget, as a standard deviation of the keep ratio
_RUNGS = np.arange(0.3, 1.001, 0.05)  # budgets of the ladder, beside those asked for
_ORDER_SAMPLES, _RESPONSE_SAMPLES = 32, 16


class ElasticSearch:
    """Random depths of one chain of nested masks, then the allocation of depths to timesteps.

    Args:
        trainer: a `Trainer`.
    """

    updates: dict[str, tuple[Update, float]] = {}

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.parts, self.config = trainer, trainer.parts, trainer.config
        # Until `begin`, two depths, that the memory may be tried with.
        self.masks_ML = np.ones((2, len(self.parts.cost.sites)), dtype=bool)

    def begin(self) -> None:
        """Order the layers by measurement on the dense model, and say what its errors promise."""
        found: list[Any] = [None]
        if self.trainer.accelerator.is_main_process:
            samples = order_samples(self.config)
            layers = len(self.parts.cost.sites)
            tqdm.write(f"ordering {layers} layers: about {ordering_forwards(layers, samples):,} forwards of one sample")
            found = [ordered(self.config, self.parts)]
            self.trainer.backbone.train()
        self.masks_ML = broadcast_object_list(found)[0]
        cost_M = self._cost_M()
        if cost_M.min() > self.config.budget.range[0] + TOLERANCE and self.trainer.accelerator.is_main_process:
            tqdm.write(f"warning: search.least={self.config.search.least} leaves {cost_M.min():.3f} at least: no "
                       f"expert comes down to budget.keep_ratio={self.config.budget.range[0]}", file=sys.stderr)

    def update(self, batches: list[Batch]) -> dict[str, float]:
        """Nothing is learned beside the weights."""
        self.trainer.readout.read()
        return {}

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """The mask of the budget, around which samples have depths of their own."""
        return self.tried()

    def drawn(self, batches: list[Batch]) -> list[torch.Tensor]:
        """A depth for each sample of the micro-batches, likelier near the budget, full depth included: bool [B, L]."""
        low, high = self.config.budget.range
        cost_M = self._cost_M()
        away_M = np.maximum(np.maximum(low - cost_M, cost_M - high), 0)
        likely_M = np.exp(-0.5 * (away_M / _SPREAD) ** 2)
        passed_M = torch.from_numpy(likely_M.cumsum() / likely_M.sum())
        masks_ML = torch.from_numpy(self.masks_ML)
        depths = [torch.searchsorted(passed_M, batch.drawn.uniform((), stream=1).double(), right=True)
                  for batch in batches]
        return [masks_ML[depth_B.clamp(max=len(cost_M) - 1)] for depth_B in depths]

    def tried(self) -> tuple[np.ndarray, np.ndarray]:
        """One mask, of the budget, at all timesteps."""
        nearest = int(np.abs(self._cost_M() - self.config.budget.range[1]).argmin())
        return self.masks_ML, np.full(self.parts.noising.num_timesteps, nearest)

    def present(self, masks: tuple[np.ndarray, np.ndarray]) -> TemporalExperts:
        """The mask of the budget alone, whatever depths are being trained."""
        parts, budget = self.parts, self.parts.budget
        return TemporalExperts.build(*self.tried(), parts.cost, budget.keep_ratio, budget.over, budget.timesteps,
                                     parts.latency, parts.told_component)

    def finish(self) -> TemporalExperts:
        """Measure, and allocate depths to timesteps for every budget."""
        found: list[Any] = [None]
        if self.trainer.accelerator.is_main_process:
            self.trainer.backbone.eval()
            found = [allocated(self.config, self.parts, self.masks_ML, self.config.budget.range)]
            self.trainer.backbone.train()
        return broadcast_object_list(found)[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its state, for a checkpoint."""
        return {"masks_ML": torch.from_numpy(self.masks_ML)}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from `tensors`."""
        self.masks_ML = tensors["masks_ML"].numpy()

    def _cost_M(self) -> np.ndarray:
        return costs(self.parts, self.masks_ML)


def order_samples(config: Config) -> int:
    """On how many the layers are ordered."""
    return min(config.search.samples, _ORDER_SAMPLES)


def ordered(config: Config, parts: Parts, batch_size: int = 16) -> np.ndarray:
    """Nested masks bool [M, L] by measurement on the dense model, as `order_layers`."""
    samples, layers = order_samples(config), len(parts.cost.sites)
    weight_T = early_response(Probe(config, parts, min(samples, _RESPONSE_SAMPLES), batch_size), layers)
    return order_layers(Probe(config, parts, samples, batch_size), parts.budget, config.search.least, weight_T)


def allocated(config: Config, parts: Parts, masks_ML: np.ndarray, asked: Sequence[float], tuned: bool = True,
              batch_size: int = 16) -> TemporalExperts:
    """Measure the masks bool [M, L], and allocate them to timesteps for every budget.

    Args:
        asked: keep ratios, of which the first is chosen. tuned: whether the weights were trained for those between.
    """
    cost_M = costs(parts, masks_ML)
    weight_T = parts.budget.weight_T(parts.noising.num_timesteps)
    weight_T = np.ones(parts.noising.num_timesteps) if weight_T is None else weight_T
    edges = edges_of(parts.noising, config.search.bins, weight_T)
    near = int(np.abs(cost_M - (min(asked) + max(asked)) / 2).argmin())
    measured, error_MBS = measured_family(config, parts, masks_ML, edges, near, batch_size)
    cost_MB = bin_costs(cost_M, weight_T, edges)
    response_B = measured.response[measured.space]
    found = gain(error_MBS * response_B[:, None], cost_MB, asked[0] + TOLERANCE, config.experts.count, config.seed)
    tqdm.write(_forecast(found, asked[0], config.experts.count, measured.space))
    rungs = ladder(measured, cost_MB, config.experts.count, asked, tuned)
    return experts_of(parts, masks_ML, rungs, asked[0], measured)


def costs(parts: Parts, masks_ML: np.ndarray) -> np.ndarray:
    """The keep ratio of each mask bool [M, L] at all timesteps, float64 [M]."""
    return parts.budget.fixed + masks_ML @ parts.budget.share_L / parts.budget.scale


def remeasure(config: Config, parts: Parts, experts: TemporalExperts) -> TemporalExperts:
    """The same masks with the errors of the finished weights, and the rungs that were not tuned allocated by them."""
    assert experts.measured is not None
    weight_T = parts.budget.weight_T(len(experts.expert_T))
    edges = np.array(experts.measured.edges)
    error_MBS = Probe(config, parts, config.search.samples).against_teacher(experts.mask_EL, edges)
    measured = dataclasses.replace(experts.measured, error_MB=error_MBS.mean(axis=2))
    tuned = {rung.keep_ratio_target: rung.expert_T for rung in experts.ladder if rung.tuned}
    cost_M = costs(parts, experts.mask_EL)
    cost_MB = bin_costs(cost_M, np.ones(edges[-1]) if weight_T is None else weight_T, edges)
    rungs, bins = [], np.arange(len(edges) - 1)
    for rung in ladder(measured, cost_MB, config.experts.count, (min(tuned), max(tuned))):
        if rung.tuned:
            routes = tuned[rung.keep_ratio_target]
            lost = float(measured.loss_MB[routes[edges[:-1]], bins].sum())
            rung = dataclasses.replace(rung, expert_T=routes, error=lost)
        rungs.append(rung)
    return experts_of(parts, experts.mask_EL, rungs, experts.keep_ratio_target, measured)


def bin_costs(cost_M: np.ndarray, weight_T: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """What mask m in bin b adds to the keep ratio, float64 [M, B]."""
    weight_B = np.add.reduceat(weight_T, edges[:-1]) / weight_T.sum()
    return cost_M[:, None] * weight_B


def ladder(measured: Measured, cost_MB: np.ndarray, experts: int, asked: Sequence[float],
           tuned: bool = True) -> list[Rung]:
    """A rung for every budget that the masks allow: all of _RUNGS, and those asked for.

    tuned: whether the weights were trained for the budgets between those asked for.
    """
    frontier, rungs = Frontier(measured.loss_MB, cost_MB, experts), []
    cheapest = cost_MB.min(axis=0).sum()
    for target in sorted({*np.round(_RUNGS, 2).tolist(), *asked}):
        if target + TOLERANCE < cheapest and target not in asked:
            continue
        choice = frontier.within(max(target + TOLERANCE, cheapest))
        routes = np.repeat(choice.mask_B, np.diff(measured.edges))
        rungs.append(Rung(target, routes, tuned and min(asked) <= target <= max(asked), choice.loss))
    return rungs


def experts_of(parts: Parts, masks: np.ndarray, rungs: list[Rung], keep_ratio: float,
               measured: Measured) -> TemporalExperts:
    """The artefact of a family of masks bool [M, L], with the rung of `keep_ratio` chosen."""
    budget = parts.budget
    (chosen,) = (rung for rung in rungs if rung.keep_ratio_target == keep_ratio)
    return TemporalExperts.build(masks, chosen.expert_T, parts.cost, keep_ratio, budget.over, budget.timesteps,
                                 parts.latency, parts.told_component, rungs, measured)


def _forecast(found: Gain, keep_ratio: float, experts: int, space: str) -> str:
    """What masks over time promise, in plain words."""
    said = (f"at keep ratio {keep_ratio:g}, {experts} experts over time would move samples (squared distance, in "
            f"{space}) {found.mean:.1%} less than one mask of the same cost (90% of halves of the measured samples: "
            f"{found.low:.1%} to {found.high:.1%})")
    if found.low > 0:
        return said
    return said + ": nothing that can be told from noise; experts.count=1 would do as well"
