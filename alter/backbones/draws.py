"""What is random in an update.

All randomness is drawn on the CPU. Timesteps and dropped conditions of the whole global batch depend on (seed, step)
alone, so that every process knows them all; the noise of a sample, and what its masks and route are drawn with, depend
on (seed, step, its place in the global batch), and a process draws that of its own samples. So the numbers are the same
for any number of processes and micro-batches, and a resumed run needs no stored generator state.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .noising import Noising


@dataclass(frozen=True)
class Draw:
    """What is random in one update, on the CPU, for B samples of the global batch.

    Attributes:
        timesteps: what the backbone is told, [B]; int64 for `Betas`, float32 for a `Flow`.
        rows: the training timesteps by which experts are chosen, int64 [B].
        dropped: bool [B]; samples that lose their conditioning.
        key: (seed, step, stream). samples: places of these samples in the global batch, of length B.
    """

    timesteps: Tensor
    rows: Tensor
    dropped: Tensor
    key: tuple[int, int, int]
    samples: range

    def __getitem__(self, rows: slice) -> "Draw":
        return Draw(self.timesteps[rows], self.rows[rows], self.dropped[rows], self.key, self.samples[rows])

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

    def uniform(self, shape: tuple[int, ...], stream: int, use: int = 0) -> Tensor:
        """Uniform in [0, 1), float32 [B, *shape]; `stream` and `use` as for `gaussian`."""
        seed, step, _ = self.key
        return torch.stack([torch.rand(shape, generator=generator(seed, step, stream, sample, use))
                            for sample in self.samples])


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


def draw(noising: Noising, batch_size: int, dropout: float, seed: int, step: int, stream: int = 0) -> Draw:
    """Timesteps and dropped conditions of a global batch; its noise is yet to be drawn.

    Args:
        batch_size: B. dropout: probability in [0, 1] of dropping a sample's conditioning.
        seed, step, stream: as for `generator`.
    """
    source = generator(seed, step, stream)
    timesteps = noising.timesteps(batch_size, source)
    return Draw(timesteps, noising.rows(timesteps), torch.rand(batch_size, generator=source) < dropout,
                (seed, step, stream), range(batch_size))


