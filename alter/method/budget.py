"""Meeting the budget: the expected keep ratio under the noise, and the masks that hit the target.

Sampled masks are Bernoulli(sigmoid(logit)) and sampled routes Categorical(softmax(logits)), independent, so
the expected share of MACs has a closed form, which L_ratio uses. The deterministic masks are the most probable
ones, under that same distribution, whose share of MACs is what it should be (docs/method.md, "The budget").
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.errors import InputError
from .hypernetwork import Logits

TOLERANCE = 0.004
_CORES = (10, 16)  # entries of which all combinations are tried; more of them where the first miss the tolerance


@dataclass(frozen=True)
class Budget:
    """The target p and the share of the total that each site costs, in MACs or in seconds.

    share_L: cost of every site / total cost, float64 [L]; its sum is the prunable share.
    keep_ratio: p in the unit named by `over`. over: "total" or "prunable".
    timesteps: those over which the kept share is averaged, int64; None: every training timestep.
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
        """Kept share of the total = fixed + kept share of the sites; divided by this it is in `over`'s unit."""
        return 1.0 if self.over == "total" else float(self.share_L.sum())

    @property
    def fixed(self) -> float:
        """The part that no mask can remove, in `over`'s unit."""
        return 1.0 - float(self.share_L.sum()) if self.over == "total" else 0.0

    @property
    def floor(self) -> float:
        """The least keep ratio: everything that is fixed, and the cheapest site."""
        return self.fixed + float(self.share_L.min()) / self.scale

    def expected(self, logits: Logits) -> Tensor:
        """E[S] = fixed + mean_t Σ_e softmax(router)_te · Σ_l share_l · sigmoid(mask_el), differentiable."""
        share_L = torch.as_tensor(self.share_L, dtype=torch.float32, device=logits.mask_EL.device)
        cost_E = logits.mask_EL.float().sigmoid() @ share_L / self.scale
        averaged = logits.router_TE if self.timesteps is None else logits.router_TE[self.timesteps]
        probability_E = averaged.float().softmax(dim=-1).mean(0)
        return self.fixed + probability_E @ cost_E

    def measured(self, mask_EL: np.ndarray, expert_T: np.ndarray) -> float:
        """The keep ratio of deterministic masks [E, L], with the expert of each training timestep [T]."""
        return self.fixed + float((mask_EL @ self.share_L)[self.averaged(expert_T)].mean()) / self.scale

    def masks(self, logits: Logits, keep_ratio: float) -> tuple[np.ndarray, np.ndarray]:
        """Probable masks with this keep ratio, and each timestep's best expert.

        Maximises Σ_el logit_el·m_el, the log-likelihood up to a constant, subject to a keep ratio within TOLERANCE and
        to at least one site in every expert that has a timestep; where the sites are too coarse for the tolerance, as
        near as the exchange of two sites comes. By a Lagrange multiplier on the cost, then local search
        (docs/method.md, "The budget").

        Returns: mask_EL bool [E, L], expert_T int64 [T]; the same for equal logits on every machine and rank.
        """
        logits_EL = logits.mask_EL.detach().double().cpu().numpy()
        expert_T = logits.router_TE.detach().argmax(-1).cpu().numpy()
        timesteps_E = np.bincount(self.averaged(expert_T), minlength=len(logits_EL))
        cost_EL = timesteps_E[:, None] / timesteps_E.sum() * self.share_L / self.scale
        serving_E = np.isin(np.arange(len(logits_EL)), expert_T)
        return _most_probable(logits_EL, cost_EL, serving_E, keep_ratio - self.fixed), expert_T

    def averaged(self, expert_T: np.ndarray) -> np.ndarray:
        """The experts of the timesteps over which the kept share is averaged, int64."""
        return expert_T if self.timesteps is None else expert_T[self.timesteps]


def _most_probable(logits_EL: np.ndarray, cost_EL: np.ndarray, serving_E: np.ndarray, target: float) -> np.ndarray:
    """Mask bool [E, L] of great Σ logit·m with Σ cost·m near the target and a site in every serving expert.

    Keep where logit > λ·cost, with the multiplier λ that comes nearest to the target; then try all changes of the
    entries that this decides most narrowly, and of the next ones while the target is missed.
    """
    logits, cost = logits_EL.ravel(), cost_EL.ravel()
    mask = (cost == 0) & (logits > 0)  # of experts that no counted timestep visits
    worth = np.divide(logits, cost, out=np.full_like(cost, -np.inf), where=cost > 0)
    order = np.argsort(-worth, kind="stable")[: np.count_nonzero(cost)]
    spent = np.concatenate([[0.0], cost[order].cumsum()])
    kept = int(np.abs(spent - target).argmin())
    mask[order[:kept]] = True
    mask_EL = mask.reshape(cost_EL.shape)
    empty = np.flatnonzero(serving_E & ~mask_EL.any(axis=1))
    mask_EL[empty, logits_EL[empty].argmax(axis=1)] = True
    multiplier = worth[order[max(kept - 1, 0)]]
    narrow = np.argsort(np.abs(logits - multiplier * cost), kind="stable")
    narrow = narrow[cost[narrow] > 0]  # what costs nothing cannot mend anything
    for size in _CORES:
        for first in range(0, len(narrow), size // 2):
            _choose(mask_EL, narrow[first : first + size], logits, cost, serving_E, target)
            if abs(cost @ mask_EL.ravel() - target) <= TOLERANCE:
                return mask_EL
    return mask_EL


def _choose(mask_EL: np.ndarray, core: np.ndarray, logits: np.ndarray, cost: np.ndarray, serving_E: np.ndarray,
            target: float) -> None:
    """Set the entries `core` of the mask, in place: the nearest to the target (up to TOLERANCE), then the likeliest."""
    mask, sites = mask_EL.ravel(), mask_EL.shape[1]
    mask[core] = False
    tried = (np.arange(2 ** len(core))[:, None] >> np.arange(len(core))) & 1  # [2^core, core]
    kept_E = mask_EL.sum(axis=1) + tried @ (core[:, None] // sites == np.arange(len(mask_EL)))
    allowed = (kept_E[:, serving_E] > 0).all(axis=1)
    missed = np.maximum(np.abs(cost @ mask + tried @ cost[core] - target) - TOLERANCE, 0.0)
    missed = np.where(allowed, missed.round(12), np.inf)
    best = np.lexsort((-(tried @ logits[core]), missed))[0]
    mask[core] = tried[best]
