"""What layers added at former denoising steps, kept for rungs that are `cached` while a trajectory is drawn."""

import threading
from typing import Any

import numpy as np

from ..backbones.gates import Added, CachedRows
from ..common.errors import InputError
from .ladder import Experts, Rung


class Trajectory(threading.local):
    """Of the thread that draws it, with one backbone.

    A trajectory is a sequence of steps of falling timesteps, with as many forwards of the backbone at each (guidance
    may take two, in the same order): the first forward of a step goes on from the first of the step before. Another
    rung, a larger timestep and another call of the pipeline begin a new one.
    """

    def __init__(self) -> None:
        self.rung: Rung | None = None
        self.drawn: Any = None
        self.timestep, self.last = 0.0, False
        self.forward = self.forwards = 0  # this one's place in its step; how many a step has, 0: not known
        self.added: list[dict[int, Added]] = []

    def __reduce__(self) -> Any:
        """A copy, in another process perhaps, draws something else."""
        return Trajectory, ()

    def rows(self, experts: Experts, rung: Rung, expert: int, timestep: float, drawn: Any, last: bool) -> CachedRows:
        """Of the next forward, in which layers that have not run yet run, if any expert of the rung runs them.

        Args:
            drawn: an object that every call of the pipeline has of its own; None: not known. last: whether it is known
                that no step follows.

        Raises:
            InputError: if the backbone is called more or less often than in the step before.
        """
        if rung is not self.rung or drawn is not self.drawn or timestep > self.timestep:
            self.rung, self.drawn, self.added, self.forward, self.forwards = rung, drawn, [], 0, 0
        elif timestep < self.timestep:
            self._check(self.forward + 1)
            self.forward, self.forwards = 0, len(self.added)
        else:
            self.forward += 1
            if self.forward >= self.forwards:
                self._check(self.forward + 1)
        self.timestep, self.last = timestep, last
        if self.forward == len(self.added):
            self.added.append({})
        added, mask_UL = self.added[self.forward], experts.mask_EL[rung.used]
        ran_L = np.isin(np.arange(mask_UL.shape[1]), list(added))
        kept_L = experts.mask_EL[expert] | (np.any(mask_UL, axis=0) & ~ran_L)
        noted_L = ~np.all(mask_UL, axis=0) & (not last)
        return CachedRows(kept_L.tolist(), added, noted_L.tolist())

    def end(self) -> None:
        """After a forward: free what no other needs."""
        if self.last and self.added:
            self.added[self.forward].clear()

    def _check(self, forwards: int) -> None:
        if self.forwards not in (0, forwards):
            raise InputError(f"experts: the backbone was called {forwards} times at timestep {self.timestep:g} and "
                             f"{self.forwards} times at the step before; a cached rung needs as many calls at every "
                             "step: leave out intervals of guidance, or draw again from the first step")
