"""Experts at work in a diffusers pipeline: the backbone's own timestep chooses the rows of its gates.

The choice is made once a forward, in Python, outside compiled code, from at most one host read of the timestep; the
layers then run or not without a look at the device (backbones/gates.py). Nothing compares tensors.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones.gates import HardRows, Simulator
from ..backbones.sites import PIPELINE_COMPONENT, Site, named_sites
from ..common.errors import InputError
from .trim import check_runnable


@dataclass
class Installed:
    """What `apply` put on a backbone, and for which experts."""

    mask_EL: np.ndarray
    expert_T: np.ndarray
    simulator: Simulator
    hook: Any


class Applied:
    """Experts on a backbone until `remove`, or until the end of a `with` block, which yields the target."""

    def __init__(self, target: Any, sites: Sequence[str], mask_EL: np.ndarray, expert_T: np.ndarray) -> None:
        self.target = target
        backbone = backbone_of(target)
        check_fit(backbone, sites, mask_EL, expert_T)
        simulator = Simulator(backbone)
        hook = _register(simulator, mask_EL, expert_T)
        backbone._alter_applied = Installed(mask_EL, expert_T, simulator, hook)

    def __enter__(self) -> Any:
        return self.target

    def __exit__(self, *_: Any) -> None:
        remove(self.target)


def remove(target: Any) -> None:
    """Restore the backbone of `target` to what it was before experts were applied.

    Raises:
        InputError: if there are none.
    """
    backbone = backbone_of(target)
    installed: Installed | None = vars(backbone).get("_alter_applied")
    if installed is None:
        raise InputError("experts: none are applied to this backbone: call apply first")
    installed.hook.remove()
    installed.simulator.remove()
    del backbone._alter_applied


def check_fit(backbone: nn.Module, names: Sequence[str], mask_EL: np.ndarray,
              expert_T: np.ndarray) -> tuple[Site, ...]:
    """The backbone's sites, which must have these names.

    Raises:
        InputError: for another backbone's experts, or if one runs a layer that this one was trimmed of.
    """
    sites = named_sites(backbone, names)
    check_runnable(backbone, sites, mask_EL, np.unique(expert_T).tolist())
    return sites


@contextmanager
def serving(simulator: Simulator, mask_EL: np.ndarray, expert_T: np.ndarray) -> Iterator[None]:
    """As `Applied`, inside the block, for a backbone that has gates already."""
    hook = _register(simulator, mask_EL, expert_T)
    try:
        yield
    finally:
        hook.remove()
        simulator.set(None)


def backbone_of(target: Any) -> Any:
    """The UNet or DiT of a pipeline, or `target` itself; what `torch.compile` wraps is unwrapped."""
    if not isinstance(target, nn.Module):
        for component in PIPELINE_COMPONENT.values():
            if isinstance(getattr(target, component, None), nn.Module):
                target = getattr(target, component)
                break
        else:
            raise InputError(f"experts: a {type(target).__name__} has no unet or transformer to apply them to")
    return getattr(target, "_orig_mod", target)


def _register(simulator: Simulator, mask_EL: np.ndarray, expert_T: np.ndarray) -> Any:
    """A forward pre-hook that lets the `timestep` argument choose the gates' rows."""
    masks, routes, last = torch.from_numpy(mask_EL), expert_T.tolist(), len(expert_T) - 1
    rows_E = [HardRows(mask_L[None]) for mask_L in masks]

    def choose_rows(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if "_is_replica" in vars(module):
            raise InputError("experts: nn.DataParallel's replicas share one choice of layers: use a process each GPU")
        installed: Installed | None = vars(module).get("_alter_applied")  # a copy's own, in a copy of the backbone
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        given = timestep.tolist() if isinstance(timestep, Tensor) else timestep  # the host read
        experts = [routes[min(max(round(value), 0), last)] for value in (given if isinstance(given, list) else [given])]
        if experts.count(experts[0]) == len(experts):
            rows = rows_E[experts[0]]
        else:
            sample = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            rows = HardRows(masks[experts], sample.device)
        (simulator if installed is None else installed.simulator).set(rows)

    # In a graph that the user compiles around the backbone: outside it, a break before any layer.
    return simulator.backbone.register_forward_pre_hook(torch.compiler.disable(choose_rows), with_kwargs=True)
