"""What each layer is worth at each timestep: how far the dense model's output, and its samples, move without it."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from .budget import Budget
from .hypernetwork import HyperNetwork, Logits
from .routers import OrderedRouter

_IN_FILES = {"amplification_B": "response_B"}


@dataclass(frozen=True)
class Sensitivity:
    """A table of L layers × B bins of timesteps.

    Attributes:
        sites: names of the layers, [L].
        edges: bin b holds the timesteps from edges[b] up to, not including, edges[b+1], [B+1].
        samples: samples per bin.
        error_LB: mean squared change of the output when layer l alone is skipped, float64 [L, B].
        denoise_B: mean squared error of the dense model against the scheduler's target, float64 [B].
        amplification_B: squared change of the final samples per unit of error_LB, float64 [B].
    """

    sites: tuple[str, ...]
    edges: tuple[int, ...]
    samples: int
    error_LB: np.ndarray
    denoise_B: np.ndarray
    amplification_B: np.ndarray

    @property
    def relative_LB(self) -> np.ndarray:
        """The change in units of the dense model's error at these timesteps, float64 [L, B]."""
        return self.error_LB / self.denoise_B

    @property
    def effect_LB(self) -> np.ndarray:
        """How far final samples move (squared) when layer l is skipped in bin b alone, if they follow the output
        linearly, float64 [L, B]."""
        return self.error_LB * self.amplification_B

    @property
    def agreement(self) -> float:
        """Mean Spearman correlation between the layer rankings of two bins: 1 where all bins rank layers alike."""
        bins = self.error_LB.shape[1]
        correlation = np.atleast_2d(np.corrcoef(_ranks(self.error_LB), rowvar=False))
        return float(correlation[np.triu_indices(bins, 1)].mean()) if bins > 1 else 1.0

    def gain(self, budget: Budget, experts: int) -> float:
        """How many times as far (squared) one mask for all timesteps would move the samples as `experts` masks, if
        effects added up."""
        weight_T = budget.weight_T(self.edges[-1])
        one, several = (self.predicted_effect(*allocate(self, budget, count), weight_T) for count in (1, experts))
        return one / several if several > 0 else 1.0

    def predicted_effect(self, mask_EL: np.ndarray, expert_T: np.ndarray, weight_T: np.ndarray | None = None) -> float:
        """Mean over timesteps of the sum of the effects of the skipped layers.

        Args:
            mask_EL: bool [E, L]. expert_T: int64 [T].
            weight_T: of the timesteps, float64 [T]; None: all weigh the same.
        """
        effect_LT = np.repeat(self.effect_LB, np.diff(self.edges), axis=1)
        return float(np.average((effect_LT * ~mask_EL[expert_T].T).sum(axis=0), weights=weight_T))

    def to_plain(self) -> dict[str, Any]:
        """The table as plain lists and numbers, for JSON."""
        content = {_IN_FILES.get(name, name): value.tolist() if isinstance(value, np.ndarray) else value
                   for name, value in asdict(self).items()}
        return {"alter_sensitivity": 2, **content}

    @classmethod
    def from_plain(cls, content: dict[str, Any]) -> "Sensitivity":
        """The table that `to_plain` gave; raises ValueError, TypeError or LookupError for anything else."""
        if content["alter_sensitivity"] != 2:
            raise ValueError(f"alter_sensitivity={content['alter_sensitivity']}: another version")
        arrays = (np.array(content[name], dtype=np.float64) for name in ("error_LB", "denoise_B", "response_B"))
        return cls(tuple(content["sites"]), tuple(content["edges"]), content["samples"], *arrays)


