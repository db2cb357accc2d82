"""The planner: how many denoising steps, and which layers at each of them, for a sampler and a budget."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from ..backbones.family import COMPONENTS, backbone_class, parameters
from ..backbones.latency import measure_latency
from ..backbones.stepping import can_skip_steps, only_steps
from ..common.errors import InputError
from ..method.measured import Measured
from ..method.planning import Front, Option, between, choose_steps, routes, step_losses
from .apply import Applied, asking, backbone_of, check_same
from .ladder import Experts, Rung
from .samples import Samples
from .trajectory import following

SPACE = "latents"  # in which displacements are predicted and measured
_PERIODS = (2, 3, 4)  # of cached rungs, in steps
_MEASURED_STEPS = (2, 3, 4, 6, 8, 11, 15, 20, 28, 40, 56, 80)  # at which the solver's own error is measured


@dataclass(frozen=True)
class Plan:
    """What `Planner.plan` chose.

    Attributes:
        rung: to be served with `experts.at(plan.rung)`.
        dense: to be drawn by the dense model instead (`Planner`'s `dense`), without experts, at the same timesteps.
        asked: the pipeline's `num_inference_steps`. chosen: which of these are taken, inside `stepping`; None: all.
        macs: of the backbone for one image, one forward a step; guidance that is computed doubles them.
        seconds: of the backbone, as of `Planner.plan`; None where they were neither measured nor asked for.
        error: predicted mean squared displacement of the latents from those of many dense steps. discretisation: the
            part of it that as many dense steps have.
    """

    rung: Rung
    macs: float
    seconds: float | None
    error: float
    discretisation: float
    dense: bool
    asked: int
    chosen: tuple[int, ...] | None

    @property
    def steps(self) -> int:
        """Denoising steps."""
        assert self.rung.steps is not None
        return self.rung.steps

    def stepping(self, pipe: Any) -> AbstractContextManager[None]:
        """For calls of `pipe` in a `with` block: its scheduler takes the plan's steps."""
        return _stepping(pipe.scheduler, self)


class Planner:
    """Measures a sampler once, by drawing, and plans for any budget.

    Errors were measured against the dense model from which the experts were trained. Where they were tuned, that is
    another model than theirs at full depth: give it as `dense`, so that plans may be dense steps of it. Without it
    predictions hold the distance between the two, and `drift` and `check` do not.

    Args:
        experts: with `measured` errors, of masks of which one keeps every layer. They may be applied to `pipe` or not.
        pipe: a diffusers pipeline with their backbone and the scheduler that will be used, which adds no noise.
        call: arguments of `pipe`, for example {"prompt": [...], "guidance_scale": 5.0}; a few dozen images are enough.
        most: the largest number of steps considered; None: those for which the response was measured.
        seed: of the images drawn. batch_size: images of one call. dense: a pipeline like `pipe`, with its scheduler, of
            the dense model; None: `pipe` at full depth.
        own_steps: whether plans visit the sampler's own timesteps; else they take steps of its `most` ones where those
            lie better and its class can (backbones/stepping.py).

    Attributes:
        reference: latents of many dense steps, float32 [N, ...]. drift: by number of steps, the displacement of as many
            dense ones from it, where drawn; chosen_drift: at chosen timesteps. chosen: by number of steps, those of
            `most` that are taken; None: the sampler's own. visited: the training timesteps, int64 [steps].

    Raises:
        InputError: if the experts lack what a plan needs, or of the pipeline no samples of different numbers of steps
            can be compared.
    """

    def __init__(self, experts: Experts, pipe: Any, call: Mapping[str, Any], most: int | None = None, seed: int = 0,
                 batch_size: int = 8, dense: Any = None, own_steps: bool = False) -> None:
        measured = experts.measured
        if measured is None or SPACE not in measured.response:
            raise InputError("plan: the experts hold no measured errors of masks, from which plans are made: train "
                             "with search.method=elastic, or write them with `alter measure --apply`")
        if not experts.mask_EL.all(axis=1).any():
            raise InputError("plan: none of the experts' masks keeps every layer, to which plans are compared: plan "
                             "with the whole ladder")
        if sum(isinstance(getattr(pipe, name, None), nn.Module) for name in COMPONENTS) > 1:
            raise InputError(f"plan: a {type(pipe).__name__} has two backbones: plans are made for one")
        self.experts, self.pipe, self._dense, self._checked = experts, pipe, dense, dict[tuple[Rung, bool], float]()
        self._samples = Samples(call, seed, batch_size, experts.component)
        self.backbone = backbone_of(pipe, experts.component)
        self.most = measured.steps if most is None else most
        if self.most < 2:
            raise InputError(f"plan: most={most}: give at least 2 steps")
        self.visited = {steps: self._samples.visited(pipe, steps) for steps in range(2, self.most + 1)}
        self.full = int(experts.mask_EL.all(axis=1).argmax())
        many = max(2 * self.most, min(4 * self.most, 200))
        known = [steps for steps in _MEASURED_STEPS if steps < self.most] + [self.most, many]
        drawn = {steps: self._draw(self._everything, steps, dense is not None, watched=steps == self.most)
                 for steps in tqdm(known, unit="draw", desc="the solver's own error", dynamic_ncols=True)}
        self.reference = drawn.pop(known[-1])
        self.drift = {steps: displacement(latents, self.reference) for steps, latents in drawn.items()}
        self.discretisation = {steps: between(self.drift, steps) for steps in self.visited}
        self.chosen = dict[int, tuple[int, ...] | None].fromkeys(self.visited)
        self.chosen_drift = dict[int, float]()
        if not own_steps and all(can_skip_steps(each.scheduler) for each in (pipe, dense) if each is not None):
            self._choose_steps(measured)
        loss_MB = measured.error_MB * measured.response[SPACE]
        losses = {steps: step_losses(loss_MB, measured.edges, visited) for steps, visited in self.visited.items()}
        self.macs_M = self._left_M(np.array(experts.macs) / experts.macs_total) * experts.macs_total
        self.front = Front(losses, self.macs_M, self.discretisation, self.full, dense is not None)
        self._seconds_M: np.ndarray | None = None
        if experts.latency is not None:
            self._seconds_M = self._left_M(experts.latency.share_L) * experts.latency.seconds_total

    def plan(self, macs: float | None = None, seconds: float | None = None, quality: int | None = None) -> Plan:
        """The plan of least predicted displacement within a budget; or the cheapest of a quality. Give one of them.

        It is drawn, and one mask at all steps, or steps at full depth, that cost no more are taken instead if they turn
        out nearer; of a quality, as many steps at full depth as are asked for if it does not reach it.

        Args:
            macs: of the backbone for one image, one forward a step; guidance that is computed doubles them.
            seconds: of the backbone's forwards: at the experts' measured latency, one of its batch a step; without one,
                for one image, with guidance, measured on this pipeline when they are asked for first.
            quality: as good as this many steps at full depth, of the dense model where it is at hand, at the sampler's
                own timesteps, as predicted.

        Raises:
            InputError: if not one of them is given, or none can be had.
        """
        asked = {name: value for name, value in (("macs", macs), ("seconds", seconds), ("quality", quality))
                 if value is not None}
        if len(asked) != 1:
            raise InputError("plan: give one of macs, seconds and quality")
        (name, value), = asked.items()
        try:
            if quality is None:
                front = self.front if seconds is None else self._timed
                return self._drawn_best(front.within(value), front.one_mask(value), front.fewer_steps(value))
            if quality not in self.visited:
                raise ValueError(f"choose 2 to {self.most} dense steps")
            full = self.front.everything(quality)
            as_good = full.error - full.discretisation + between(self.drift, quality)
            cheapest = self._plan(self.front.cheapest(as_good))
            return cheapest if self.check(cheapest) <= between(self.drift, quality) else self._plan(full)
        except ValueError as error:
            raise InputError(f"plan: {name}={value:g}: {error}") from None

    def fixed(self, steps: int, keep_ratio: float | Rung | None = None) -> Plan:
        """So many steps of a rung, or at full depth if `keep_ratio` is 1, with the same prediction."""
        if steps not in self.visited:
            raise InputError(f"plan: steps={steps}: choose 2 to {self.most}")
        rung = self._everything if keep_ratio == 1 else self.experts.pick(keep_ratio)
        mask_N, solver = rung.expert_T[self.visited[steps]], self.front.discretisation[steps]
        lost = float(self.front.losses[steps][mask_N, np.arange(steps)].sum())
        return self._plan(Option(mask_N, float(self.macs_M[mask_N].sum()), solver + lost, solver))

    def one_mask(self, macs: float) -> Plan:
        """As `plan`, with one mask at all steps.

        Raises:
            InputError: as `plan`.
        """
        option = self.front.one_mask(macs)
        if option is None:
            raise InputError(f"plan: macs={macs:g}: two steps of the cheapest mask cost {2 * self.macs_M.min():g}")
        return self._plan(option)

    def cached(self, macs: float) -> Plan:
        """As `plan`, by a cached rung: every layer at each second, third or fourth step, whichever draws nearest, and
        one mask at the others. What caches leave cannot be predicted from the errors of masks: `error` is as drawn.

        Raises:
            InputError: as `plan`.
        """
        options = (self.front.cached(macs, period) for period in _PERIODS)
        plans = [self._plan(option) for option in options if option is not None]
        if not plans:
            raise InputError(f"plan: macs={macs:g}: two steps, one of them of the cheapest mask, cost "
                             f"{self.macs_M[self.full] + self.macs_M.min():g}")
        nearest = min(plans, key=self.check)
        moved = self.check(nearest)
        told = dataclasses.replace(nearest, error=moved, rung=dataclasses.replace(nearest.rung, error=moved))
        self._checked[told.rung, False] = moved
        return told

    def check(self, plan: Plan) -> float:
        """The displacement that `plan.error` predicts, measured on the planner's own images."""
        key = plan.rung, plan.dense
        if key not in self._checked:
            self._checked[key] = displacement(self._draw(plan.rung, plan.steps, plan.dense, plan.chosen),
                                              self.reference)
        return self._checked[key]

    @property
    def forwards(self) -> int:
        """Of the backbone, in a step; 2 where guidance has one of its own."""
        return self._samples.forwards

    @property
    def _everything(self) -> Rung:
        return Rung(1.0, np.full(len(self.experts.expert_T), self.full), False)

    def _left_M(self, share_L: np.ndarray) -> np.ndarray:
        """What each mask leaves of a forward, from the shares of the layers, float64 [M]."""
        return 1 - ~self.experts.mask_EL @ share_L

    @cached_property
    def _timed(self) -> Front:
        if self._seconds_M is None:
            with self._serving(self._everything):
                told = self._samples.told(self.pipe, 2)
                latents = told[parameters(backbone_class(self.backbone))[0]]
                latency = measure_latency(self.backbone, latents[0].shape[-1], len(latents), inputs=told)
            self._seconds_M = self._left_M(latency.share_L) * latency.seconds_total * self.forwards
        return Front(self.front.losses, self._seconds_M, self.front.discretisation, self.full, self.front.dense)

    def _drawn_best(self, *options: Option | None) -> Plan:
        """That whose samples are nearest; of equals, the first."""
        return min((self._plan(option) for option in options if option is not None), key=self.check)

    def _plan(self, option: Option) -> Plan:
        steps, masks, experts = option.steps, option.mask_N, self.experts
        share_L = np.array(experts.macs) / experts.macs_total if experts.latency is None else experts.latency.share_L
        kept = float(self._left_M(share_L)[masks].mean())
        if experts.budget_over == "prunable":
            kept = 1 - (1 - kept) / float(share_L.sum())
        expert_T = routes(masks, self.visited[steps], len(experts.expert_T))
        seconds = None if self._seconds_M is None else float(self._seconds_M[masks].sum())
        rung = Rung(kept, expert_T, False, option.error, steps, cached=option.cached)
        return Plan(rung, float(self.macs_M[masks].sum()), seconds, option.error, option.discretisation, option.dense,
                    self.most if self.chosen[steps] else steps, self.chosen[steps])

    def _choose_steps(self, measured: Measured) -> None:
        """Of the sampler's `most` steps those that tell the others best, where samples come nearer by it."""
        visited, response_B = self.visited[self.most], measured.response[SPACE]
        weight_N = step_losses(response_B[None], measured.edges, visited)[0]
        best = choose_steps(self._samples.gram[self.most], weight_N)
        chosen = {steps: tuple(taken.tolist()) for steps, taken in best.items()}
        drawn = [steps for steps in self.drift if steps < self.most]
        for steps in tqdm(drawn, unit="draw", desc="chosen timesteps", dynamic_ncols=True):
            latents = self._draw(self._everything, steps, self._dense is not None, chosen[steps])
            self.chosen_drift[steps] = displacement(latents, self.reference)
        self.chosen_drift[self.most] = self.drift[self.most]
        for steps in range(2, self.most):
            moved = between(self.chosen_drift, steps)
            if moved < self.discretisation[steps]:
                self.discretisation[steps], self.chosen[steps] = moved, chosen[steps]
                self.visited[steps] = visited[[*chosen[steps]]]

    def _draw(self, rung: Rung, steps: int, dense: bool = False, chosen: tuple[int, ...] | None = None,
              watched: bool = False) -> Tensor:
        if dense:
            return self._samples.latents(self._dense, steps, self.most, chosen, watched)
        with self._serving(rung):
            return self._samples.latents(self.pipe, steps, self.most, chosen, watched)

    @contextmanager
    def _serving(self, rung: Rung) -> Iterator[None]:
        with ExitStack() as stack:
            if not hasattr(self.backbone, "_alter_applied"):  # else other threads keep the rung that is in force
                stack.enter_context(Applied(self.pipe, self.backbone, self.experts, rung))
            check_same(self.backbone._alter_applied, self.experts)
            stack.enter_context(asking(self.experts, rung))
            yield


@contextmanager
def _stepping(scheduler: Any, plan: Plan) -> Iterator[None]:
    with only_steps(scheduler, plan.chosen, plan.asked), following(scheduler):
        yield


def displacement(latents: Tensor, reference: Tensor) -> float:
    """Mean squared difference of two sets of samples, [N, ...] and [N, ...]."""
    return float((latents - reference).square().mean())
