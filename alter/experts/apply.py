"""Experts at work in a diffusers pipeline: the backbone's own timestep chooses the rows of its gates.

The choice is made once per forward, in Python, outside compiled code, from at most one host read of the timestep; the
layers then run or not without a look at the device (backbones/gates.py). Nothing compares tensors. It holds until that
forward ends, in the thread that runs it.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..backbones.family import COMPONENTS, backbone_class, family_of, timestep_argument
from ..backbones.gates import HardRows, Simulator
from ..backbones.sites import Site, named_sites
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

    def __init__(self, target: Any, backbone: Any, sites: Sequence[str], mask_EL: np.ndarray,
                 expert_T: np.ndarray) -> None:
        self.target, self.backbone, self.mask_EL, self.expert_T = target, backbone, mask_EL, expert_T
        installed: Installed | None = vars(backbone).get("_alter_applied")
        self.installs = installed is None
        if installed is not None:
            check_same(installed, mask_EL, expert_T)
            return
        check_caches(backbone, check_fit(backbone, sites, mask_EL, expert_T), mask_EL, expert_T)
        simulator = Simulator(backbone)
        simulator.require_rows(True)
        if hasattr(backbone, "enable_cache"):
            backbone.enable_cache = _refuse_cache
        backbone._alter_applied = Installed(mask_EL, expert_T, simulator, _register(
            simulator, _Chooser(simulator, mask_EL, expert_T, target)))

    def __enter__(self) -> Any:
        return self.target

    def __exit__(self, *_: Any) -> None:
        if self.installs:  # else they were there before the block, and stay
            remove(self.backbone, self.mask_EL, self.expert_T)


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
    vars(backbone).pop("enable_cache", None)
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
    sites, unknown = named_sites(backbone, names), family_of(backbone).unknown
    if unknown:
        raise InputError(f"experts: a {backbone_class(backbone).__name__} cannot be served: {unknown}, by which no "
                         "expert can be chosen")
    check_runnable(backbone, sites, mask_EL, np.unique(expert_T).tolist())
    return sites


def check_caches(backbone: nn.Module, sites: Sequence[Site], mask_EL: np.ndarray, expert_T: np.ndarray) -> None:
    """Refuse experts that skip a layer from which a cache of diffusers takes what it keeps.

    First-block caches compare what their first layer did, and keep what their last one gave. FasterCache wants an
    output of every attention from before it begins to leave them out.
    """
    runs_L, first_L = mask_EL[np.unique(expert_T)].min(axis=0), mask_EL[expert_T[-1]]
    for index, site in enumerate(sites):
        for name, hook in _cache_hooks(backbone.get_submodule(site.name)):
            if ("leader" in name or getattr(hook, "is_tail", False)) and not runs_L[index]:
                raise InputError(f"experts: one skips {site.name}, which the enabled cache of diffusers ({name}) needs "
                                 "at every step: call disable_cache, or use experts that all run it")
            if name.startswith("faster_cache") and not first_L[index] and mask_EL[:, index].any():
                raise InputError(f"experts: the one of the first step skips {site.name}, of which FasterCache needs an "
                                 "output: call disable_cache, or use experts of which that one runs it")


def _cache_hooks(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """diffusers' hooks on a layer and what is in it."""
    for module in layer.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        yield from registry.hooks.items() if registry is not None else ()


def _refuse_cache(*_: Any, **__: Any) -> NoReturn:
    """In place of a backbone's `enable_cache`, which does not know layers with gates."""
    raise InputError("experts: a cache of diffusers is enabled before experts are applied: remove them, call "
                     "enable_cache, and apply them again")


@contextmanager
def serving(simulator: Simulator, mask_EL: np.ndarray, expert_T: np.ndarray) -> Iterator[None]:
    """As `Applied`, inside the block, for a backbone that has gates already."""
    hooks = _register(simulator, _Chooser(simulator, mask_EL, expert_T, None))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def backbone_of(target: Any, component: str | None = None) -> Any:
    """The backbone of a pipeline, or `target` itself; what `torch.compile` wraps is unwrapped.

    component: its name in the pipeline; None: the first that there is of COMPONENTS.
    """
    if not isinstance(target, nn.Module):
        for name in (component,) if component else COMPONENTS:
            if isinstance(getattr(target, name, None), nn.Module):
                target = getattr(target, name)
                break
        else:
            raise InputError(f"experts: a {type(target).__name__} has no {component or 'unet or transformer'} to apply "
                             "them to")
    return getattr(target, "_orig_mod", target)


