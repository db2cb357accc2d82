"""The forward process: timesteps, noising, and the target of each prediction type.

All randomness of an update is drawn on the CPU for the whole global batch from a generator that depends on
(seed, step) alone, and then sliced: the numbers are the same for any number of processes and micro-batches,
and a resumed run needs no stored generator state.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True)
class Draw:
    """What is random in one update, on the CPU, for the global batch.

    timesteps: long [B]. noise: float32 [B, C, H, W]. posterior: unit Gaussian float32 [B, C, H, W], the VAE's.
    dropped: bool [B], samples that lose their conditioning.
    """

    timesteps: Tensor
    noise: Tensor
    posterior: Tensor
    dropped: Tensor

    def __getitem__(self, rows: slice) -> "Draw":
        return Draw(self.timesteps[rows], self.noise[rows], self.posterior[rows], self.dropped[rows])


def generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The CPU generator of one step; `stream` separates independent uses within the step."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) % 2**63
    return torch.Generator().manual_seed(mixed)


def draw(batch_size: int, latent_shape: tuple[int, ...], num_timesteps: int, dropout: float,
         source: torch.Generator) -> Draw:
    """Timesteps uniform in [0, num_timesteps), unit Gaussian noise, conditioning dropped with `dropout`."""
    return Draw(
        torch.randint(num_timesteps, (batch_size,), generator=source),
        torch.randn(batch_size, *latent_shape, generator=source),
        torch.randn(batch_size, *latent_shape, generator=source),
        torch.rand(batch_size, generator=source) < dropout,
    )


def training_target(scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the backbone should output for `scheduler.config.prediction_type`, [B, C, H, W].

    Raises:
        InputError: for a prediction type other than epsilon, v_prediction and sample.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    raise InputError(f"scheduler.prediction_type={kind!r}: use epsilon, v_prediction or sample")
