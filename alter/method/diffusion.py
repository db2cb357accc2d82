"""The forward process: what is random in an update, noising, and the target of each prediction type.

All randomness is drawn on the CPU. Timesteps and dropped conditions of the whole global batch depend on (seed, step)
alone, so that every process knows them all; the noise of a sample depends on (seed, step, its place in the global
batch), and a process draws that of its own samples. So the numbers are the same for any number of processes and
micro-batches, and a resumed run needs no stored generator state.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Draw:
    """What is random in one update, on the CPU, for B samples of the global batch.

    Attributes:
        timesteps: training timesteps, int64 [B].
        dropped: bool [B]; samples that lose their conditioning.
        key: (seed, step, stream). samples: places of these samples in the global batch, of length B.
    """

    timesteps: Tensor
    dropped: Tensor
    key: tuple[int, int, int]
    samples: range

    def __getitem__(self, rows: slice) -> "Draw":
        return Draw(self.timesteps[rows], self.dropped[rows], self.key, self.samples[rows])

    def noise(self, shape: tuple[int, ...], offset: float = 0.0) -> Tensor:
        """Unit Gaussian, float32 [B, *shape].

        Args:
            shape: of one sample's latents. offset: standard deviation of a further term, constant over each channel of
                latents [C, ...].
        """
        noise = gaussian(shape, self.samples, *self.key)
        if offset:
            noise += offset * gaussian((shape[0], *[1] * (len(shape) - 1)), self.samples, *self.key, use=1)
        return noise

    def posterior(self, shape: tuple[int, ...]) -> Tensor:
        """Unit Gaussian, float32 [B, *shape], with which latents are sampled from the VAE's moments."""
        return gaussian(shape, self.samples, *self.key, use=2)


def generator(seed: int, step: int, stream: int = 0, *within: int) -> torch.Generator:
    """The CPU generator of one step, a function of (seed, step, stream, within); `stream` separates uses of a step."""
    state = np.random.SeedSequence((seed, step, stream), spawn_key=within).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def gaussian(shape: tuple[int, ...], samples: Iterable[int], seed: int, step: int, stream: int = 0,
             use: int = 0) -> Tensor:
    """Unit Gaussian, float32 [B, *shape]; that of each of the B `samples` depends on its number, not on the others.

    Args:
        seed, step, stream: as for `generator`. use: separates uses for one sample.
    """
    return torch.stack([torch.randn(shape, generator=generator(seed, step, stream, sample, use))
                        for sample in samples])


def draw(batch_size: int, num_timesteps: int, dropout: float, seed: int, step: int, stream: int = 0) -> Draw:
    """Timesteps uniform in [0, num_timesteps) and dropped conditions of a global batch; its noise is yet to be drawn.

    Args:
        batch_size: B. dropout: probability in [0, 1] of dropping a sample's conditioning.
        seed, step, stream: as for `generator`.
    """
    source = generator(seed, step, stream)
    return Draw(torch.randint(num_timesteps, (batch_size,), generator=source),
                torch.rand(batch_size, generator=source) < dropout, (seed, step, stream), range(batch_size))


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
