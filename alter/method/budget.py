"""Meeting the budget: the expected keep ratio under the noise, and the masks that hit the target.

Sampled masks are Bernoulli(sigmoid(logit)) and sampled routes Categorical(softmax(logits)), independent, so
the expected share of MACs has a closed form, which L_ratio uses. The deterministic masks are the most probable
ones, under that same distribution, whose share of MACs is the wanted one (docs/method.md, "The budget").
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.device import to_device
from ..common.errors import InputError
from .hypernetwork import Logits

TOLERANCE = 0.004
_FREE, _GRAIN = 64, TOLERANCE / 8  # entries decided exactly; unit of their costs


def nearest(num_timesteps: int, visited: np.ndarray) -> np.ndarray:
    """The visited timestep (the lower of two) that is nearest to each training timestep, int64 [T]."""
    distinct = np.unique(visited)
    return distinct[np.abs(np.arange(num_timesteps)[:, None] - distinct).argmin(axis=1)]


def rows_of(trained: np.ndarray, counted: np.ndarray, num_timesteps: int) -> np.ndarray:
    """The place in `trained` of the timestep whose expert serves each training timestep, int64 [T]: its own, or, where
    it is not trained, that of the nearest which counts in the budget.

    Args:
        trained: timesteps, int64 [N], ascending. counted: those of a budget, among them.
    """
    rows = np.arange(num_timesteps)
    return np.searchsorted(trained, np.where(np.isin(rows, trained), rows, nearest(num_timesteps, counted)))


def timestep_weights(num_timesteps: int, visited: np.ndarray | None) -> np.ndarray:
    """Weight of every training timestep, float64 [T], of sum 1; of budget, loss and report alike.

    Each of the N visited timesteps has 1/N, spread evenly over the training timesteps that are nearest to it (those
    halfway between two belong to the lower).

    Args:
        num_timesteps: T. visited: int64 [N] in [0, T), repeated ones count again; None: all weigh the same.
    """
    if visited is None:
        return np.full(num_timesteps, 1 / num_timesteps)
    distinct, counts = np.unique(visited, return_counts=True)
    nearest_T = np.searchsorted(distinct, nearest(num_timesteps, distinct))
    return (counts / counts.sum() / np.bincount(nearest_T))[nearest_T]


def _read(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()


@dataclass(frozen=True)
class Budget:
    """The target p and the share of the total that each site costs, in MACs or in seconds.

    Attributes:
        share_L: cost of every site / total cost, float64 [L]; its sum is the prunable share.
        keep_ratio: p in (0, 1], in the unit named by `over`.
        over: "total", the whole backbone, or "prunable", its sites.
        timesteps: those that a sampler visits, int64 [any], which weigh the training timesteps (`timestep_weights`);
            None: all weigh the same.

    Raises:
        InputError: if p is below the share that no mask can remove, plus the cheapest site.
    """

    share_L: np.ndarray
    keep_ratio: float
    over: str
    timesteps: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.keep_ratio < self.floor:
            raise InputError(
                f"budget.keep_ratio={self.keep_ratio} is below {self.floor:.4f}, the share of the cost that cannot "
                f"be pruned (budget.over={self.over}; one layer an expert stays): choose at least that"
            )

    @property
    def scale(self) -> float:
        """A share of the total cost divided by this is in `over`'s unit."""
        return 1.0 if self.over == "total" else float(self.share_L.sum())

    @property
    def fixed(self) -> float:
        """The part that no mask can remove, in `over`'s unit."""
        return 1.0 - float(self.share_L.sum()) if self.over == "total" else 0.0

    @property
    def floor(self) -> float:
        """The least keep ratio: everything that is fixed, plus the cheapest site, in `over`'s unit."""
        return self.fixed + float(self.share_L.min()) / self.scale

    def expected(self, logits: Logits) -> Tensor:
        """E[S] = fixed + Σ_t w_t Σ_e softmax(router)_te · Σ_l share_l · sigmoid(mask_el): the expected keep ratio.

        Returns: float32 scalar in `over`'s unit, differentiable with respect to both logits.
        """
        share_L = to_device(torch.from_numpy(self.share_L).float(), logits.mask_EL.device)
        cost_E = logits.mask_EL.float().sigmoid() @ share_L / self.scale
        probability_TE, weight_T = logits.router_TE.float().softmax(dim=-1), self.weight_T(len(logits.router_TE))
        if weight_T is None:
            return self.fixed + probability_TE.mean(0) @ cost_E
        return self.fixed + to_device(torch.from_numpy(weight_T).float(), cost_E.device) @ probability_TE @ cost_E

    def measured(self, mask_EL: np.ndarray, expert_T: np.ndarray) -> float:
        """The keep ratio of deterministic masks, in `over`'s unit.

        Args:
            mask_EL: bool [E, L]. expert_T: the expert of each training timestep, int64 [T].
        """
        kept_T = (mask_EL @ self.share_L)[expert_T]
        return self.fixed + float(np.average(kept_T, weights=self.weight_T(len(expert_T)))) / self.scale

    def masks(self, logits: Logits, keep_ratio: float | None = None,
              read: Callable[[Tensor], np.ndarray] = _read) -> tuple[np.ndarray, np.ndarray]:
        """Probable masks with this keep ratio, and the most probable expert of each timestep.

        Maximises Σ_el logit_el·m_el, the log-likelihood up to a constant, subject to a keep ratio within TOLERANCE and
        to at least one site in every expert that has a timestep; where the sites are too coarse for the tolerance, as
        near as they come. By a Lagrange multiplier on the cost, then dynamic programming (docs/method.md, "The
        budget").

        Args:
            keep_ratio: the wanted share, in `over`'s unit; None: the expected one of these logits.
            read: brings a tensor, float64 [any], to the host; called once.

        Returns: mask_EL bool [E, L], expert_T int64 [T]; for a given `keep_ratio` the same, for equal logits, on every
            machine.
        """
        mask_EL, router_TE = logits.mask_EL.detach().double(), logits.router_TE.detach()
        parts = mask_EL.flatten(), router_TE.argmax(-1).double(), self.expected(logits).detach().double()[None]
        known = read(torch.cat(parts))
        logits_EL = known[: mask_EL.numel()].reshape(mask_EL.shape)
        expert_T = known[mask_EL.numel() : -1].astype(np.int64)
        served_E = np.bincount(expert_T, self.weight_T(len(expert_T)), minlength=len(logits_EL))
        cost_EL = served_E[:, None] / served_E.sum() * self.share_L / self.scale
        serving_E = np.isin(np.arange(len(logits_EL)), expert_T)
        target = (float(known[-1]) if keep_ratio is None else keep_ratio) - self.fixed
        return _most_probable(logits_EL, cost_EL, serving_E, target), expert_T

    def weight_T(self, num_timesteps: int) -> np.ndarray | None:
        """`timestep_weights` of the sampler's timesteps; None where all weigh the same."""
        return None if self.timesteps is None else timestep_weights(num_timesteps, self.timesteps)


