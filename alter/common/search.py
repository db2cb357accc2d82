"""The keys of the search."""

from dataclasses import dataclass

from .schema import key


@dataclass(frozen=True)
class SearchConfig:
    method: str = key(
        "hypernetwork", "hypernetwork: the paper's; masks and routes are learned beside the weights. elastic: layers "
        "are ordered by measurement, the weights train at random depths of that order, and depths over time are then "
        "allocated by their measured errors.", choices=("hypernetwork", "elastic"))
    draws: str = key(
        "sample", "hypernetwork: masks and routes that it is trained on are drawn for each sample, or as in the paper "
        "once an iteration for all of them.", choices=("sample", "iteration"))
    supernet: bool = key(
        False, "hypernetwork: train the weights, until the search ends, on masks and routes drawn for each sample from "
        "the hypernetwork's distribution instead of the most probable ones.")
    samples: int = key(
        64, "elastic: samples on which masks are measured; each costs a forward of the backbone for each mask and bin.",
        within="[2, inf)")
    bins: int = key(20, "elastic: intervals of timesteps, of equal weight in the budget, in which masks are measured.",
                    within="[1, inf)")
    least: float = key(0.25, "elastic: every expert keeps at least this share of the prunable cost.", within="[0, 1)")
