"""The keys of experts and of the search for them."""

from dataclasses import dataclass

from .schema import key


@dataclass(frozen=True)
class ExpertsConfig:
    count: int = key(10, "Number of experts E; 1 is the paper's ablation `Static`.", within="[1, inf)")
    router: str = key(
        "learned",
        "ordered: cut points on the noise level are trained, so that each expert serves consecutive timesteps "
        "(loss.balance has no effect then). smooth, learned: a small network on sinusoids of the timestep is, on those "
        "with periods from 200 timesteps on, or as in the paper on all of the backbone's own. uniform: fixed equal "
        "intervals (the paper's ablation `Manual`).",
        choices=("ordered", "smooth", "learned", "uniform"))
    tau: float = key(0.4, "Temperature of the Gumbel-sigmoid and the Gumbel-softmax.", within="(0, inf)")
    start: str = key(
        "dense", "Masks near which the search starts. dense: every layer is kept, as in the paper. greedy: every "
        "expert keeps the layers that are worth their cost at the budget by the sensitivity table, which is measured "
        "first (minutes). measured: so for the timesteps of each expert alone; ordered cut points go where the table "
        "has the best ones.",
        choices=("dense", "greedy", "measured"),
    )
    offset: float = key(
        4.0, "b, added to the mask logits: at first a layer that `start` keeps is active with probability sigmoid(b), "
        "any other with sigmoid(-b)."
    )
    pretrained: str | None = key(
        None, "Folder or hub id with an experts.json: its masks and routes are kept, nothing is searched, and the "
        "backbone is tuned with them."
    )


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
    features: str | None = key(
        None, "elastic: folder of a CLIP in transformers' format. How far samples move is measured in its image "
        "features too, and masks are allocated by these instead of by the dense model's residuals.")
