"""Routers: which expert serves which training timestep, as logits over experts.

Axes: E experts, T training timesteps, D features, K = E - 1 cut points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad, softplus

SLOW = 200  # timesteps, the shortest period of what the smooth router sees
_LEAST_WIDTH = 1e-3  # of an expert between two cut points, in units of `OrderedRouter`


@dataclass(frozen=True)
class Times:
    """What routers know of the training timesteps.

    Attributes:
        features_TD: what a learned router sees, float32 [T, D]: the backbone's sinusoidal embedding, or
            `slow_features` for a smooth one.
        log_snr_T: log signal-to-noise ratio, float32 [T], which does not rise from one trained timestep to the next; of
            one that is not trained, that of the timestep whose expert serves it.
        weight_T: of the budget (`timestep_weights`), of sum 1, float64 [T].
        place_T: the rank among the trained timesteps, from 0 on, of the one whose expert serves each, int64 [T].
    """

    features_TD: Tensor
    log_snr_T: Tensor
    weight_T: np.ndarray
    place_T: Tensor


def make_router(kind: str, experts: int, times: Times) -> nn.Module:
    """A fresh "learned", "smooth", "ordered" or "uniform" router of E experts, whose `forward()` gives float32 logits
    [T, E]."""
    if kind == "learned":
        return TemporalRouter(experts, times.features_TD)
    if kind == "smooth":
        return SmoothRouter(experts, times.features_TD, times.weight_T)
    if kind == "ordered" and experts > 1:
        return OrderedRouter(experts, times)
    return UniformRouter(experts, times.place_T)


def slow_features(num_timesteps: int) -> Tensor:
    """Sine and cosine of eight periods from SLOW timesteps on, each twice the one before: float32 [T, 16]."""
    angle_TP = 2 * torch.pi * torch.arange(num_timesteps)[:, None] / (SLOW * 2.0 ** torch.arange(8))
    return torch.cat([angle_TP.sin(), angle_TP.cos()], dim=1)


class TemporalRouter(nn.Module):
    """Features of every timestep [T, D] → logits of its experts [T, E]."""

    def __init__(self, experts: int, features_TD: Tensor) -> None:
        super().__init__()
        self.register_buffer("features_TD", features_TD)
        self.net = nn.Sequential(
            nn.Linear(features_TD.shape[1], 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, experts, bias=False)
        )

    def forward(self) -> Tensor:
        return self.net(self.features_TD)


class SmoothRouter(TemporalRouter):
    """A `TemporalRouter` on `slow_features`, whose logits begin with mean zero over the budget's weights [T], expert by
    expert, so that none begins with nearly all timesteps."""

    mean_E: Tensor

    def __init__(self, experts: int, features_TD: Tensor, weight_T: np.ndarray) -> None:
        super().__init__(experts, features_TD)
        self.register_buffer("mean_E", torch.from_numpy(weight_T).float() @ super().forward().detach())

    def forward(self) -> Tensor:
        return super().forward() - self.mean_E


class UniformRouter(nn.Module):
    """Equal fixed intervals of the trained timesteps: expert ⌊t·E/T⌋ with certainty (the paper's ablation `Manual`)."""

    logits_TE: Tensor

    def __init__(self, experts: int, place_T: Tensor) -> None:
        super().__init__()
        expert_T = place_T * experts // (int(place_T.max()) + 1)
        certain = nn.functional.one_hot(expert_T, experts).bool()
        self.register_buffer("logits_TE", torch.where(certain, 0.0, -torch.inf))

    def forward(self) -> Tensor:
        return self.logits_TE


class OrderedRouter(nn.Module):
    """E - 1 ordered cut points on the noise level x = -log-SNR: expert e serves the timesteps between two of them.

    P(e | x) = F((x - c_e) / s) - F((x - c_{e+1}) / s), with F the logistic distribution function, c_0 = -∞ and c_E = ∞
    (McCullagh 1980, "Regression Models for Ordinal Data", Sec. 2). The logistic density is log-concave, so for two
    experts the ratio of their probabilities is monotone in x: the most probable expert never falls as x rises.
    Cut points are ordered since each adds a positive distance to the one before. Lengths are in units of √12·std(x)/E,
    an expert's interval if x were uniform; s is a quarter of this, or of the least distance of the first cut points if
    that is less, and is not trained. What is trained begins at zero.

    Args:
        experts: E > 1. They begin with shares of the budget's weights that are as equal as the timesteps allow.
    """

    x_T: Tensor
    unit: Tensor
    scale: Tensor
    start_K: Tensor

    def __init__(self, experts: int, times: Times) -> None:
        super().__init__()
        x_T, weight_T = -times.log_snr_T.double(), torch.from_numpy(times.weight_T)
        mean = weight_T @ x_T
        unit = (12 * (weight_T @ (x_T - mean) ** 2)).sqrt() / experts
        self.register_buffer("unit", (unit if unit > 0 else torch.ones(())).float())
        self.register_buffer("x_T", x_T.float())
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("start_K", torch.zeros(experts - 1))
        self.moved_K = nn.Parameter(torch.zeros(experts - 1))
        self.place(self._equal(times.weight_T, experts))

    def place(self, borders: Sequence[int]) -> None:
        """Begin with expert k serving the timesteps from borders[k - 1] up to, not including, borders[k], as nearly as
        x differs there.

        borders: of length E - 1, rising, in [1, T).
        """
        possible = self._borders()
        after = possible[(possible - torch.as_tensor(borders, device=possible.device)[:, None]).abs().argmin(dim=1)]
        cut_K = (self.x_T[after - 1] + self.x_T[after]).double() / (2 * self.unit.double())
        widths = (cut_K.diff() - _LEAST_WIDTH).clamp(min=_LEAST_WIDTH)
        self.scale.fill_(min(1.0, *(widths + _LEAST_WIDTH).tolist(), 1.0) / 4)
        self.start_K.copy_(torch.cat([cut_K[:1], widths + (-(-widths).expm1()).log()]))  # softplus, inverted

    def _borders(self) -> Tensor:
        """Timesteps that differ in x from the one before, int64; where none does, the last."""
        possible = (self.x_T.diff() > 0).nonzero().flatten() + 1
        return possible if len(possible) else torch.tensor([len(self.x_T) - 1], device=self.x_T.device)

    def _equal(self, weight_T: np.ndarray, experts: int) -> list[int]:
        """The borders, distinct as far as there are enough, that split the weights most evenly: [E - 1]."""
        possible = self._borders().numpy()
        passed = weight_T @ (self.x_T[:, None] < self.x_T[possible]).numpy()
        chosen: list[int] = []
        for k in range(1, experts):
            first = min(chosen[-1] + 1 if chosen else 0, len(possible) - 1)
            last = max(len(possible) - (experts - 1 - k), first + 1)
            chosen.append(first + int(np.abs(passed[first:last] - k / experts).argmin()))
        return possible[chosen].tolist()

    def forward(self) -> Tensor:
        first, widths = (self.start_K + self.moved_K).split([1, len(self.start_K) - 1])
        widths = softplus(widths) + _LEAST_WIDTH
        cut_K = torch.cat([first, first + widths.cumsum(0)])
        z_TK = (self.x_T[:, None] / self.unit - cut_K) / self.scale
        # F(a) - F(b) = F(a)·F(-b)·(1 - exp(b - a)), which loses no digits in the tails.
        between = (-(-widths / self.scale).expm1()).log()
        return pad(logsigmoid(z_TK), (1, 0)) + pad(logsigmoid(-z_TK), (0, 1)) + pad(between, (1, 1))
