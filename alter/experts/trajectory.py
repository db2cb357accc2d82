"""What layers added at former denoising steps, for rungs that are `cached`, while a pipeline draws."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..backbones.gates import Added, CachedRows
from ..backbones.stepping import restored
from ..common.errors import InputError
from .ladder import Experts, Rung

_FOLLOWED: ContextVar["Trajectory | None"] = ContextVar("alter_followed", default=None)  # of this thread or task
_FOLLOWERS = WeakKeyDictionary[Any, "Trajectory"]()  # of each scheduler that is followed


@dataclass
class _Layers:
    """Of one backbone. forward: how many have run in the present step, at `timestep`. forwards: in every step; 0: not
    known yet. added: of each forward of a step; the first goes on from the first of the step before."""

    rung: Rung
    timestep: float = 0.0
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
        self._place: int | None = None  # of the last step taken, among the scheduler's timesteps
        self._timesteps: list[float] = []  # of the present call, read from the device once

    def begin(self) -> None:
        """The scheduler prepares for another call."""
        self.of.clear()
        self._place, self._timesteps = None, []

    def rows(self, backbone: Any, experts: Experts, rung: Rung, expert: int, timestep: float) -> CachedRows:
        """Of the next forward, in which layers that have not run yet run, if any expert of the rung runs them.

        Raises:
            InputError: if the backbone is called more often than in the step before, by another rung, or at another
                timestep than before in this step.
        """
        layers = self.of.setdefault(id(backbone), _Layers(rung))
        if layers.rung is not rung:
            raise InputError("experts: the rung changed within a trajectory, and what a cached rung adds is its own: "
                             "change it between calls of the pipeline")
        if layers.forward and layers.timestep != timestep:
            raise InputError(f"experts: the backbone was called at timesteps {layers.timestep:g} and {timestep:g} "
                             "without a step of the scheduler that is followed: a cached rung needs the pipeline's own")
        if layers.forwards and layers.forward == layers.forwards:
            raise self._uneven(layers.forward + 1, layers.forwards)
        if layers.forward == len(layers.added):
            layers.added.append({})
        added, mask_UL = layers.added[layers.forward], experts.mask_EL[rung.used]
        layers.forward += 1
        layers.timestep = timestep
        ran_L = np.isin(np.arange(mask_UL.shape[1]), list(added))
        kept_L = experts.mask_EL[expert] | (np.any(mask_UL, axis=0) & ~ran_L)
        return CachedRows(kept_L.tolist(), added, (~np.all(mask_UL, axis=0)).tolist())

    def step(self, timestep: float, scheduler: Any) -> None:
        """The scheduler takes a step, by all forwards since the one before.

        Raises:
            InputError: if they are fewer than in the step before, or it is not the next step.
        """
        timesteps = self._timesteps = self._timesteps or scheduler.timesteps.tolist()
        if self._place is None and timestep in timesteps:
            self._place = timesteps.index(timestep) - 1
        place = len(timesteps) if self._place is None else self._place + 1
        if timesteps[place : place + 1] != [timestep]:
            raise InputError(f"experts: the scheduler was given timestep {timestep:g}, which is not its next: a cached "
                             "rung needs each of its steps once, in their order")
        self._place = place
        for backbone, layers in list(self.of.items()):
            if layers.forward and layers.forwards not in (0, layers.forward):
                raise self._uneven(layers.forward, layers.forwards)
            if place == len(timesteps) - 1 or not layers.forward:  # a pipeline of two has gone on to the other
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
    """Inside the block, calls of pipelines with this scheduler may use cached rungs, in this thread or task.

    Raises:
        InputError: if another thread or task follows it; in the block, as `Trajectory`.
    """
    trajectory, cls = Trajectory(), type(scheduler)
    prepare, step, told = scheduler.set_timesteps, scheduler.step, list(signature(cls.step).parameters)[1:]
    held = _FOLLOWERS.get(scheduler)
    if held is not None and held is not _FOLLOWED.get():
        raise InputError(f"experts: another thread or task follows this {cls.__name__}: give each pipeline a scheduler "
                         "of its own")

    @wraps(cls.set_timesteps)
    def preparing(self: Any, *arguments: Any, **options: Any) -> Any:
        if self is not scheduler:  # a copy that a pipeline made
            return cls.set_timesteps(self, *arguments, **options)
        trajectory.begin()
        return prepare(*arguments, **options)

    @wraps(cls.step)
    def stepping(self: Any, *arguments: Any, **options: Any) -> Any:
        if self is not scheduler:
            return cls.step(self, *arguments, **options)
        if trajectory.of:
            timestep = {**dict(zip(told, arguments, strict=False)), **options}["timestep"]
            trajectory.step(float(timestep), scheduler)
        return step(*arguments, **options)

    before = _FOLLOWED.set(trajectory)
    _FOLLOWERS[scheduler] = trajectory
    try:
        with restored(scheduler, "set_timesteps", "step"):
            scheduler.set_timesteps, scheduler.step = MethodType(preparing, scheduler), MethodType(stepping, scheduler)
            yield
    finally:
        _FOLLOWED.reset(before)
        _FOLLOWERS.pop(scheduler)
        if held is not None:
            _FOLLOWERS[scheduler] = held
