"""Multiply-accumulate operations (MACs) and parameters of every site and of the whole backbone.

Convention: one MAC is one multiplication with its addition, of convolutions, matrix products and attention
products, for batch 1; norms and activations are not counted. Counted on the meta device, where nothing is
computed and fused attention kernels cannot hide from the counter.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .family import backbone_class
from .inputs import example_inputs
from .sites import find_sites


@dataclass(frozen=True)
class CostTable:
    """Costs of one forward with batch 1. `macs` and `parameters` have one entry per site: what skipping it saves.

    backbone: the name of its class.
    """

    sites: tuple[str, ...]
    macs: tuple[int, ...]
    parameters: tuple[int, ...]
    macs_total: int
    parameters_total: int
    backbone: str | None = None

    @property
    def share_L(self) -> np.ndarray:
        """MACs of every site as a share of the total, float64 [L]."""
        return np.array(self.macs, dtype=np.float64) / self.macs_total

    @property
    def prunable_share(self) -> float:
        return float(self.share_L.sum())

    @property
    def unit(self) -> tuple[float, str]:
        """A readable unit of MACs for this backbone, and its name."""
        return (1e9, "GMACs") if self.macs_total >= 1e9 else (1e6, "MMACs")

    def table(self) -> str:
        """One line per site and a total, for the terminal."""
        width = max(map(len, self.sites))
        scale, unit = self.unit
        rows = [f"{'site':{width}}  {unit:>9}  {'share':>7}  {'M params':>9}"]
        for name, macs, parameters in zip(self.sites, self.macs, self.parameters, strict=True):
            share = macs / self.macs_total
            rows.append(f"{name:{width}}  {macs / scale:9.3f}  {share:7.2%}  {parameters / 1e6:9.2f}")
        total = f"{self.macs_total / scale:9.3f}  {1:7.2%}  {self.parameters_total / 1e6:9.2f}"
        rows.append(f"{'total':{width}}  {total}")
        return "\n".join(rows)


def count_cost(backbone: Any, latent_size: int, frames: int = 1) -> CostTable:
    """Count the backbone's MACs at latents of `latent_size` × `latent_size`; its weights are not touched.

    Args:
        backbone: on any device, without gates in force.
        latent_size: side of the latents, in latent pixels. frames: of a video's latents.

    Raises:
        InputError: if the backbone has no prunable layer.
    """
    with torch.device("meta"):
        model = type(backbone).from_config(backbone.config)
    model.eval()
    macs, parameters = (dict.fromkeys((site.name for site in find_sites(model)), 0) for _ in range(2))
    counter = FlopCounterMode(display=False)

    def count(name: str, sign: int):
        def hook(module: nn.Module, *_: Any) -> None:
            macs[name] += sign * counter.get_total_flops() // 2
        return hook

    for name in macs:
        layer = model.get_submodule(name)
        parameters[name] = _size(layer)
        layer.register_forward_pre_hook(count(name, -1))
        layer.register_forward_hook(count(name, +1))
    with counter, torch.no_grad():
        model(**example_inputs(model, latent_size, frames=frames))
    return CostTable(tuple(macs), tuple(macs.values()), tuple(parameters.values()), counter.get_total_flops() // 2,
                     _size(model), backbone_class(model).__name__)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
