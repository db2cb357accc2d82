"""Which search a configuration names."""

from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ...experts.artefact import TemporalExperts
from ..batch import Batch
from ..update import Update
from .elastic import ElasticSearch
from .hypernetwork import HypernetworkSearch


class Search(Protocol):
    """What a trainer asks of a method of search. "Masks" are bool [M, L] and, of each timestep, the row, int64 [T]."""

    less: str  # why what was found keeps less than was asked for

    @property
    def updates(self) -> dict[str, tuple[Update, float]]:
        """Optimizers of its own with their learning rates, by the names under which checkpoints hold them."""

    def begin(self) -> None:
        """Measure what has to be known before the first step of a new run."""

    def update(self, batches: list[Batch]) -> dict[str, float]:
        """Learn from an iteration's micro-batches; metrics to log."""

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """For the next update of the weights."""

    def drawn(self, batches: list[Batch]) -> list[Tensor] | None:
        """After `masks`: masks of each sample of the micro-batches for that update, bool [B, L] on the CPU; None: those
        of the timesteps."""

    def tried(self) -> tuple[np.ndarray, np.ndarray]:
        """The dearest masks that may still come, to try how much memory the tuning takes."""

    def finish(self) -> TemporalExperts:
        """What was found; the same on all processes."""

    def present(self, masks: tuple[np.ndarray, np.ndarray]) -> TemporalExperts:
        """Experts to show while the search goes on, from what `masks` gave."""

    def tensors(self) -> dict[str, Tensor]:
        """Its state, for a checkpoint."""

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `tensors`."""


def make_search(trainer: Any) -> Search:
    """By `search.method`, for a `Trainer` whose experts are yet to be found."""
    return (ElasticSearch if trainer.config.search.method == "elastic" else HypernetworkSearch)(trainer)