def allocate(table: Sensitivity, budget: Budget, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks bool [E, L] and the expert of each timestep int64 [T] that would move the samples little, if effects
    added up.

    Each expert serves consecutive bins. For each of several prices of a unit of cost, dynamic programming finds the
    borders that are best at that price, and `masks_for` the masks; the least predicted effect wins. Timesteps have the
    budget's weights.

    Args:
        experts: E >= 1, at most; there are no more than bins.
    """
    lengths, weight_T = np.diff(table.edges), budget.weight_T(table.edges[-1])
    weight_B = lengths if weight_T is None else np.add.reduceat(weight_T, table.edges[:-1]) * len(weight_T)
    weighted_LB = table.effect_LB * weight_B
    worth = weighted_LB / (budget.share_L[:, None] * weight_B)
    found = {}
    for price in np.quantile(worth, np.linspace(0.02, 0.98, 25)):
        borders = _segments(weighted_LB, budget.share_L, weight_B, min(experts, len(lengths)), float(price))
        if borders in found:
            continue
        segments = list(pairwise(borders))
        expert_T = np.repeat(np.arange(len(segments)), [lengths[first:last].sum() for first, last in segments])
        found[borders] = masks_for(table, budget, expert_T), expert_T
    return min(found.values(), key=lambda masks: table.predicted_effect(masks[0], masks[1], weight_T))


def masks_for(table: Sensitivity, budget: Budget, expert_T: np.ndarray) -> np.ndarray:
    """Masks bool [E, L] within the budget that would move the samples little, if effects added up, where the experts
    int64 [T], of which each serves a timestep, are given: `Budget.masks`, with the avoided effects as logits."""
    weight_T = budget.weight_T(len(expert_T))
    effect_LT = np.repeat(table.effect_LB, np.diff(table.edges), axis=1) * (1 if weight_T is None else weight_T)
    router_TE = np.eye(expert_T.max() + 1)[expert_T]
    avoided_EL = (effect_LT @ router_TE).T
    logits = Logits(torch.from_numpy(avoided_EL / avoided_EL.max()), torch.from_numpy(router_TE))
    return budget.masks(logits, budget.keep_ratio)[0]


def _segments(weighted_LB: np.ndarray, share_L: np.ndarray, weight_B: np.ndarray, experts: int,
              price: float) -> tuple[int, ...]:
    """The cheapest borders [E + 1] of consecutive bins; each layer adds its error, if skipped, or its share times the
    price, whichever is less."""
    bins = len(weight_B)
    error_LB, passed_B = (np.concatenate([np.zeros_like(part[..., :1]), part.cumsum(-1)], axis=-1)
                          for part in (weighted_LB, weight_B))
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, (0,))}
    for count in range(1, experts + 1):
        for last in range(count, bins + 1):
            options = []
            for first in range(count - 1, last):
                if (count - 1, first) in best:
                    before, borders = best[count - 1, first]
                    error_L = error_LB[:, last] - error_LB[:, first]
                    cost_L = price * share_L * (passed_B[last] - passed_B[first])
                    options.append((before + float(np.minimum(error_L, cost_L).sum()), (*borders, last)))
            best[count, last] = min(options)
    return best[experts, bins][1]


def start_near(table: Sensitivity, budget: Budget, hypernetwork: HyperNetwork, apart: bool = False) -> None:
    """Let the search of a fresh hypernetwork start near masks that the table suggests.

    Changes `hypernetwork.offset_EL` in place: +b for the layers of an expert's mask, -b for the others.

    Args:
        apart: False: the one mask that `allocate` finds for all timesteps is every expert's. True: ordered cut points
            go where `allocate` finds them, with as many bins as experts or more, and each expert has the mask that
            `masks_for` finds for the timesteps which it serves (one that serves none yet, the one for all).
    """
    offset_EL, router = hypernetwork.offset_EL, hypernetwork.temporal_router
    (mask_L,), _ = allocate(table, budget, experts=1)
    mask_EL = np.tile(mask_L, (len(offset_EL), 1))
    if apart:
        borders = (np.flatnonzero(np.diff(allocate(table, budget, len(offset_EL))[1])) + 1).tolist()
        if isinstance(router, OrderedRouter) and len(borders) == len(offset_EL) - 1:  # else fewer timesteps are trained
            router.place(borders)
        serving, expert_T = np.unique(router().argmax(dim=1).cpu().numpy(), return_inverse=True)
        mask_EL[serving] = masks_for(table, budget, expert_T)
    offset_EL.copy_(torch.where(torch.from_numpy(mask_EL).to(offset_EL.device), offset_EL, -offset_EL))


def _ranks(values_LB: np.ndarray) -> np.ndarray:
    """The rank of each value within its column, float64; equal values share the mean of their ranks."""
    ordered = np.sort(values_LB, axis=0)
    below, not_above = (np.stack([np.searchsorted(column, values, side) for column, values
                                  in zip(ordered.T, values_LB.T, strict=True)], axis=1) for side in ("left", "right"))
    return (below + not_above) / 2
