"""Meeting the budget: the expected keep ratio under the noise, and the masks that hit the target.

Sampled masks are Bernoulli(sigmoid(logit)) and sampled routes Categorical(softmax(logits)), independent, so
the expected share of MACs has a closed form, which L_ratio uses. The deterministic masks are the most probable
ones, under that same distribution, whose share of MACs is what it should be (docs/method.md, "The budget").
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from ..common.errors import InputError
from .hypernetwork import Logits

TOLERANCE = 0.004


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
        """The most probable masks (log-likelihood within 1%) with this keep ratio, and each timestep's best expert.

        Maximises Σ_el logit_el·m_el, the log-likelihood up to a constant, subject to a keep ratio within
        TOLERANCE and to at least one site in every expert that has a timestep. Where the sites are too
        coarse for the tolerance, it first finds how near one can get, and then the most probable of those.

        Returns: mask_EL bool [E, L], expert_T int64 [T]; the same for equal logits on every machine and rank.
        """
        logits_EL = logits.mask_EL.detach().double().cpu().numpy()
        expert_T = logits.router_TE.detach().argmax(-1).cpu().numpy()
        experts, sites = logits_EL.shape
        averaged = self.averaged(expert_T)
        timesteps_E = np.bincount(averaged, minlength=experts)
        cost = (timesteps_E[:, None] / len(averaged) * self.share_L / self.scale).ravel()
        alive = np.kron(np.eye(experts)[np.unique(expert_T)], np.ones(sites))
        target = keep_ratio - self.fixed

        mask = _most_probable(logits_EL.ravel(), cost, alive, target, TOLERANCE)
        if mask is None:
            nearest = _smallest_deviation(cost, alive, target)
            mask = _most_probable(logits_EL.ravel(), cost, alive, target, nearest + 1e-6)
        assert mask is not None, "at least one site an expert is always feasible"
        return mask.reshape(experts, sites), expert_T

    def averaged(self, expert_T: np.ndarray) -> np.ndarray:
        """The experts of the timesteps over which the kept share is averaged, int64."""
        return expert_T if self.timesteps is None else expert_T[self.timesteps]


def _most_probable(logits: np.ndarray, cost: np.ndarray, alive: np.ndarray, target: float,
                   tolerance: float) -> np.ndarray | None:
    constraints = [
        LinearConstraint(cost[None], target - tolerance, target + tolerance),
        LinearConstraint(alive, 1, np.inf),
    ]
    result = milp(-logits, constraints=constraints, integrality=np.ones_like(logits), bounds=Bounds(0, 1),
                  options={"mip_rel_gap": 1e-2, "node_limit": 20_000})
    return None if result.x is None else result.x > 0.5


def _smallest_deviation(cost: np.ndarray, alive: np.ndarray, target: float) -> float:
    """min |cost·m - target| over allowed masks m, as a linear programme with the deviation as last variable."""
    n = len(cost)
    constraints = [
        LinearConstraint(np.append(cost, 1.0)[None], target, np.inf),
        LinearConstraint(np.append(cost, -1.0)[None], -np.inf, target),
        LinearConstraint(np.hstack([alive, np.zeros((len(alive), 1))]), 1, np.inf),
    ]
    result = milp(np.append(np.zeros(n), 1.0), constraints=constraints, integrality=np.append(np.ones(n), 0),
                  bounds=Bounds(0, 1), options={"mip_rel_gap": 1e-3, "node_limit": 20_000})
    assert result.x is not None, "the deviation is unbounded above, so some mask is feasible"
    return float(abs(cost @ (result.x[:n] > 0.5) - target))
