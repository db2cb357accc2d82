"""The hypernetwork H_Φ: experts' mask logits and the router's logits over timesteps.

Axes: E experts, L sites, T training timesteps.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .relaxation import gumbel_sigmoid, gumbel_softmax

_Z_WIDTH = 64


class Logits(NamedTuple):
    """mask_EL: log-odds of keeping a site, offset b included. router_TE: unnormalised log-probabilities of experts."""

    mask_EL: Tensor
    router_TE: Tensor


class ExpertGenerator(nn.Module):
    """Frozen orthogonal codes Z [E, L, 64] → one logit for each expert and site [E, L]."""

    def __init__(self, experts: int, sites: int) -> None:
        super().__init__()
        # In float64, so that the rounded codes do not depend on the number of threads.
        codes = nn.init.orthogonal_(torch.empty(experts * sites, _Z_WIDTH, dtype=torch.float64))
        self.register_buffer("Z_ELK", codes.float().view(experts, sites, _Z_WIDTH))
        self.net = nn.Sequential(
            nn.LayerNorm(_Z_WIDTH), nn.Linear(_Z_WIDTH, 256), nn.LayerNorm(256), nn.ReLU(),
            nn.Linear(256, 1, bias=False),
        )

    def forward(self) -> Tensor:
        return self.net(self.Z_ELK).squeeze(-1)


class TemporalRouter(nn.Module):
    """The backbone's sinusoid of every timestep [T, D] → logits of its experts [T, E]."""

    def __init__(self, experts: int, features_TD: Tensor) -> None:
        super().__init__()
        self.register_buffer("features_TD", features_TD)
        self.net = nn.Sequential(
            nn.Linear(features_TD.shape[1], 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, experts, bias=False)
        )

    def forward(self) -> Tensor:
        return self.net(self.features_TD)


class UniformRouter(nn.Module):
    """Equal fixed intervals: expert ⌊t·E/T⌋ with certainty (the paper's ablation `Manual`)."""

    logits_TE: Tensor

    def __init__(self, experts: int, num_timesteps: int) -> None:
        super().__init__()
        expert_T = torch.arange(num_timesteps) * experts // num_timesteps
        certain = nn.functional.one_hot(expert_T, experts).bool()
        self.register_buffer("logits_TE", torch.where(certain, 0.0, -torch.inf))

    def forward(self) -> Tensor:
        return self.logits_TE


class SharedRoutes(nn.Module):
    """A router of some timesteps, which serves all: timestep t has the logits of its row `index_T[t]`."""

    index_T: Tensor

    def __init__(self, router: nn.Module, index_T: Tensor) -> None:
        super().__init__()
        self.router = router
        self.register_buffer("index_T", index_T)

    def forward(self) -> Tensor:
        return self.router()[self.index_T]


class HyperNetwork(nn.Module):
    """Emits the experts' masks and the route of every timestep (ALTER, arXiv 2505.21817, Sec. 3).

    Args:
        experts: E >= 1.
        sites: L >= 1.
        features_TD: the backbone's sinusoidal embedding of every training timestep, float32 [T, D].
        router: "learned" or "uniform".
        tau: temperature of both relaxations, > 0.
        offset: b, added to every mask logit. It is kept per site as `offset_L`, float32 [L], which
            `sensitivity.start_near` changes.
    """

    offset_L: Tensor

    def __init__(self, experts: int, sites: int, features_TD: Tensor,
                 router: str = "learned", tau: float = 0.4, offset: float = 4.0) -> None:
        super().__init__()
        self.tau = tau
        self.expert_generator = ExpertGenerator(experts, sites)
        self.register_buffer("offset_L", torch.full((sites,), float(offset)))
        self.temporal_router: nn.Module = (
            TemporalRouter(experts, features_TD) if router == "learned" else UniformRouter(experts, len(features_TD))
        )

    def forward(self) -> Logits:
        """The logits, float32: mask_EL [E, L], router_TE [T, E]."""
        return Logits(self.expert_generator() + self.offset_L, self.temporal_router())

    def sample(self, logits: Logits, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """Straight-through samples: mask_EL float32 [E, L] of zeros and ones, one-hot router_TE float32 [T, E].

        noise: CPU generator.
        """
        return (
            gumbel_sigmoid(logits.mask_EL, self.tau, noise),
            gumbel_softmax(logits.router_TE, self.tau, noise),
        )
