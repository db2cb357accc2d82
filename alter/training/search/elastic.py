"""The measured search: layers are ordered once for each interval of timesteps, the weights train at random depths of
these orders, and masks over time are allocated by their errors, for every budget at once."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...backbones.noising import Flow, edges_of
from ...common.config import Config
from ...common.errors import InputError
from ...common.process import on_main_process, tell
from ...experts.artefact import TemporalExperts
from ...experts.ladder import Rung
from ...method.allocation import Frontier, Gain, gain, interval, smoothed
from ...method.budget import TOLERANCE, timestep_weights
from ...method.measured import EARLY_BINS, EARLY_SAMPLES, INTERVALS, ORDER_SAMPLES, Measured, forwards, in_bins
from ..batch import Batch
from ..probe import Probe
from ..setup.parts import Parts
from ..update import Update
from .chains import Chains
from .measuring import early_response, measured_family, order_layers, sampler_of, views_of, visited_by

_RUNGS = np.arange(0.3, 1.001, 0.05)  # budgets of the ladder, beside those asked for


class ElasticSearch:
    """Random depths of chains of nested masks, then the allocation of masks to timesteps.

    Args:
        trainer: a `Trainer`.
    """

    updates: dict[str, tuple[Update, float]] = {}
    less = "no masks within it that keep more have less error"

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.parts, self.config = trainer, trainer.parts, trainer.config
        # Until `begin`, two depths, that the memory may be tried with.
        layer_L, whole = np.arange(len(self.parts.cost.sites)), np.array([0, self.parts.noising.num_timesteps])
        self.chains = Chains.of([np.stack([layer_L >= 0, layer_L > 0])], whole)

    def begin(self) -> None:
        """Order the layers by measurement on the dense model, and say what its errors promise."""
        config, parts, search = self.config, self.parts, self.config.search
        steps, layers = len(sampler_of(config, parts)().timesteps), len(parts.cost.sites)
        counted = forwards(layers, search.least, search.samples, search.bins, steps, parts.free_guidance != 1,
                           config.experts.count)

        views_of(config, parts)  # refuses weights that cannot be read, before anything takes long

        tell(f"ordering {layers} layers: about {counted.order + counted.forecast:,} forwards of one sample; "
             f"their errors will take {counted.errors + counted.response:,} more")
        chains = ordered(config, parts, promises=True, shared=True)
        self.chains = on_main_process(lambda: chains)  # another processor may break a tie otherwise
        self.trainer.backbone.train()
        least = float(self._cost_M().min())  # of masks, any of which may serve any timestep
        if least > config.budget.range[0] + TOLERANCE:
            raise InputError(f"budget.keep_ratio={config.budget.range[0]}: the layers that are left keep {least:.3f} "
                             f"(search.least={search.least}): choose more, or a lower search.least")

    def update(self, batches: list[Batch]) -> dict[str, float]:
        """Nothing is learned beside the weights."""
        self.trainer.readout.read()
        return {}

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """The masks of the budget (the highest), around which samples have depths of their own."""
        return self.chains.mask_ML, self.chains.nearest(self._cost_M(), self.config.budget.range[1])

    def drawn(self, batches: list[Batch]) -> list[torch.Tensor]:
        """A mask for each sample of the micro-batches, of the chains for its timestep, likelier near the budget, full
        depth included: bool [B, L]."""
        passed_IM = torch.from_numpy(self.chains.likely(self._cost_M(), *self.config.budget.range).cumsum(axis=1))
        mask_ML, drawn = torch.from_numpy(self.chains.mask_ML), []
        for batch in batches:
            place_B1 = batch.drawn.uniform((1,), stream=1).double()
            passed_BM = passed_IM[self.chains.interval_of(batch.drawn.rows.numpy())]
            mask_B1 = torch.searchsorted(passed_BM, place_B1 * passed_BM[:, -1:], right=True)
            drawn.append(mask_ML[mask_B1[:, 0]])
        return drawn

    def tried(self) -> tuple[np.ndarray, np.ndarray]:
        """Every layer at all timesteps, which any sample may draw, and which experts may have where it matters."""
        return self.chains.mask_ML, np.zeros(self.parts.noising.num_timesteps, dtype=np.int64)

    def present(self, masks: tuple[np.ndarray, np.ndarray]) -> TemporalExperts:
        """The masks of the highest budget alone, whatever depths are being trained."""
        parts, budget = self.parts, self.parts.budget
        return TemporalExperts.build(*masks, parts.cost, self.config.budget.range[1], budget.over, budget.timesteps,
                                     parts.latency, parts.told_component)

    def finish(self) -> TemporalExperts:
        """Measure, and allocate depths to timesteps for every budget."""
        experts = allocated(self.config, self.parts, self.chains, self.config.budget.range, shared=True)
        self.trainer.backbone.train()
        return on_main_process(lambda: experts)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its state, for a checkpoint."""
        return {name: torch.from_numpy(value) for name, value in vars(self.chains).items()}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from `tensors`, or from the one chain of a former version."""
        arrays = {name: value.numpy() for name, value in tensors.items()}
        former = arrays.get("masks_ML")
        self.chains = Chains(**arrays) if former is None else Chains.of([former], self.chains.edges[[0, -1]])

    def _cost_M(self) -> np.ndarray:
        return costs(self.parts, self.chains.mask_ML)


def ordered(config: Config, parts: Parts, batch_size: int = 16, promises: bool = False,
            shared: bool = False) -> Chains:
    """Chains of nested masks by measurement on the dense model, as `order_layers`: with several experts one for each of
    as many intervals of timesteps (INTERVALS at most), of equal weight in the budget, and one for all timesteps.

    promises: whether to say what the dense model's errors promise of masks over time. shared: as of `Probe`.
    """
    samples = config.search.samples
    few = Probe(config, parts, min(samples, EARLY_SAMPLES), batch_size, shared)
    weight_T = early_response(few, len(parts.cost.sites))
    probe = Probe(config, parts, min(samples, ORDER_SAMPLES), batch_size, shared)
    edges = edges_of(parts.noising, min(config.experts.count, INTERVALS), _weight_T(parts))
    chains = Chains.of([order_layers(probe, parts.budget, config.search.least, weight_T, *span)
                        for span in Chains.spans(edges)], edges)
    if promises and config.experts.count > 1:
        edges = edges_of(parts.noising, EARLY_BINS)
        loss_MBS = few.against_teacher(chains.mask_ML, edges) * weight_T[edges[:-1], None]
        tell("before any training, which makes such gains smaller: " + _forecast(
            config, parts, chains.mask_ML, edges, loss_MBS, few.image_S, "latents", config.budget.range[0]))
    return chains


def allocated(config: Config, parts: Parts, chains: Chains, asked: Sequence[float], tuned: bool = True,
              batch_size: int = 16, shared: bool = False) -> TemporalExperts:
    """Measure the masks, and allocate them to timesteps for every budget.

    Args:
        asked: keep ratios, of which the first is chosen. tuned: whether the weights were trained for those between.
        shared: as of `Probe`.
    """
    mask_ML, edges = chains.mask_ML, edges_of(parts.noising, config.search.bins, _sampled_T(config, parts))
    near_T = chains.nearest(costs(parts, mask_ML), (min(asked) + max(asked)) / 2, skipping=True)
    near_T = np.repeat(near_T[edges[:-1]], np.diff(edges))
    measured, error_MBS, image_S = measured_family(config, parts, mask_ML, edges, near_T, batch_size, shared)
    loss_MBS = error_MBS * measured.response[measured.space][:, None]
    if config.experts.count > 1:
        fewer = "; one mask alone would have been trained on more samples" if tuned else ""
        tell(_forecast(config, parts, mask_ML, edges, loss_MBS, image_S, measured.space, asked[0]) + fewer)
    rungs = ladder(loss_MBS, image_S, edges, bin_costs(parts, mask_ML, edges), config.experts.count, asked, tuned)
    return experts_of(parts, mask_ML, rungs, asked[0], measured)


def _forecast(config: Config, parts: Parts, masks_ML: np.ndarray, edges: np.ndarray, loss_MBS: np.ndarray,
              image_S: np.ndarray, space: str, keep_ratio: float) -> str:
    """What masks over time promise at a budget, in plain words."""
    experts, cost_MB = config.experts.count, bin_costs(parts, masks_ML, edges)
    least = max(keep_ratio + TOLERANCE, cost_MB.min(axis=0).sum())
    return describe_gain(gain(loss_MBS, cost_MB, least, experts, image_S, config.seed), keep_ratio, experts, space)


def remeasure(config: Config, parts: Parts, experts: TemporalExperts) -> TemporalExperts:
    """The same masks and ladder with the errors of the finished weights; rungs that were neither tuned nor planned are
    allocated by them. Without a teacher the former errors, which no longer hold, are left out."""
    assert experts.measured is not None
    if parts.teacher is None:
        unknown = tuple(dataclasses.replace(rung, error=None, interval=None) for rung in experts.ladder)
        return dataclasses.replace(experts, measured=None, ladder=unknown)
    edges = np.array(experts.measured.edges)
    probe = Probe(config, parts, config.search.samples, shared=True)
    error_MBS = probe.against_teacher(experts.mask_EL, edges)
    measured = dataclasses.replace(experts.measured, error_MB=error_MBS.mean(axis=2), samples=probe.samples)
    loss_MBS = error_MBS * measured.response[measured.space][:, None]
    cost_MB = bin_costs(parts, experts.mask_EL, edges)
    runs = [1 + int(np.count_nonzero(np.diff(rung.expert_T))) for rung in experts.ladder if rung.steps is None]
    frontier, rungs = Frontier(smoothed(loss_MBS), cost_MB, max(runs, default=1)), []
    for rung in experts.ladder:
        if rung.steps is not None:
            rungs.append(dataclasses.replace(rung, error=None, interval=None))
            continue
        if not rung.tuned:
            rung = dataclasses.replace(rung, expert_T=_allocated_T(frontier, cost_MB, edges, rung.keep_ratio_target))
        rungs.append(_predicted(rung, loss_MBS, probe.image_S, edges))
    return dataclasses.replace(experts, measured=measured, ladder=tuple(rungs))


def bin_costs(parts: Parts, masks_ML: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """What mask m in bin b adds to the keep ratio, float64 [M, B]."""
    weight_T = _weight_T(parts)
    weight_B = np.add.reduceat(weight_T, edges[:-1]) / weight_T.sum()
    return costs(parts, masks_ML)[:, None] * weight_B


def costs(parts: Parts, masks_ML: np.ndarray) -> np.ndarray:
    """The keep ratio of each mask bool [M, L] at all timesteps, float64 [M]."""
    return parts.budget.fixed + masks_ML @ parts.budget.share_L / parts.budget.scale


def _weight_T(parts: Parts) -> np.ndarray:
    """Of the timesteps in the budget, float64 [T]."""
    weight_T = parts.budget.weight_T(parts.noising.num_timesteps)
    return np.ones(parts.noising.num_timesteps) if weight_T is None else weight_T


def _sampled_T(config: Config, parts: Parts) -> np.ndarray:
    """Of the timesteps in the sampler's steps, float64 [T]; with betas those in the budget."""
    if not isinstance(parts.noising, Flow):
        return _weight_T(parts)
    return timestep_weights(parts.noising.num_timesteps, visited_by(sampler_of(config, parts)(), parts))


