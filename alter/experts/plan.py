"""The planner: how many denoising steps, and which layers at each of them, for a sampler and a budget."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..backbones.conditioning import stop_at_backbone
from ..backbones.latency import Latency
from ..backbones.schedules import as_rows
from ..common.errors import InputError
from ..method.planning import Front, Option, between, routes, step_losses
from .apply import backbone_of
from .ladder import Experts, Rung

SPACE = "latents"  # in which displacements are predicted and measured
_MEASURED_STEPS = (2, 3, 4, 6, 8, 11, 15, 20, 28, 40, 56, 80)  # at which the solver's own error is measured


@dataclass(frozen=True)
class Plan:
    """What `Planner.plan` chose.

    Attributes:
        rung: to be served with `experts.at(plan.rung)`; its `steps` are to be asked of the pipeline.
        macs: of the backbone's forwards for one image, each step counted once. seconds: of them, at the batch of the
            measured latency; None where the experts have none.
        error: predicted mean squared displacement of the latents from those of many dense steps. discretisation: the
            part of it that as many dense steps have.
    """

    rung: Rung
    macs: float
    seconds: float | None
    error: float
    discretisation: float

    @property
    def steps(self) -> int:
        """Denoising steps."""
        assert self.rung.steps is not None
        return self.rung.steps


class Planner:
    """Measures a sampler once, by drawing, and plans for any budget.

    Args:
        experts: with `measured` errors, of masks of which one keeps every layer. They may be applied to `pipe` or not.
        pipe: a diffusers pipeline with their backbone and the scheduler that will be used.
        call: arguments of `pipe`, for example {"prompt": [...], "guidance_scale": 5.0}; a few dozen images are enough.
        most: the largest number of steps considered; None: those for which the response was measured.
        seed: of the images drawn.

    Raises:
        InputError: if the experts lack what a plan needs, or the pipeline gives no latents.
    """

    def __init__(self, experts: Experts, pipe: Any, call: Mapping[str, Any], most: int | None = None,
                 seed: int = 0) -> None:
        measured = experts.measured
        if measured is None or SPACE not in measured.response:
            raise InputError("experts: they hold no measured errors of masks, from which plans are made: train with "
                             "search.method=elastic, or write them with `alter measure --apply`")
        if not experts.mask_EL.all(axis=1).any():
            raise InputError("experts: none of their masks keeps every layer, to which plans are compared: plan with "
                             "the whole ladder")
        self.experts, self.pipe, self.call, self.seed = experts, pipe, dict(call), seed
        self.most = measured.steps if most is None else most
        if self.most < 2:
            raise InputError(f"plan: most={most}: give at least 2 steps")
        self.dense = int(experts.mask_EL.all(axis=1).argmax())
        known = [steps for steps in _MEASURED_STEPS if steps < self.most] + [self.most, min(4 * self.most, 200)]
        everything = Rung(1.0, np.full(len(experts.expert_T), self.dense))
        drawn = {steps: self._draw(everything, steps) for steps in tqdm(
            known, unit="draw", desc="the solver's own error", dynamic_ncols=True)}
        self.reference = drawn.pop(known[-1])
        self.drift = {steps: displacement(latents, self.reference) for steps, latents in drawn.items()}
        self.visited = {steps: self._visited(steps) for steps in range(2, self.most + 1)}
        loss_MB = measured.error_MB * measured.response[SPACE]
        losses = {steps: step_losses(loss_MB, measured.edges, visited) for steps, visited in self.visited.items()}
        macs_L = np.array(experts.macs, dtype=np.float64)
        self.macs_M = experts.macs_total - ~experts.mask_EL @ macs_L
        self.front = Front(losses, self.macs_M, {steps: between(self.drift, steps) for steps in losses})

    def plan(self, macs: float | None = None, seconds: float | None = None, quality: int | None = None) -> Plan:
        """The plan of least predicted displacement within a budget; or the cheapest of a quality. Give one of them.

        Args:
            macs: of the backbone's forwards for one image, each step counted once.
            seconds: of these forwards, at the batch at which the experts' latency was measured.
            quality: as good as this many dense steps, as predicted.

        Raises:
            InputError: if not one of them is given, or none can be had.
        """
        if sum(value is not None for value in (macs, seconds, quality)) != 1:
            raise InputError("plan: give one of macs, seconds and quality")
        try:
            if quality is not None:
                if quality not in self.visited:
                    raise ValueError(f"quality={quality}: choose 2 to {self.most} dense steps")
                return self._plan(self.front.cheapest(self.front.with_mask(quality, self.dense).error))
            if seconds is not None:
                latency = self._latency
                share_M = 1 - ~self.experts.mask_EL @ latency.share_L
                front = Front(self.front.losses, share_M * latency.seconds_total, self.front.discretisation)
                return self._plan(front.within(seconds))
            assert macs is not None
            return self._plan(self.front.within(macs))
        except ValueError as error:
            raise InputError(f"plan: {error}") from None

    def fixed(self, steps: int, keep_ratio: float | Rung | None = None) -> Plan:
        """So many steps of a rung, or of the dense model if `keep_ratio` is 1, with the same prediction."""
        if steps not in self.visited:
            raise InputError(f"plan: steps={steps}: choose 2 to {self.most}")
        visited, pick = self.visited[steps], self.experts.pick
        expert_T = np.full(len(self.experts.expert_T), self.dense) if keep_ratio == 1 else pick(keep_ratio).expert_T
        mask_N, solver = expert_T[visited], self.front.discretisation[steps]
        lost = float(self.front.losses[steps][mask_N, np.arange(steps)].sum())
        return self._plan(Option(mask_N, float(self.macs_M[mask_N].sum()), solver + lost, solver))

    def check(self, plan: Plan) -> float:
        """The displacement that `plan.error` predicts, measured on the planner's own images."""
        return displacement(self._draw(plan.rung, plan.steps), self.reference)

    @property
    def _latency(self) -> Latency:
        if self.experts.latency is None:
            raise ValueError("seconds: the experts hold no measured latency: train with budget.cost=latency, or give "
                             "macs")
        return self.experts.latency

    def _plan(self, option: Option) -> Plan:
        steps, masks = option.steps, option.mask_N
        expert_T = routes(masks, self.visited[steps], len(self.experts.expert_T))
        macs = float(self.macs_M[masks].sum())
        latency = self.experts.latency
        seconds = None if latency is None else float(
            (1 - ~self.experts.mask_EL[masks] @ latency.share_L).sum() * latency.seconds_total)
        rung = Rung(macs / steps / self.experts.macs_total, expert_T, False, option.error, steps)
        return Plan(rung, macs, seconds, option.error, option.discretisation)

    def _draw(self, rung: Rung, steps: int) -> Tensor:
        """Final latents of the call, float32 [N, ...]; sample i depends on the seed, on i and on its prompt."""
        with self.experts.apply(self.pipe, rung):
            output = self.pipe(**self._arguments(steps), output_type="latent")
        images = output.frames if hasattr(output, "frames") else output.images
        if not isinstance(images, Tensor):
            raise InputError(f"plan: a {type(self.pipe).__name__} gives no latents with output_type='latent', in which "
                             "displacements are measured")
        return images.float().cpu()

    def _visited(self, steps: int) -> np.ndarray:
        """The training timesteps at which the pipeline calls its backbone, int64 [N], decreasing."""
        stop_at_backbone(self.pipe, backbone_of(self.pipe, self.experts.component), self._arguments(steps))
        timesteps = np.asarray([float(value) for value in self.pipe.scheduler.timesteps])
        visited = as_rows(timesteps, self.pipe.scheduler)
        if len(visited) != steps or (np.diff(visited) >= 0).any():
            raise InputError(f"plan: with num_inference_steps={steps} {type(self.pipe.scheduler).__name__} visits "
                             f"{len(visited)} timesteps, not as many decreasing ones: use one with one forward a step")
        return visited

    def _arguments(self, steps: int) -> dict[str, Any]:
        listed = [len(value) for value in self.call.values() if isinstance(value, (list, tuple))]
        count = listed[0] if listed else 1
        generators = [torch.Generator().manual_seed(self.seed + i) for i in range(count)]
        return {**self.call, "num_inference_steps": steps, "generator": generators}


def displacement(latents: Tensor, reference: Tensor) -> float:
    """Mean squared difference of two sets of samples, [N, ...] and [N, ...]."""
    return float((latents - reference).square().mean())
