"""The order of a data set's samples: one stream of global batches, the same for any number of processes.

The stream is the concatenation of the epochs' orders, which are functions of (seed, epoch). Each process and
micro-batch takes its slice of every global batch; a resumed run starts the stream at its step.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from ..common.errors import InputError
from .images import Unreadable
from .open import Source, WithPrior

SPARE_DRAWS = 100  # samples tried in place of an unreadable one
MOST_HELD_OUT = 256  # samples, unless told


@dataclass(frozen=True)
class Fit:
    """What the backbone requires of a sample.

    Attributes:
        latent_shape: of one sample, [C, h, w], [C, F, h, w] or [tokens, C]; None where samples have several.
        classes: labels must be below it; None: not checked.
        text_shape: (tokens, D) of encoder_hidden_states, if they are stored.
    """

    latent_shape: tuple[int, ...] | None
    classes: int | None = None
    text_shape: tuple[int, ...] | None = None

    def check(self, sample: dict[str, Any]) -> None:
        """Raises Unreadable unless the sample fits and all its numbers are finite."""
        first, *others = self.latent_shape or (0,)
        for name, shape in (("latents", (first, *others)), ("moments", (2 * first, *others))):
            if self.latent_shape and name in sample and tuple(sample[name].shape) != shape:
                raise Unreadable(f"{name} of shape {tuple(sample[name].shape)} do not fit the backbone's {shape}")
        for name in ("latents", "moments", "encoder_hidden_states", "conditioning"):
            values = [value for value in tree_leaves(sample.get(name)) if isinstance(value, Tensor)]
            if not all(value.isfinite().all() for value in values):
                raise Unreadable(f"{name}: not finite")
        if self.classes is not None and "labels" in sample and not 0 <= sample["labels"] < self.classes:
            raise Unreadable(f"class {sample['labels']}: the backbone knows {self.classes}")
        if "encoder_hidden_states" in sample and tuple(sample["encoder_hidden_states"].shape) != self.text_shape:
            raise Unreadable(f"text states of shape {tuple(sample['encoder_hidden_states'].shape)}: those of the empty "
                             f"prompt have {self.text_shape}")


class WithSubstitutes:
    """A source that replaces unusable samples, each by another one of `indices`.

    A sample has one more key, "skipped": a list of "name: reason" of the samples it replaces, usually empty.
    """

    def __init__(self, source: Source, indices: np.ndarray, seed: int, fit: Fit | None = None) -> None:
        self.source, self.indices, self.seed, self.fit = source, indices, seed, fit

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The sample at (epoch, index), or its substitute, which is a function of (seed, epoch, index).

        Raises:
            InputError: if none of SPARE_DRAWS substitutes, or of the data in buckets, can be read either.
        """
        epoch, index = key
        reasons: dict[int, str] = {}
        for candidate in self._candidates(epoch, index):
            if candidate in reasons:
                continue
            try:
                sample = self.source[epoch, candidate]
                if self.fit is not None:
                    self.fit.check(sample)
                if self.source.buckets is not None and sample.get("bucket", self.source.buckets[candidate]) != \
                        self.source.buckets[candidate]:
                    raise Unreadable("is of another shape than its header says")
                return {**sample, "skipped": list(reasons.values())}
            except Unreadable as error:
                reasons[candidate] = f"{self.source.describe(candidate)}: {error}"
        raise InputError(f"data.path: none of {len(reasons)} samples can be used: correct the data set; the first "
                         f"was {reasons[index]}")

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """The sample and its substitutes, in order.

        Where none of a small bucket can be used, all batches of it take their samples from the same next bucket.
        """
        yield index
        others, buckets = self._others(index), self.source.buckets
        for attempt in range(SPARE_DRAWS):
            yield int(others[np.random.default_rng([self.seed, 5, epoch, index, attempt]).integers(len(others))])
        if buckets is None or np.count_nonzero(buckets == buckets[index]) > SPARE_DRAWS:
            return
        shapes = np.unique(buckets)
        start = int(np.random.default_rng([self.seed, 6, epoch, index]).integers(len(buckets)))
        for bucket in np.roll(shapes, -int(np.searchsorted(shapes, buckets[index]))):
            same = np.flatnonzero(buckets == bucket)
            yield from np.roll(same, -start).tolist()

    def _others(self, index: int) -> np.ndarray:
        """Substitutes for a sample: of its shape where there are several, if need be from all of the data."""
        if self.source.buckets is None:
            return self.indices
        same = np.flatnonzero(self.source.buckets == self.source.buckets[index])
        ours = np.intersect1d(self.indices, same)
        return ours if len(ours) > 1 else same