class _Chooser:
    """Forward hooks that let the timestep argument choose the gates' rows for as long as the forward takes.

    target: the pipeline, whose scheduler knows the timestep before it was rounded to the backbone's precision; or the
        backbone itself.
    """

    def __init__(self, simulator: Simulator, mask_EL: np.ndarray, expert_T: np.ndarray, target: Any) -> None:
        self.simulator, self.family = simulator, family_of(simulator.backbone)
        self.name, self.place = timestep_argument(backbone_class(simulator.backbone))
        self.masks, self.routes = torch.from_numpy(mask_EL), expert_T.tolist()
        self.rows_E = [HardRows(mask_L[None]) for mask_L in self.masks]
        self.pipeline = weakref.ref(target) if hasattr(target, "scheduler") else None
        self._visited: tuple[Any, list[float]] = (None, [])  # the scheduler's timesteps, and on the host

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in another process perhaps, serves another pipeline."""
        return {**vars(self), "pipeline": None, "_visited": (None, [])}

    # In a graph that the user compiles around the backbone: outside it, a break before any layer.
    @torch.compiler.disable
    def begin(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if "_is_replica" in vars(module):
            raise InputError("experts: nn.DataParallel's replicas share one choice of layers: use a process each GPU")
        timestep = kwargs[self.name] if self.name in kwargs else args[self.place]
        given = timestep.tolist() if isinstance(timestep, Tensor) else timestep  # the host read
        values = [self._training(value) for value in (given if isinstance(given, list) else [given])]
        if isinstance(timestep, Tensor) and timestep.dtype in (torch.bfloat16, torch.float16):
            values = self._unrounded(values, torch.finfo(timestep.dtype).eps)
        experts = [self._expert(value) for value in values]
        if experts.count(experts[0]) == len(experts):
            rows = self.rows_E[experts[0]]
        else:
            sample = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.dim())
            rows = HardRows(self.masks[experts], sample.device)
        self.simulator.set(rows)

    @torch.compiler.disable
    def end(self, *_: Any) -> None:
        self.simulator.set(None)

    def _training(self, value: float | list[float]) -> float:
        """The training timestep; where every token has its own, that of the noisiest."""
        if isinstance(value, list):
            return max(map(self._training, value))
        return self.family.training(value, len(self.routes))

    def _unrounded(self, values: list[float], eps: float) -> list[float]:
        """The scheduler's present timestep, if `values` are it but for rounding."""
        scheduler: Any = getattr(self.pipeline() if self.pipeline else None, "scheduler", None)
        timesteps, step = getattr(scheduler, "timesteps", None), getattr(scheduler, "step_index", None)
        if not isinstance(timesteps, Tensor):
            return values
        if self._visited[0] is not timesteps:
            self._visited = timesteps, timesteps.tolist()
        visited = self._visited[1]
        step = (getattr(scheduler, "begin_index", None) or 0) if step is None else step
        if step >= len(visited) or any(abs(visited[step] - value) > eps * len(self.routes) for value in values):
            return values
        return [visited[step]] * len(values)

    def _expert(self, timestep: float) -> int:
        """Of the nearest training timestep."""
        count = len(self.routes)
        if not -0.5 <= timestep <= count:  # a flow begins at T itself
            target: Any = self.pipeline() if self.pipeline else None
            scheduler = type(target.scheduler).__name__ if target is not None else "the scheduler"
            raise InputError(f"experts: timestep={timestep} is outside the training timesteps 0 to {count - 1}: "
                             f"{scheduler} counts noise in other units; use one that counts training timesteps, such "
                             "as DPMSolverMultistepScheduler, or for a flow FlowMatchEulerDiscreteScheduler")
        return self.routes[min(max(round(timestep), 0), count - 1)]


def _register(simulator: Simulator, chooser: _Chooser) -> list[Any]:
    backbone = simulator.backbone
    return [backbone.register_forward_pre_hook(chooser.begin, with_kwargs=True),
            backbone.register_forward_hook(chooser.end, always_call=True)]
