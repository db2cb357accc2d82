"""Backbones with random weights, masks for them, and the same backbones with layers taken out by hand."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...backbones.cost import CostTable, count_cost
from ...backbones.dit import embedders
from ...backbones.pretrained import DTYPES, component_of
from ...backbones.sites import Removed, Site, find_sites, named_sites, remove_layer
from ...common.errors import InputError
from ...common.load import CONFIGS
from ...experts.artefact import TemporalExperts
from . import CASES

T = 1000


@dataclass
class Case:
    name: str
    backbone: Any
    sites: tuple[Site, ...]
    cost: CostTable
    size: int


def load_case(name: str, device: torch.device, dtype: str, run: Path | None = None) -> Case:
    """Random weights; `run`, if one is named, must have been trained on such a backbone."""
    folder, size = CASES[name]
    cls, component = component_of(CONFIGS / "models" / folder)
    torch.manual_seed(0)
    with torch.device(device):
        backbone: Any = cls.from_config(cls.load_config(CONFIGS / "models" / folder / component))
    for embedder in embedders(backbone):  # equal copies, as in every trained DiT
        embedder.load_state_dict(embedders(backbone)[0].state_dict())
    nn.Module.to(backbone.eval(), DTYPES[dtype])
    if run is not None:
        named_sites(backbone, trained_experts(run).sites, f"--run {run} on --cases {name}")
    return Case(name, backbone, find_sites(backbone), count_cost(backbone, size), size)


def draw_experts(cost: CostTable, keep: float, seed: int, count: int = 1) -> TemporalExperts:
    """Random masks, each at the keep ratio (of all MACs), for equal intervals of timesteps."""
    mask_EL = np.stack([draw_mask(cost, keep, [seed, expert]) for expert in range(count)])
    return TemporalExperts.build(mask_EL, np.arange(T) * count // T, cost, keep, "total")


def trained_experts(run: Path) -> TemporalExperts:
    if not (run / "final").is_dir():
        raise InputError(f"--run {run}: has no final/: name a finished run")
    return TemporalExperts.from_pretrained(run / "final")


def draw_mask(cost: CostTable, keep: float, seed: list[int]) -> np.ndarray:
    """Sites go in random order, each unless that takes the total further below the target than it is above."""
    mask_L, total = np.ones(len(cost.sites), dtype=bool), 1.0
    for site in np.random.default_rng(seed).permutation(len(mask_L)):
        if abs(total - cost.share_L[site] - keep) < abs(total - keep):
            mask_L[site], total = False, total - cost.share_L[site]
    return mask_L


def shallow_copy(backbone: nn.Module) -> Any:
    """Modules of its own over the same parameters and buffers."""
    return copy.deepcopy(backbone, {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())})


def without_layers(case: Case, mask_L: np.ndarray) -> Any:
    """A copy of the backbone in which the layers that the mask skips do not exist."""
    left = shallow_copy(case.backbone)
    for site, runs in zip(case.sites, mask_L, strict=True):
        if not runs:
            remove_layer(left, site)
            left.get_submodule(site.name).__class__ = _Around
    return left


class _Around(Removed):
    """What bypasses a layer, where it was."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.site.pack(self.site.bypass(args, kwargs))
