"""The hypernetwork H_Φ: experts' mask logits and the router's logits over timesteps.

Axes: B samples, E experts, L sites, T training timesteps.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .relaxation import gumbel_sigmoid, gumbel_softmax
from .routers import Times, make_router

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


class HyperNetwork(nn.Module):
    """Emits the experts' masks and the route of every timestep (ALTER, arXiv 2505.21817, Sec. 3).

    Args:
        experts: E >= 1.
        sites: L >= 1.
        times: what is known of the training timesteps.
        router: as for `make_router`.
        tau: temperature of both relaxations, > 0.
        offset: b, added to every mask logit. It is kept per expert and site as `offset_EL`, float32 [E, L], which
            `sensitivity.start_near` changes.
    """

    offset_EL: Tensor

    def __init__(self, experts: int, sites: int, times: Times, router: str = "learned", tau: float = 0.4,
                 offset: float = 4.0) -> None:
        super().__init__()
        self.tau = tau
        self.expert_generator = ExpertGenerator(experts, sites)
        self.register_buffer("offset_EL", torch.full((experts, sites), float(offset)))
        self.temporal_router = make_router(router, experts, times)

    def forward(self) -> Logits:
        """The logits, float32: mask_EL [E, L], router_TE [T, E]."""
        return Logits(self.expert_generator() + self.offset_EL, self.temporal_router())

    def sample(self, logits: Logits, noise: torch.Generator) -> Logits:
        """One straight-through draw for all samples: mask_EL float32 [E, L] of zeros and ones, one-hot router_TE
        float32 [T, E].

        noise: CPU generator.
        """
        mask_EL, router_TE = logits
        return Logits(gumbel_sigmoid(mask_EL, self.tau, torch.rand(mask_EL.shape, generator=noise)),
                      gumbel_softmax(router_TE, self.tau, torch.rand(router_TE.shape, generator=noise)))

    def sample_each(self, logits: Logits, rows: Tensor, uniform_BEK: Tensor) -> Tensor:
        """Straight-through draws of masks and a route for each sample: mask_BL float32 [B, L] of zeros and ones, those
        of the expert that is drawn.

        Args:
            logits: of any device. rows: training timesteps of the samples, int64 [B], on that device.
            uniform_BEK: float32 [B, E, L + 1] in [0, 1): of the masks, and last of the routes.
        """
        mask_BEL = gumbel_sigmoid(logits.mask_EL, self.tau, uniform_BEK[..., :-1])
        route_BE = gumbel_softmax(logits.router_TE[rows], self.tau, uniform_BEK[..., -1])
        return torch.einsum("be,bel->bl", route_BE, mask_BEL)
