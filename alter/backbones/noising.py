"""Two forward processes with one interface: noise by betas (DDPM), and rectified flow.

A *timestep* is what the backbone is told; its *row* is the training timestep, 0 to T-1, by which experts are chosen.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_GREATEST_LOG_SNR = 20.0  # in size, of latents without noise and of noise without latents


@dataclass(frozen=True, eq=False)
class Betas:
    """DDPM's forward process (Ho et al. 2020, arXiv 2006.11239, eq. 4).

    Attributes:
        alphas_cumprod: ᾱ, float32 [T].
        prediction_type: what the backbone outputs, one of PREDICTION_TYPES.
        min_snr_gamma: γ > 0 of the denoising error's weights; None: all weigh the same.
        visited: timesteps to draw from, each as often; None: all.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"
    min_snr_gamma: float | None = None
    visited: tuple[int, ...] | None = None

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> "Betas":
        """With ᾱ on a device, so that noising there copies nothing."""
        return dataclasses.replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def timesteps(self, count: int, source: torch.Generator) -> Tensor:
        """Drawn uniformly from the integers of [0, T), or from `visited`: int64 [count]."""
        if self.visited is not None:
            return _drawn(self.visited, count, source)
        return torch.randint(self.num_timesteps, (count,), generator=source)

    @property
    def trained(self) -> Tensor:
        """The rows that training visits, int64 [any], ascending."""
        return torch.arange(self.num_timesteps) if self.visited is None else torch.tensor(self.visited).unique()

    def at(self, rows: Tensor) -> Tensor:
        """The timesteps of rows, which they are themselves."""
        return rows

    def rows(self, timesteps: Tensor) -> Tensor:
        """The rows of timesteps, int64 [B]."""
        return timesteps

    def log_snr(self, timesteps: Tensor) -> Tensor:
        """log ᾱ/(1-ᾱ), which falls with the timestep: float32 [B] in [-20, 20]."""
        alpha = self.alphas_cumprod.to(timesteps.device, torch.float64)[timesteps]
        return alpha.logit().clamp(-_GREATEST_LOG_SNR, _GREATEST_LOG_SNR).float()

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(ᾱ)·latents + sqrt(1-ᾱ)·noise.

        Args:
            latents, noise: [B, ...]. timesteps: int64 [B], on their device.
        """
        signal, spread = self._scales(latents, timesteps)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the backbone should output: the noise, the velocity sqrt(ᾱ)·noise - sqrt(1-ᾱ)·latents (Salimans and Ho
        2022, arXiv 2202.00512, Sec. 4) or the latents; arguments as of `noised`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal, spread = self._scales(latents, timesteps)
        return signal * noise - spread * latents

    def weight(self, timesteps: Tensor) -> Tensor | None:
        """Weight of each sample's denoising error, float32 [B], None: 1 (Hang et al., arXiv 2303.09556, eq. 7).

        With SNR = ᾱ/(1-ᾱ), min(SNR, γ) in the error of the clean latents is min(SNR, γ)/SNR in that of the noise and
        min(SNR, γ)/(SNR + 1) in that of the velocity. ᾱ = 0 (a zero-terminal schedule) has finite weights.
        """
        if self.min_snr_gamma is None:
            return None
        alpha = self.alphas_cumprod.to(timesteps.device, torch.float64)[timesteps]
        clipped = torch.minimum(alpha, self.min_snr_gamma * (1 - alpha))  # min(SNR, γ)·(1 - ᾱ)
        if self.prediction_type == "v_prediction":
            return clipped.float()
        clean = self.prediction_type == "sample"
        return (clipped / (1 - alpha) if clean else torch.where(alpha > 0, clipped / alpha, 1.0)).float()

    def _scales(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alpha = _along(self.alphas_cumprod.to(like.device, like.dtype)[timesteps], like)
        return alpha**0.5, (1 - alpha) ** 0.5


@dataclass(frozen=True)
class Flow:
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003, eq. 1) as Stable Diffusion 3 trains it (Esser et al. 2024,
    arXiv 2403.03206, from here on "SD3").

    Attributes:
        num_timesteps: T; timesteps are t = T·σ, float32 in (0, T].
        shift: s > 0 of `shifted`.
        density: of σ before the shift: "uniform"; "logit_normal", the sigmoid of a Gaussian of logit_mean and
            logit_std; "mode", more in the middle for mode_scale > 0 and more at the ends below 0.
        weighting: of the denoising error: "none", "sigma_sqrt" or "cosmap".
        visited: timesteps to draw from, each as often, in place of `density` and `shift`; None: all.
        within: timesteps are drawn from those of low <= t < high alone, with the same density there; None: from all.
    """

    num_timesteps: int
    shift: float = 1.0
    density: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    weighting: str = "none"
    visited: tuple[float, ...] | None = None
    within: tuple[float, float] | None = None

    def to(self, device: torch.device | str) -> "Flow":
        """Itself: nothing of it is on a device."""
        return self

    def timesteps(self, count: int, source: torch.Generator) -> Tensor:
        """T times the shifted σ of `density`, float32 [count]; before the shift σ is 1/T or more, as in samplers.
        Or from `visited`."""
        if self.visited is not None:
            return _drawn(self.visited, count, source)
        timesteps = self._any(count, source)
        while len(others := (~self.serves(timesteps)).nonzero()[:, 0]):
            timesteps[others] = self._any(len(others), source)
        return timesteps

    def serves(self, timesteps: Tensor) -> Tensor:
        """Which of them are `within`, bool [B]."""
        low, high = self.within or (-math.inf, math.inf)
        return (timesteps >= low) & (timesteps < high)

    @property
    def trained(self) -> Tensor:
        """The rows that training visits, int64 [any], ascending."""
        if self.visited is not None:
            return self.rows(torch.tensor(self.visited)).unique()
        rows = torch.arange(self.num_timesteps)
        return rows[self.serves(rows)]

    def _any(self, count: int, source: torch.Generator) -> Tensor:
        """Timesteps of `density` and `shift`."""
        if self.density == "logit_normal":  # SD3, Sec. 3.1, "Logit-Normal Sampling"
            normal = torch.randn(count, generator=source)
            sigma = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        else:
            sigma = torch.rand(count, generator=source)
            if self.density == "mode":  # SD3, Sec. 3.1, "Mode Sampling with Heavy Tails"
                sigma = 1 - sigma - self.mode_scale * (torch.cos(math.pi * sigma / 2) ** 2 - 1 + sigma)
        return self.num_timesteps * self.shifted(sigma.clamp(1 / self.num_timesteps, 1.0))

    def shifted(self, sigma: Tensor) -> Tensor:
        """s·σ / (1 + (s-1)·σ), in (0, 1]: with s > 1 more noise (SD3, Sec. 5.3.2, "Resolution-dependent shifting")."""
        return (self.shift * sigma / (1 + (self.shift - 1) * sigma)).clamp(max=1.0)

    def at(self, rows: Tensor) -> Tensor:
        """The timesteps of rows, float32."""
        return rows.float()

    def rows(self, timesteps: Tensor) -> Tensor:
        """The nearest training timesteps, int64 [B]."""
        return timesteps.round().long().clamp(0, self.num_timesteps - 1)

    def log_snr(self, timesteps: Tensor) -> Tensor:
        """2·log((1-σ)/σ), which falls with the timestep: float32 [B] in [-20, 20]."""
        sigma = timesteps.double() / self.num_timesteps
        return (-2 * sigma.logit()).clamp(-_GREATEST_LOG_SNR, _GREATEST_LOG_SNR).float()

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1-σ)·latents + σ·noise (SD3, eq. 13).

        Args:
            latents, noise: [B, ...]. timesteps: float32 [B], on their device.
        """
        sigma = _along((timesteps / self.num_timesteps).to(latents.dtype), latents)
        return sigma * noise + (1 - sigma) * latents

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The flow's velocity, noise - latents (Liu et al., eq. 1, with time from data to noise)."""
        return noise - latents

    def weight(self, timesteps: Tensor) -> Tensor | None:
        """Weight of each sample's denoising error, float32 [B]; None: 1.

        sigma_sqrt: 1/σ², the error in units of the noise's standard deviation (diffusers'
        `compute_loss_weighting_for_sd3`). cosmap: 2 / (π·(1 - 2σ + 2σ²)) (SD3, Sec. 3.1, "CosMap").
        """
        if self.weighting == "none":
            return None
        sigma = timesteps / self.num_timesteps
        if self.weighting == "sigma_sqrt":
            return sigma**-2.0
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


