"""Multiply-accumulate operations (MACs) and parameters of every site and of the whole backbone.

Convention: one MAC is one multiplication with its addition, of convolutions, matrix products and attention
products, for batch 1; norms and activations are not counted. Counted on the meta device, where nothing is
computed and fused attention kernels cannot hide from the counter.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from .family import backbone_class
from .inputs import Size, example_inputs, run_example
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


def count_cost(backbone: Any, size: Size, frames: int = 1) -> CostTable:
    """Count the backbone's MACs; its weights are not touched. Equal layers on equal inputs are counted once.

    Args:
        backbone: on any device, without gates in force.
        size: of the latents. frames: of a video's.

    Raises:
        InputError: if the backbone has no prunable layer, or the arguments of its forward are not known.
    """
    with torch.device("meta"):
        model = type(backbone).from_config(backbone.config)
    model.eval()
    for module in model.modules():
        if hasattr(module, "moe_infer"):
            module.moe_infer = partial(_any_experts, module)
            model.training = True  # of itself alone: else the sizes of the output are read from a tensor
    counter, counted = FlopCounterMode(display=False), _Counted()
    for site in find_sites(model):
        counted.watch(site.name, model.get_submodule(site.name), counter)
    with counter:
        run_example(model, example_inputs(model, size, frames=frames))
    macs = counted.macs
    total = counter.get_total_flops() // 2 + counted.repeated
    return CostTable(tuple(macs), tuple(macs.values()), tuple(_size(model.get_submodule(name)) for name in macs), total,
                     _size(model), backbone_class(model).__name__)


def _any_experts(layer: Any, tokens: torch.Tensor, *_: Any) -> torch.Tensor:
    """A mixture of experts, as in HiDream: which ones a token passes depends on values, how many does not."""
    layer.experts[0](tokens.repeat_interleave(layer.num_activated_experts, dim=0))
    return tokens


class _Counted:
    """MACs of layers on the meta device; a layer like one that was counted gives the same output again.

    macs: of every layer. repeated: of those that were not computed.
    """

    def __init__(self) -> None:
        self.macs: dict[str, int] = {}
        self.repeated = 0
        self._known: dict[Any, tuple[Any, int]] = {}

    def watch(self, name: str, layer: Any, counter: FlopCounterMode) -> None:
        forward, kind = layer.forward, _kind(layer)
        self.macs[name] = 0

        def count(*args: Any, **kwargs: Any) -> Any:
            key = kind, str(tree_map_only(torch.Tensor, lambda value: (tuple(value.shape), value.dtype),
                                          (args, kwargs)))
            if key in self._known:
                output, macs = self._known[key]
                self.repeated += macs
            else:
                before = counter.get_total_flops()
                output = forward(*args, **kwargs)
                macs = (counter.get_total_flops() - before) // 2
                self._known[key] = output, macs
            self.macs[name] += macs
            return output

        layer.forward = count


def _kind(layer: nn.Module) -> str:
    """What layers of equal cost have in common: classes and settings of their modules, and shapes of their weights."""
    settings = [(path, type(module).__name__, {key: value for key, value in vars(module).items()
                                               if isinstance(value, bool | int | float | str)})
                for path, module in layer.named_modules()]
    return str((settings, [tuple(value.shape) for value in layer.parameters()]))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
