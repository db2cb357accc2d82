"""Meeting the budget: the expected keep ratio under the noise, and the masks that hit the target.

Sampled masks are Bernoulli(sigmoid(logit)) and sampled routes Categorical(softmax(logits)), independent, so
the expected share of MACs has a closed form, which L_ratio uses. The deterministic masks are the most probable
ones, under that same distribution, whose share of MACs is the wanted one (docs/method.md, "The budget").
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.errors import InputError
from .hypernetwork import Logits

TOLERANCE = 0.004
_CORE = 10  # entries of the mask of which all combinations are tried


@dataclass(frozen=True)
class Budget:
    """The target p and the share of the total that each site costs, in MACs or in seconds.

    Attributes:
        share_L: cost of every site / total cost, float64 [L]; its sum is the prunable share.
        keep_ratio: p in (0, 1], in the unit named by `over`.
        over: "total", the whole backbone, or "prunable", its sites.
        timesteps: those over which the kept share is averaged, int64 [any]; None: every training timestep.

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
        """E[S] = fixed + mean_t Σ_e softmax(router)_te · Σ_l share_l · sigmoid(mask_el): the expected keep ratio.

        Returns: float32 scalar in `over`'s unit, differentiable with respect to both logits.
        """
        share_L = torch.as_tensor(self.share_L, dtype=torch.float32, device=logits.mask_EL.device)
        cost_E = logits.mask_EL.float().sigmoid() @ share_L / self.scale
        averaged = logits.router_TE if self.timesteps is None else logits.router_TE[self.timesteps]
        probability_E = averaged.float().softmax(dim=-1).mean(0)
        return self.fixed + probability_E @ cost_E

    def measured(self, mask_EL: np.ndarray, expert_T: np.ndarray) -> float:
        """The keep ratio of deterministic masks, in `over`'s unit.

        Args:
            mask_EL: bool [E, L]. expert_T: the expert of each training timestep, int64 [T].
        """
        return self.fixed + float((mask_EL @ self.share_L)[self.averaged(expert_T)].mean()) / self.scale

    def masks(self, logits: Logits, keep_ratio: float) -> tuple[np.ndarray, np.ndarray]:
        """Probable masks with this keep ratio, and the most probable expert of each timestep.

        They make Σ_el logit_el·m_el large, the log-likelihood up to a constant, subject to a keep ratio within
        TOLERANCE and to at least one site in every expert that has a timestep. Where the sites are too coarse for the
        tolerance, the keep ratio is the nearest that was found. By a Lagrange multiplier on the cost, then local search
        (docs/method.md, "The budget").

        Args:
            keep_ratio: the wanted share, in `over`'s unit.

        Returns: mask_EL bool [E, L], expert_T int64 [T]; the same for equal logits on every machine and process.
        """
        logits_EL = logits.mask_EL.detach().double().cpu().numpy()
        expert_T = logits.router_TE.detach().argmax(-1).cpu().numpy()
        timesteps_E = np.bincount(self.averaged(expert_T), minlength=len(logits_EL))
        cost_EL = timesteps_E[:, None] / timesteps_E.sum() * self.share_L / self.scale
        serving_E = np.isin(np.arange(len(logits_EL)), expert_T)
        return _most_probable(logits_EL, cost_EL, serving_E, keep_ratio - self.fixed), expert_T

    def averaged(self, expert_T: np.ndarray) -> np.ndarray:
        """The experts of the timesteps over which the kept share is averaged, int64 [T] or [len(timesteps)]."""
        return expert_T if self.timesteps is None else expert_T[self.timesteps]


def _most_probable(logits_EL: np.ndarray, cost_EL: np.ndarray, serving_E: np.ndarray, target: float) -> np.ndarray:
    """Mask bool [E, L] of large Σ logit·m with Σ cost·m near the target and a site in every serving expert.

    Keep where logit > λ·cost, with the multiplier λ that comes nearest to the target. Then try all 2^_CORE settings of
    the entries that this decides most narrowly, and of the next ones while the target is missed by more than TOLERANCE.

    Args:
        logits_EL: log-odds, float64. cost_EL: what keeping an entry adds to the keep ratio, float64.
        serving_E: bool; experts that need a site. target: of Σ cost·m.
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
    for first in range(0, len(narrow), _CORE // 2):
        core = narrow[first : first + _CORE]
        _choose(mask_EL, core, logits, cost, serving_E, target)
        if abs(cost @ mask_EL.ravel() - target) <= TOLERANCE:
            break
    return mask_EL


def _choose(mask_EL: np.ndarray, core: np.ndarray, logits: np.ndarray, cost: np.ndarray, serving_E: np.ndarray,
            target: float) -> None:
    """Set the entries `core` of the mask, in place: the nearest to the target (up to TOLERANCE), then the likeliest."""
    mask, sites = mask_EL.ravel(), mask_EL.shape[1]
    mask[core] = False
    tried = (np.arange(2 ** len(core))[:, None] >> np.arange(len(core))) & 1  # [2^CORE, CORE]
    kept_E = mask_EL.sum(axis=1) + tried @ (core[:, None] // sites == np.arange(len(mask_EL)))
    allowed = (kept_E[:, serving_E] > 0).all(axis=1)
    missed = np.maximum(np.abs(cost @ mask + tried @ cost[core] - target) - TOLERANCE, 0.0)
    missed = np.where(allowed, missed.round(12), np.inf)
    best = np.lexsort((-(tried @ logits[core]), missed))[0]
    mask[core] = tried[best]
