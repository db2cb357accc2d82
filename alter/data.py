"""The order of a data set's samples: one stream of global batches, the same for any number of processes.

The stream is the concatenation of the epochs' permutations, functions of (seed, epoch), of which each process and
micro-batch takes its slice; a resumed run starts it at its step.
"""

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from .errors import InputError
from .images import Unreadable
from .sources import Source, WithPrior

SPARE_DRAWS = 100  # samples tried in place of an unreadable one


class Tolerant:
    """A source in which every sample can be read: another of `indices` takes the place of one that cannot.

    A sample has one more key, "skipped": a list of "name: reason" of what was unreadable, usually empty.
    """

    def __init__(self, source: Source, indices: np.ndarray, seed: int) -> None:
        self.source, self.indices, self.seed = source, indices, seed

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The sample at (epoch, index), or its substitute, which is a function of (seed, epoch, index).

        Raises:
            InputError: if none of SPARE_DRAWS substitutes can be read either.
        """
        epoch, index = key
        reasons: dict[int, str] = {}
        candidate = index
        for attempt in range(SPARE_DRAWS + 1):
            try:
                return {**self.source[epoch, candidate], "skipped": list(reasons.values())}
            except Unreadable as error:
                reasons[candidate] = f"{self.source.describe(candidate)}: {error}"
            draw = np.random.default_rng([self.seed, 5, epoch, index, attempt]).integers(len(self.indices))
            candidate = int(self.indices[draw])
        raise InputError(f"data.path: none of {len(reasons)} samples could be read: correct the data set; the first "
                         f"was {reasons[index]}")


def split(source: Source, holdout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and the `holdout` held-out ones, drawn with `seed`; a prior's pairs stay together."""
    group = 2 if isinstance(source, WithPrior) else 1
    if holdout >= len(source):
        raise InputError(f"data.holdout={holdout}: the data set has only {len(source)} samples: hold out fewer")
    if holdout % group:
        raise InputError(f"data.holdout={holdout}: with data.prior_path samples are held out in pairs: choose an even "
                         "number")
    groups = np.random.default_rng([seed, 1]).permutation(len(source) // group)
    order = (groups[:, None] * group + np.arange(group)).reshape(-1)
    return np.sort(order[holdout:]), np.sort(order[:holdout])


class GlobalBatches:
    """A batch sampler: the micro-batches of one process, from `first_step` to `last_step`.

    indices: training indices. batch_size: global. rank, processes: this process and their number.
    """

    def __init__(self, indices: np.ndarray, batch_size: int, micro_batches: int, rank: int, processes: int,
                 seed: int, first_step: int, last_step: int) -> None:
        self.indices, self.batch_size, self.seed = indices, batch_size, seed
        self.steps = range(first_step, last_step)
        size = batch_size // (micro_batches * processes)
        self.slices = [slice((rank * micro_batches + k) * size, (rank * micro_batches + k + 1) * size)
                       for k in range(micro_batches)]

    def __len__(self) -> int:
        return len(self.steps) * len(self.slices)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, self.indices
        for step in self.steps:
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // len(self.indices) != epoch:
                    epoch = position // len(self.indices)
                    order = np.random.default_rng([self.seed, 2, epoch]).permutation(self.indices)
                batch.append((epoch, int(order[position % len(self.indices)])))
            for rows in self.slices:
                yield batch[rows]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of samples: stacked tensors, "captions" as a list, and all their "skipped" as one flat list."""
    batch: dict[str, Any] = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name == "captions":
            batch[name] = values
        elif name == "skipped":
            batch[name] = [line for lines in values for line in lines]
        else:
            batch[name] = default_collate(values)
    return batch


def make_loader(source: Source | Tolerant, batches: Any, workers: int) -> DataLoader:
    """Load the samples that `batches` names, in `workers` processes."""
    dataset: Any = source
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available(),
                      collate_fn=collate, worker_init_fn=_leave_interrupts_to_the_trainer)


def _leave_interrupts_to_the_trainer(worker: int) -> None:
    """A terminal's Ctrl-C reaches the workers too; the trainer still needs them to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