def _most_probable(logits_EL: np.ndarray, cost_EL: np.ndarray, serving_E: np.ndarray, target: float) -> np.ndarray:
    """Mask bool [E, L] of large Σ logit·m with Σ cost·m near the target and a site in every serving expert.

    Keep where logit > λ·cost, with the multiplier λ that comes nearest to the target; then decide the _FREE entries
    again that this decides most narrowly, by dynamic programming, or all entries where those miss the target. The
    likeliest site of an expert that would be empty is kept in any case.

    Args:
        logits_EL: log-odds, float64. cost_EL: what keeping an entry adds to the keep ratio, float64.
        serving_E: bool; experts that need a site. target: of Σ cost·m.
    """
    logits, cost = logits_EL.ravel(), cost_EL.ravel()
    worth = np.divide(logits, cost, out=np.where(logits > 0, np.inf, -np.inf), where=cost > 0)
    order = np.argsort(-worth, kind="stable")
    kept = int(np.abs(np.concatenate([[0.0], cost[order].cumsum()]) - target).argmin())
    multiplier = worth[order[max(kept - 1, 0)]]
    narrow = np.argsort(np.abs(logits - (multiplier if np.isfinite(multiplier) else 0.0) * cost), kind="stable")
    forced, count = np.zeros(len(cost), dtype=bool), _FREE
    while True:
        mask = np.zeros(len(cost), dtype=bool)
        mask[order[:kept]] = True
        mask |= forced
        free = narrow[~forced[narrow]][:count]
        mask[free] = False
        mask[free] = _knapsack(logits[free], cost[free], target - float(cost @ mask))
        mask_EL = mask.reshape(cost_EL.shape)
        empty = np.flatnonzero(serving_E & ~mask_EL.any(axis=1))
        if len(empty):
            forced.reshape(cost_EL.shape)[empty, logits_EL[empty].argmax(axis=1)] = True
        elif abs(float(cost @ mask) - target) > TOLERANCE and count < len(cost):
            count = len(cost)
        else:
            return mask_EL


def _knapsack(values: np.ndarray, costs: np.ndarray, target: float) -> np.ndarray:
    """Which items to take, bool [N]: costs as near to the target as they come, up to TOLERANCE, at the greatest value.

    The usual programme over costs in multiples of _GRAIN; of each multiple the best value, with its exact cost.
    """
    grains = np.rint(costs / _GRAIN).astype(int)
    size = int(grains.sum()) + 1
    value_G, spent_G = np.full(size, -np.inf), np.zeros(size)
    value_G[0] = 0.0
    taken = np.zeros((len(values), size), dtype=bool)
    for item, (value, cost, width) in enumerate(zip(values, costs, grains, strict=True)):
        with_it = value_G[: size - width] + value
        better = with_it > value_G[width:]
        taken[item, width:] = better
        spent_G[width:] = np.where(better, spent_G[: size - width] + cost, spent_G[width:])
        value_G[width:] = np.where(better, with_it, value_G[width:])
    missed = np.maximum(np.abs(spent_G - target) - TOLERANCE, 0.0).round(12)
    grain = int(np.lexsort((-value_G, np.where(np.isfinite(value_G), missed, np.inf)))[0])
    chosen = np.zeros(len(values), dtype=bool)
    for item in reversed(range(len(values))):
        chosen[item] = taken[item, grain]
        grain -= int(grains[item]) * int(chosen[item])
    return chosen
