"""What a family of masks costs in quality: errors by mask and interval of timesteps, and what they do to samples.

Axes: M masks, B bins of timesteps. An error of the output counts by how far it moves the final samples, which differs
by orders of magnitude between timesteps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

SPACES = ("features", "residuals", "latents", "pixels")  # in which the displacement of samples is measured, best first
CANDIDATES = 8  # layers that are measured again after each removal
INTERVALS = 4  # of timesteps, at most, in which layers have an order of their own
WINDOWS = 10  # of a sampler's steps, in which the response is measured
EARLY_BINS = 10  # of timesteps, in which the dense model is measured before the search
EARLY_FORWARDS = EARLY_BINS * (EARLY_BINS + 1) + 3 * EARLY_BINS  # for the early response: two steps in each bin
ORDER_SAMPLES, EARLY_SAMPLES, RESPONSE_SAMPLES = 32, 16, 32  # at most


@dataclass(frozen=True)
class Measured:
    """Errors of M masks in B bins, and the response of samples to them.

    Attributes:
        edges: bin b holds the training timesteps from edges[b] up to, not including, edges[b+1], [B+1].
        error_MB: mean squared change of the output against the dense model's, float64 [M, B].
        response: of each space, one of SPACES: what a unit of error in bin b adds to the squared displacement of the
            final samples when masks are in force at all steps, float64 [B].
        sampler, steps, guidance: by which samples were drawn. samples: on which errors were measured, in each bin.
    """

    edges: tuple[int, ...]
    error_MB: np.ndarray
    response: Mapping[str, np.ndarray]
    sampler: str
    steps: int
    guidance: float
    samples: int

    @property
    def space(self) -> str:
        """In which displacement counts: the first of SPACES that was measured."""
        return next(space for space in SPACES if space in self.response)

    @property
    def loss_MB(self) -> np.ndarray:
        """What bin b has of the squared displacement of final samples when mask m is in force there, float64 [M, B]."""
        return self.error_MB * self.response[self.space]

    def moved(self, mask_T: np.ndarray, space: str) -> float:
        """The squared displacement of final samples, in a space, that mask mask_T[t] at timestep t is predicted to
        cause, int64 [T]."""
        return float((in_bins(mask_T, self.edges, len(self.error_MB)) * self.error_MB * self.response[space]).sum())

    def to_plain(self) -> dict[str, Any]:
        """As plain lists and numbers, for JSON."""
        return {"edges": list(self.edges), "error": self.error_MB.tolist(),
                "response": {space: value.tolist() for space, value in self.response.items()},
                "sampler": self.sampler, "steps": self.steps, "guidance": self.guidance, "samples": self.samples}

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> "Measured":
        """What `to_plain` gave; raises ValueError, TypeError or LookupError for anything else."""
        measured = cls(tuple(map(int, content["edges"])), np.array(content["error"], dtype=np.float64),
                       {str(space): np.array(value, dtype=np.float64) for space, value in content["response"].items()},
                       str(content["sampler"]), int(content["steps"]), float(content["guidance"]),
                       int(content["samples"]))
        shape, bins = measured.error_MB.shape, len(measured.edges) - 1
        if measured.steps < 1 or measured.samples < 1 or any(edge != int(edge) for edge in content["edges"]):
            raise ValueError("steps and samples must be 1 or more, edges whole numbers")
        values = [measured.error_MB, *measured.response.values()]
        if len(shape) != 2 or shape[1] != bins or any(value.shape != (bins,) for value in measured.response.values()):
            raise ValueError(f"errors {shape} and responses do not fit {bins} bins")
        if not set(measured.response) & set(SPACES) or not all(np.isfinite(v).all() and (v >= 0).all() for v in values):
            raise ValueError("errors and responses must be finite, none negative, in one of " + ", ".join(SPACES))
        return measured


def in_bins(mask_T: np.ndarray, edges: Sequence[int], masks: int) -> np.ndarray:
    """Of which share of each bin's timesteps mask_T[t], int64 [T], is mask m, float64 [M, B]."""
    return np.stack([np.bincount(mask_T[low:high], minlength=masks) / (high - low) for low, high in pairwise(edges)],
                    axis=1)


@dataclass(frozen=True)
class Forwards:
    """About how many forwards of one sample the measured search takes beside its training.

    Attributes:
        order: to order the layers. forecast: for the response of the dense model's samples, and its errors. errors: of
            the trained masks, at the end of the search and once more at the end of the run. response: of its samples.
    """

    order: int
    forecast: int
    errors: int
    response: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.order + self.forecast + self.errors + self.response


def forwards(layers: int, least: float, samples: int, bins: int, steps: int, guided: bool, experts: int) -> Forwards:
    """As if all layers cost the same, and no two chains of masks had one in common but the whole.

    Args:
        least: share of the prunable cost that every mask keeps. samples, bins: of the errors. steps: of the sampler.
        guided: whether each of its steps takes two forwards. experts: with several there are several chains.
    """
    chains = min(experts, INTERVALS) + (experts > 1)
    removed = min(int(layers * (1 - least) + 1e-9), layers - 1)
    tried = sum(1 + (layers - k if k == 0 else min(CANDIDATES, layers - k)) for k in range(removed))
    early = min(samples, EARLY_SAMPLES)
    masks, windows, length = chains * removed + 1, min(WINDOWS, steps), -(-steps // WINDOWS)
    again = windows * (length - 1) + steps - 1  # dense, where a mask has moved what it is given
    whole = 2 * steps + windows * (steps + length) // 2 + windows * steps - length  # from the first masked step on
    return Forwards(
        order=chains * tried * min(samples, ORDER_SAMPLES),
        forecast=(EARLY_FORWARDS + (experts > 1) * EARLY_BINS * (masks + 1)) * early,
        errors=2 * bins * (masks + 1) * samples,
        response=min(samples, RESPONSE_SAMPLES) * (whole * (1 + guided) + again + 2 * windows + 2))
