"""The masks of the measured search: chains of nested ones, one for all timesteps and one for each interval of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ...method.allocation import likely


@dataclass(frozen=True)
class Chains:
    """Chains of masks, each of which skips a layer more than the one before: C of them, for I intervals of timesteps.

    With one interval there is one chain; with more the first chain is for all timesteps, the next ones for an interval
    each.

    Attributes:
        mask_ML: the masks of all chains, each once, that of every layer first, bool [M, L].
        member_CM: which of them each chain has, bool [C, M].
        edges: interval i holds the training timesteps from edges[i] up to, not including, edges[i+1], int64 [I+1].
    """

    mask_ML: np.ndarray
    member_CM: np.ndarray
    edges: np.ndarray

    @classmethod
    def of(cls, chains: Sequence[np.ndarray], edges: np.ndarray) -> "Chains":
        """Of C chains bool [D, L], whose lengths may differ."""
        every = np.concatenate(chains)
        _, first, which = np.unique(every, axis=0, return_index=True, return_inverse=True)
        member_CM = np.zeros((len(chains), len(first)), dtype=bool)
        chain_N = np.repeat(np.arange(len(chains)), [len(chain) for chain in chains])
        member_CM[chain_N, first.argsort().argsort()[which.reshape(-1)]] = True
        return cls(every[np.sort(first)], member_CM, edges)

    @staticmethod
    def spans(edges: np.ndarray) -> list[tuple[int, int]]:
        """The timesteps low..high-1 of each chain."""
        intervals = [(int(low), int(high)) for low, high in pairwise(edges)]
        return intervals if len(intervals) == 1 else [(int(edges[0]), int(edges[-1])), *intervals]

    def interval_of(self, timesteps: np.ndarray) -> np.ndarray:
        """The interval of each training timestep."""
        return np.searchsorted(self.edges, timesteps, side="right") - 1

    def nearest(self, cost_M: np.ndarray, budget: float, skipping: bool = False) -> np.ndarray:
        """The mask of its interval's chain that costs what is nearest to a budget, for each training timestep, int64
        [T]; skipping: that skips a layer, if there is one."""
        own_IM = self.member_CM[-(len(self.edges) - 1) :] & ~(skipping & self.mask_ML.all(axis=1))
        away_IM = np.where(own_IM, np.abs(cost_M - budget), np.inf)
        return np.repeat(away_IM.argmin(axis=1), np.diff(self.edges))

    def likely(self, cost_M: np.ndarray, low: float, high: float) -> np.ndarray:
        """How often each mask is trained in each interval, float64 [I, M]: of a chain as `allocation.likely`, the first
        of several chains with odds of 1 to I."""
        likely_CM = likely(cost_M, low, high) * self.member_CM
        likely_CM /= likely_CM.sum(axis=1, keepdims=True)
        if len(likely_CM) == 1:
            return likely_CM
        intervals = len(likely_CM) - 1
        return (likely_CM[0] + intervals * likely_CM[1:]) / (1 + intervals)