def split(source: Source, holdout: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training, and `holdout` held-out ones, drawn with `seed`; a prior's pairs stay together.

    Args:
        holdout: None: 5% of the samples, at most MOST_HELD_OUT.

    Returns: two ascending int64 arrays.

    Raises:
        InputError: if no sample would be left for training, or a prior's pair would be split.
    """
    group = 2 if isinstance(source, WithPrior) else 1
    if holdout is None:
        holdout = min(MOST_HELD_OUT, len(source) // 20) // group * group
    if holdout >= len(source):
        raise InputError(f"data.holdout={holdout}: the data set has only {len(source)} samples: hold out fewer")
    if holdout % group:
        raise InputError(f"data.holdout={holdout}: with data.prior_path samples are held out in pairs: choose an even "
                         "number")
    groups = np.random.default_rng([seed, 1]).permutation(len(source) // group)
    order = (groups[:, None] * group + np.arange(group)).reshape(-1)
    return np.sort(order[holdout:]), np.sort(order[:holdout])


class Order:
    """The order of an epoch's samples.

    Shuffle shards, then shuffle samples within windows of `mixed` shards; without shards, shuffle all samples.

    Args:
        indices: of the samples that take part, ascending.
        shards: lengths of the source's shards; None if it has none.
    """

    def __init__(self, indices: np.ndarray, seed: int, shards: list[int] | None = None, mixed: int = 1) -> None:
        self.indices, self.seed, self.mixed = indices, seed, mixed
        self.parts = None if shards is None else np.split(indices, np.searchsorted(indices, np.cumsum(shards)[:-1]))

    def __len__(self) -> int:
        return len(self.indices)

    def __call__(self, epoch: int) -> np.ndarray:
        """A permutation of the indices, a function of (seed, epoch)."""
        rng = np.random.default_rng([self.seed, 2, epoch])
        if self.parts is None:
            return rng.permutation(self.indices)
        order = rng.permutation(len(self.parts))
        groups = [np.concatenate([self.parts[shard] for shard in order[first : first + self.mixed]])
                  for first in range(0, len(order), self.mixed)]
        return np.concatenate([rng.permutation(group) for group in groups])


class GlobalBatches:
    """A batch sampler: the micro-batches of one process, from `first_step` up to, not including, `last_step`.

    Args:
        batch_size: the global one. micro_batches: per step and process.
        rank, processes: number of this process, and of all.
        buckets: the number of every sample's shape, of which a global batch has one: a batch is complete where the
            stream of all epochs brings its last sample. None: all samples have one shape.
    """

    def __init__(self, order: Order, batch_size: int, micro_batches: int, rank: int, processes: int,
                 first_step: int, last_step: int, buckets: np.ndarray | None = None) -> None:
        self.order, self.batch_size, self.buckets = order, batch_size, buckets
        self.steps = range(first_step, last_step)
        size = batch_size // (micro_batches * processes)
        self.slices = [slice((rank * micro_batches + k) * size, (rank * micro_batches + k + 1) * size)
                       for k in range(micro_batches)]

    def __len__(self) -> int:
        return len(self.steps) * len(self.slices)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = (self._in_order() if self.buckets is None
                   else islice(self._by_bucket(self.buckets), self.steps.start, self.steps.stop))
        for batch in batches:
            for rows in self.slices:
                yield batch[rows]

    def _by_bucket(self, buckets: np.ndarray) -> Iterator[list[tuple[int, int]]]:
        """All global batches from step 0 on."""
        waiting: dict[int, list[tuple[int, int]]] = {}
        for epoch in count():
            for index in self.order(epoch).tolist():
                batch = waiting.setdefault(buckets[index], [])
                batch.append((epoch, index))
                if len(batch) == self.batch_size:
                    yield waiting.pop(buckets[index])

    def _in_order(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, self.order.indices
        for step in self.steps:
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // len(order) != epoch:
                    epoch = position // len(order)
                    order = self.order(epoch)
                batch.append((epoch, int(order[position % len(order)])))
            yield batch


def of_one_shape(indices: np.ndarray, size: int, buckets: np.ndarray | None) -> list[np.ndarray]:
    """The indices in parts of at most `size`, each of samples of one shape; `buckets` as for GlobalBatches."""
    groups = [indices] if buckets is None else [
        indices[buckets[indices] == bucket] for bucket in np.unique(buckets[indices])]
    return [group[first : first + size] for group in groups for first in range(0, len(group), size)]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of samples: stacked tensors, "captions", "conditioning" and "bucket" as lists, and all "skipped" as one
    flat list."""
    batch: dict[str, Any] = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name in ("captions", "conditioning", "bucket"):
            batch[name] = values
        elif name == "skipped":
            batch[name] = [line for lines in values for line in lines]
        else:
            batch[name] = default_collate(values)
    return batch


def warn_while_waiting(items: Iterator[Any], what: str, every: float = 60.0) -> Iterator[Any]:
    """Yields `items`; warns on stderr each time the next item takes another `every` seconds."""
    def report() -> None:
        waited = 0.0
        while not arrived.wait(every):
            waited += every
            tqdm.write(f"waiting for {what} since {waited:.0f} s: is its disk or network slow, or a loader process "
                       "stuck? (data.workers=0 loads in the trainer itself)", file=sys.stderr)

    while True:
        arrived = threading.Event()
        threading.Thread(target=report, daemon=True).start()
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            arrived.set()
        yield item


def make_loader(source: Source | WithSubstitutes, batches: Any, workers: int, pinned: bool = False) -> DataLoader:
    """Load the samples that `batches` names, in `workers` processes; into pinned memory for a GPU."""
    dataset: Any = source
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pinned,
                      collate_fn=collate, worker_init_fn=_leave_signals_to_the_trainer)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Put the worker into a separate process group, and past the signals that SLURM sends to every process of a task,
    so that a signal to the trainer does not end it: the trainer needs it to finish the step."""
    os.setpgid(0, 0)
    for name in (signal.SIGINT, signal.SIGUSR1):  # SIGTERM ends workers
        signal.signal(name, signal.SIG_IGN)