def ladder(loss_MBS: np.ndarray, image_S: np.ndarray, edges: np.ndarray, cost_MB: np.ndarray, experts: int,
           asked: Sequence[float], tuned: bool = True) -> list[Rung]:
    """A rung for every budget that the masks allow: all of _RUNGS, and those asked for.

    Args:
        loss_MBS: of each sample, float64. image_S: its image. edges: of the bins. experts: at most.
        tuned: whether the weights were trained for the budgets between those asked for.
    """
    frontier, rungs = Frontier(smoothed(loss_MBS), cost_MB, experts), []
    cheapest = cost_MB.min(axis=0).sum()
    for target in sorted({*np.round(_RUNGS, 2).tolist(), *asked}):
        if target + TOLERANCE < cheapest and target not in asked:
            continue
        routes, within = _allocated_T(frontier, cost_MB, edges, target), min(asked) <= target <= max(asked)
        rungs.append(_predicted(Rung(target, routes, tuned and within), loss_MBS, image_S, edges))
    return rungs


def _predicted(rung: Rung, loss_MBS: np.ndarray, image_S: np.ndarray, edges: np.ndarray) -> Rung:
    """With the mean loss of the samples, and what their noise leaves of it."""
    lost_S = np.einsum("mb,mbs->s", in_bins(rung.expert_T, edges.tolist(), len(loss_MBS)), loss_MBS)
    return dataclasses.replace(rung, error=float(lost_S.mean()), interval=interval(lost_S, image_S))


