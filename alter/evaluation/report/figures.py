"""All that a report draws: functions `..._figure` return a matplotlib Figure, functions `plot_...` write a PNG."""

from .ablation import fronts_figure, plot_fronts
from .drawing import EXPERTS, INK, layers
from .experts import (
    frequency_figure,
    kept_frequency,
    macs_figure,
    masks_figure,
    plot_experts,
    routes_figure,
    similarity,
    similarity_figure,
    steps_figure,
)
from .samples import plot_samples, samples_figure
from .search import (
    LOSSES,
    evolution_figure,
    losses_figure,
    mask_history_figure,
    plot_sensitivity,
    routing_figure,
    sensitivity_figure,
)
from .words import summary_table

__all__ = [
    "EXPERTS", "INK", "LOSSES", "evolution_figure", "frequency_figure", "fronts_figure", "kept_frequency", "layers",
    "losses_figure", "macs_figure", "mask_history_figure", "masks_figure", "plot_experts", "plot_fronts",
    "plot_samples", "plot_sensitivity", "routes_figure", "routing_figure", "samples_figure", "sensitivity_figure",
    "similarity", "similarity_figure", "steps_figure", "summary_table",
]