Noising = Betas | Flow


def edges_of(noising: Noising, bins: int, weight_T: np.ndarray | None = None) -> np.ndarray:
    """Borders [B+1] of at most `bins` bins of training timesteps, from 0 to T, that share `noising.trained` evenly.

    A border lies halfway between two trained rows, so that the rows between them are in the bin of the nearest.

    weight_T: of the timesteps, float64 [T], of which bins have equal shares, one that is not trained with the nearest
        that is; None: all trained ones weigh the same.
    """
    trained = noising.trained.numpy()
    nearest_T = np.abs(np.arange(noising.num_timesteps)[:, None] - trained).argmin(axis=1)
    weights = np.ones(len(trained)) if weight_T is None else np.bincount(nearest_T, weight_T, len(trained))
    passed = np.concatenate([[0.0], weights.cumsum() / weights.sum()])
    firsts = np.searchsorted(passed, np.linspace(0, 1, bins + 1)[1:-1] - 1e-9)
    firsts = np.unique(firsts[(firsts > 0) & (firsts < len(trained))])
    inner = (trained[firsts - 1] + trained[firsts]) // 2 + 1
    return np.concatenate([[0], inner, [noising.num_timesteps]])


def _drawn(visited: Sequence[float], count: int, source: torch.Generator) -> Tensor:
    return torch.tensor(visited)[torch.randint(len(visited), (count,), generator=source)]


def _along(values: Tensor, like: Tensor) -> Tensor:
    """Values [B] in the shape [B, 1, ...] of `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))