def _allocated_T(frontier: Frontier, cost_MB: np.ndarray, edges: np.ndarray, target: float) -> np.ndarray:
    """The best mask of each timestep at a keep ratio, or at the least that there is, int64 [T]."""
    budget = max(target + TOLERANCE, float(cost_MB.min(axis=0).sum()))
    return np.repeat(frontier.within(budget).mask_B, np.diff(edges))


def experts_of(parts: Parts, masks: np.ndarray, rungs: list[Rung], keep_ratio: float,
               measured: Measured) -> TemporalExperts:
    """The artefact of a family of masks bool [M, L], with the rung of `keep_ratio` chosen."""
    budget = parts.budget
    (chosen,) = (rung for rung in rungs if rung.keep_ratio_target == keep_ratio)
    return TemporalExperts.build(masks, chosen.expert_T, parts.cost, keep_ratio, budget.over, budget.timesteps,
                                 parts.latency, parts.told_component, rungs, measured)


def describe_gain(found: Gain, keep_ratio: float, experts: int, space: str) -> str:
    """What masks over time promise, in plain words."""
    said = (f"at keep ratio {keep_ratio:g}, {experts} experts over time would move samples (squared distance, in "
            f"{space}) {found.mean:.1%} less than one mask of the same cost (90% of halves of the measured images: "
            f"{found.low:.1%} to {found.high:.1%})")
    if found.low > 0:
        return said
    return said + ": nothing that can be told from noise; experts.count=1 would do as well"
