"""Experts at work in a diffusers pipeline: the backbone's own timestep chooses the rows of its gates.

The choice is made once per forward, in Python, outside compiled code, from at most one host read of the timestep; the
layers then run or not without a look at the device (backbones/gates.py). Nothing compares tensors. It holds until that
forward ends, in the thread that runs it.
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
    hooks: list[Any]


class Applied:
    """Experts on a backbone until `remove`, or until the end of a `with` block, which yields the target."""

    def __init__(self, target: Any, sites: Sequence[str], mask_EL: np.ndarray, expert_T: np.ndarray) -> None:
        self.target, self.mask_EL, self.expert_T = target, mask_EL, expert_T
        backbone = backbone_of(target)
        installed: Installed | None = vars(backbone).get("_alter_applied")
        self.installs = installed is None
        if installed is not None:
            check_same(installed, mask_EL, expert_T)
            return
        check_fit(backbone, sites, mask_EL, expert_T)
        scheduler = type(target.scheduler).__name__ if hasattr(target, "scheduler") else None
        simulator = Simulator(backbone)
        simulator.require_rows(True)
        backbone._alter_applied = Installed(mask_EL, expert_T, simulator, _register(
            simulator, _Chooser(simulator, mask_EL, expert_T, scheduler)))

    def __enter__(self) -> Any:
        return self.target

    def __exit__(self, *_: Any) -> None:
        if self.installs:  # else they were there before the block, and stay
            remove(self.target, self.mask_EL, self.expert_T)


def remove(target: Any, mask_EL: np.ndarray | None = None, expert_T: np.ndarray | None = None) -> None:
    """Restore the backbone of `target` to what it was before experts were applied: these, if they are named.

    Raises:
        InputError: if there are none, or others.
    """
    backbone = backbone_of(target)
    installed: Installed | None = vars(backbone).get("_alter_applied")
    if installed is None:
        raise InputError("experts: none are applied to this backbone: call apply first")
    if mask_EL is not None and expert_T is not None:
        check_same(installed, mask_EL, expert_T)
    for hook in installed.hooks:
        hook.remove()
    installed.simulator.remove()
    del backbone._alter_applied


def check_same(installed: Installed, mask_EL: np.ndarray, expert_T: np.ndarray) -> None:
    """Raises InputError if the experts that are installed are not these."""
    if not (np.array_equal(installed.mask_EL, mask_EL) and np.array_equal(installed.expert_T, expert_T)):
        raise InputError("experts: others are applied to this backbone: remove them first")


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
    hooks = _register(simulator, _Chooser(simulator, mask_EL, expert_T, None))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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


class _Chooser:
    """Forward hooks that let the `timestep` argument choose the gates' rows for as long as the forward takes.

    scheduler: class of the pipeline's, for messages.
    """

    def __init__(self, simulator: Simulator, mask_EL: np.ndarray, expert_T: np.ndarray, scheduler: str | None) -> None:
        self.simulator, self.scheduler = simulator, scheduler
        self.masks, self.routes = torch.from_numpy(mask_EL), expert_T.tolist()
        self.rows_E = [HardRows(mask_L[None]) for mask_L in self.masks]

    # In a graph that the user compiles around the backbone: outside it, a break before any layer.
    @torch.compiler.disable
    def begin(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if "_is_replica" in vars(module):
            raise InputError("experts: nn.DataParallel's replicas share one choice of layers: use a process each GPU")
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        given = timestep.tolist() if isinstance(timestep, Tensor) else timestep  # the host read
        experts = [self._expert(value) for value in (given if isinstance(given, list) else [given])]
        if experts.count(experts[0]) == len(experts):
            rows = self.rows_E[experts[0]]
        else:
            sample = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            rows = HardRows(self.masks[experts], sample.device)
        self.simulator.set(rows)

    @torch.compiler.disable
    def end(self, *_: Any) -> None:
        self.simulator.set(None)

    def _expert(self, timestep: float) -> int:
        """Of the nearest training timestep."""
        last = len(self.routes) - 1
        if not -0.5 <= timestep < last + 1:
            raise InputError(f"experts: timestep={timestep} is outside the training timesteps 0 to {last}: "
                             f"{self.scheduler or 'the scheduler'} counts noise in other units; use one that counts "
                             "training timesteps, such as DPMSolverMultistepScheduler")
        return self.routes[min(max(round(timestep), 0), last)]


def _register(simulator: Simulator, chooser: _Chooser) -> list[Any]:
    backbone = simulator.backbone
    return [backbone.register_forward_pre_hook(chooser.begin, with_kwargs=True),
            backbone.register_forward_hook(chooser.end, always_call=True)]
