"""What layers added at former denoising steps, for rungs that are `cached`, while a pipeline draws."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np

from ..backbones.gates import Added, CachedRows
from ..backbones.stepping import restored
from ..common.errors import InputError
from .ladder import Experts, Rung

_FOLLOWED: ContextVar["Trajectory | None"] = ContextVar("alter_followed", default=None)  # of this thread or task


@dataclass
class _Layers:
    """Of one backbone. forward: how many have run in the present step. forwards: in every step; 0: not known yet.
    added: of each forward of a step; the first goes on from the first of the step before."""

    rung: Rung
    forward: int = 0
    forwards: int = 0
    added: list[dict[int, Added]] = field(default_factory=list)


class Trajectory:
    """The steps of one call of a pipeline after another, as its scheduler takes them.

    Attributes:
        of: what is kept of each backbone, by its identity.
    """

    def __init__(self) -> None:
        self.of: dict[int, _Layers] = {}

    def begin(self) -> None:
        """The scheduler prepares for another call."""
        self.of.clear()

    def rows(self, backbone: Any, experts: Experts, rung: Rung, expert: int) -> CachedRows:
        """Of the next forward, in which layers that have not run yet run, if any expert of the rung runs them.

        Raises:
            InputError: if the backbone is called more often than in the step before, or by another rung.
        """
        layers = self.of.setdefault(id(backbone), _Layers(rung))
        if layers.rung is not rung:
            raise InputError("experts: the rung changed within a trajectory, and what a cached rung adds is its own: "
                             "change it between calls of the pipeline")
        if layers.forwards and layers.forward == layers.forwards:
            raise self._uneven(layers.forward + 1, layers.forwards)
        if layers.forward == len(layers.added):
            layers.added.append({})
        added, mask_UL = layers.added[layers.forward], experts.mask_EL[rung.used]
        layers.forward += 1
        ran_L = np.isin(np.arange(mask_UL.shape[1]), list(added))
        kept_L = experts.mask_EL[expert] | (np.any(mask_UL, axis=0) & ~ran_L)
        return CachedRows(kept_L.tolist(), added, (~np.all(mask_UL, axis=0)).tolist())

    def step(self, last: bool) -> None:
        """The scheduler takes a step, of all that have run since the one before.

        Raises:
            InputError: if they are fewer than in the step before.
        """
        for backbone, layers in list(self.of.items()):
            if layers.forward and layers.forwards not in (0, layers.forward):
                raise self._uneven(layers.forward, layers.forwards)
            if last or not layers.forward:  # a pipeline of two backbones has gone on to the other
                del self.of[backbone]
            layers.forwards, layers.forward = layers.forward, 0

    @staticmethod
    def _uneven(forwards: int, before: int) -> InputError:
        return InputError(f"experts: the backbone was called {forwards} times in a step and {before} times in the one "
                          "before; a cached rung needs as many calls in every step: leave out intervals of guidance")


def followed() -> Trajectory:
    """That of this thread or task.

    Raises:
        InputError: outside `following`.
    """
    trajectory = _FOLLOWED.get()
    if trajectory is None:
        raise InputError("experts: a cached rung goes on from step to step, and whose steps these are is not known: "
                         "call the pipeline inside `experts.following(pipe)`, or inside `stepping` of a plan")
    return trajectory


@contextmanager
def following(scheduler: Any) -> Iterator[None]:
    """Inside the block, calls of pipelines with this scheduler may use cached rungs, in this thread or task."""
    trajectory = Trajectory()
    prepare, step = scheduler.set_timesteps, scheduler.step

    @wraps(prepare)
    def preparing(*arguments: Any, **options: Any) -> Any:
        trajectory.begin()
        return prepare(*arguments, **options)

    @wraps(step)
    def stepping(*arguments: Any, **options: Any) -> Any:
        if trajectory.of:
            timestep = options["timestep"] if "timestep" in options else arguments[1]
            trajectory.step(last=float(timestep) == float(scheduler.timesteps[-1]))
        return step(*arguments, **options)

    before = _FOLLOWED.set(trajectory)
    try:
        with restored(scheduler, "set_timesteps", "step"):
            scheduler.set_timesteps, scheduler.step = preparing, stepping
            yield
    finally:
        _FOLLOWED.reset(before)
