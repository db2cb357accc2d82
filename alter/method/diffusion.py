"""The forward process: timesteps, noising, and the target of each prediction type.

All randomness of an update is drawn on the CPU for the whole global batch from a generator that depends on
(seed, step) alone, and then sliced: the numbers are the same for any number of processes and micro-batches,
and a resumed run needs no stored generator state.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Draw:
    """What is random in one update, on the CPU, for the global batch of B samples.

    Attributes:
        timesteps: training timesteps, int64 [B].
        noise: float32 [B, C, H, W].
        posterior: unit Gaussian, float32 [B, C, H, W], with which latents are sampled from the VAE's moments.
        dropped: bool [B]; samples that lose their conditioning.
    """

    timesteps: Tensor
    noise: Tensor
    posterior: Tensor
    dropped: Tensor

    def __getitem__(self, rows: slice) -> "Draw":
        return Draw(self.timesteps[rows], self.noise[rows], self.posterior[rows], self.dropped[rows])


def generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The CPU generator of one step, a function of (seed, step, stream); `stream` separates uses within the step."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) % 2**63
    return torch.Generator().manual_seed(mixed)


def draw(batch_size: int, latent_shape: tuple[int, ...], num_timesteps: int, dropout: float,
         source: torch.Generator, noise_offset: float = 0.0) -> Draw:
    """Timesteps uniform in [0, num_timesteps), unit Gaussian noise, conditioning dropped.

    Args:
        batch_size: B. latent_shape: of one sample, (C, H, W).
        dropout: probability in [0, 1] of dropping a sample's conditioning.
        source: CPU generator.
        noise_offset: standard deviation of a further term that is constant over each channel of `noise`.
    """
    drawn = Draw(
        torch.randint(num_timesteps, (batch_size,), generator=source),
        torch.randn(batch_size, *latent_shape, generator=source),
        torch.randn(batch_size, *latent_shape, generator=source),
        torch.rand(batch_size, generator=source) < dropout,
    )
    offset = torch.randn(batch_size, latent_shape[0], 1, 1, generator=source)
    return dataclasses.replace(drawn, noise=drawn.noise + noise_offset * offset)


def training_target(scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the backbone should output for `scheduler.config.prediction_type`, one of PREDICTION_TYPES.

    Args:
        latents, noise: [B, C, H, W]. timesteps: int64 [B], on their device.

    Returns: [B, C, H, W], the noise, the velocity (Salimans and Ho 2022, arXiv 2202.00512) or the latents.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    return scheduler.get_velocity(latents, noise, timesteps) if kind == "v_prediction" else latents


def min_snr_weight(scheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Weight of each sample's denoising error, float32 [B] (Hang et al., arXiv 2303.09556, eq. 7 and Sec. 3.4).

    With SNR = ᾱ/(1-ᾱ), min(SNR, γ) in the error of the clean latents is min(SNR, γ)/SNR in that of the noise and
    min(SNR, γ)/(SNR + 1) in that of the velocity. ᾱ = 0 (a zero-terminal schedule) has finite weights.

    Args:
        timesteps: int64 [B]. gamma: γ > 0.
    """
    alpha = scheduler.alphas_cumprod.to(timesteps.device, torch.float64)[timesteps]
    clipped = torch.minimum(alpha, gamma * (1 - alpha))  # min(SNR, γ)·(1 - ᾱ)
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        weight = clipped
    else:
        weight = clipped / (1 - alpha) if kind == "sample" else torch.where(alpha > 0, clipped / alpha, 1.0)
    return weight.float()
