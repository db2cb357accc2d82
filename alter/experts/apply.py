"""Experts at work in a diffusers pipeline: the backbone's own timestep chooses the rows of its gates.

The choice is made once per forward, in Python, outside compiled code, from at most one host read of the timestep; the
layers then run or not without a look at the device (backbones/gates.py). Nothing compares tensors. It holds until that
forward ends, in the thread that runs it. So does the rung of the ladder that is asked of a thread or task.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..backbones.family import COMPONENTS, backbone_class, family_of, timestep_argument
from ..backbones.gates import HardRows, Rows, Simulator
from ..backbones.sites import Site, named_sites
from ..common.errors import InputError
from .ladder import Experts, Rung
from .trajectory import followed
from .trim import check_runnable

# What `TemporalExperts.at` asks of the calls of this thread or task: by which experts, and for what. Innermost first.
_ASKED: ContextVar[tuple[tuple[Experts, float | Rung], ...]] = ContextVar("alter_asked", default=())


@dataclass
class Installed:
    """What `apply` put on a backbone, and for which experts."""

    experts: Experts
    simulator: Simulator
    chooser: "_Chooser"
    hooks: list[Any]


class Applied:
    """Experts on a backbone until `remove`, or until the end of a `with` block, which yields the target."""

    def __init__(self, target: Any, backbone: Any, experts: Experts, rung: Rung) -> None:
        self.target, self.backbone, self.experts = target, backbone, experts
        self.before: tuple[_Chooser, Rung] | None = None  # they were there, at that rung
        installed: Installed | None = vars(backbone).get("_alter_applied")
        if installed is not None:
            check_same(installed, experts)
            self.before = installed.chooser, installed.chooser.rung
            installed.chooser.check(rung)
            installed.chooser.rung = rung
            return
        sites = check_fit(backbone, experts, (*experts.ladder, rung))
        for one in (*experts.ladder, rung):
            check_caches(backbone, sites, experts, one)
        simulator = Simulator(backbone)
        simulator.require_rows(True)
        if hasattr(backbone, "enable_cache"):
            backbone.enable_cache = _refuse_cache
        chooser = _Chooser(simulator, experts, rung, target)
        backbone._alter_applied = Installed(experts, simulator, chooser, _register(simulator, chooser))

    def __enter__(self) -> Any:
        return self.target

    def __exit__(self, *_: Any) -> None:
        if self.before is None:
            remove(self.backbone, self.experts)
        else:
            self.before[0].rung = self.before[1]


def remove(target: Any, experts: Experts | None = None) -> None:
    """Restore the backbone of `target` to what it was before experts were applied: these, if they are named.

    Raises:
        InputError: if there are none, or others.
    """
    backbone = backbone_of(target)
    installed: Installed | None = vars(backbone).get("_alter_applied")
    if installed is None:
        raise InputError("experts: none are applied to this backbone: call apply first")
    if experts is not None:
        check_same(installed, experts)
    for hook in installed.hooks:
        hook.remove()
    installed.simulator.remove()
    vars(backbone).pop("enable_cache", None)
    del backbone._alter_applied


def check_same(installed: Installed, experts: Experts) -> None:
    """Raises InputError if the experts that are installed are not these, of equal masks and ladder."""
    if not installed.experts.same(experts):
        raise InputError("experts: others are applied to this backbone: remove them first")


def check_fit(backbone: nn.Module, experts: Experts, rungs: Iterable[Rung]) -> tuple[Site, ...]:
    """The backbone's sites, which must be those of the experts.

    Raises:
        InputError: for another backbone's experts, or if a rung runs a layer that this one was trimmed of.
    """
    sites, unknown = named_sites(backbone, experts.sites), family_of(backbone).unknown
    if unknown:
        raise InputError(f"experts: a {backbone_class(backbone).__name__} cannot be served: {unknown}, by which no "
                         "expert can be chosen")
    for rung in rungs:
        check_runnable(backbone, sites, experts.mask_EL, rung.used)
    return sites


def check_caches(backbone: nn.Module, sites: Sequence[Site], experts: Experts, rung: Rung) -> None:
    """Refuse a rung that skips a layer from which a cache of diffusers takes what it keeps, or that is cached itself.

    First-block caches compare what their first layer did, and keep what their last one gave. FasterCache wants an
    output of every attention from before it begins to leave them out.
    """
    mask_UL, first_L = experts.mask_EL[rung.used], experts.mask_EL[rung.expert_T[-1]]
    hooks = [name for name, _ in _cache_hooks(backbone) if "cache" in name or name.startswith(("fbc_", "pyramid_"))]
    if rung.cached and hooks:
        raise InputError(f"experts: a rung is cached, and so is the backbone by diffusers ({hooks[0]}): call "
                         "disable_cache, or take another rung alone (`experts.only`)")
    for index, site in enumerate(sites):
        for name, hook in _cache_hooks(backbone.get_submodule(site.name)):
            if ("leader" in name or getattr(hook, "is_tail", False)) and not mask_UL[:, index].all():
                raise InputError(f"experts: one skips {site.name}, which the enabled cache of diffusers ({name}) needs "
                                 "at every step: call disable_cache, or use experts that all run it")
            if name.startswith("faster_cache") and not first_L[index] and mask_UL[:, index].any():
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
def asking(experts: Experts, asked: float | Rung) -> Iterator[None]:
    """Inside the block, what `experts` ask for rules this thread or task (see `TemporalExperts.at`)."""
    before = _ASKED.get()
    _ASKED.set(((experts, asked), *before))
    try:
        yield
    finally:
        _ASKED.set(before)


@contextmanager
def serving(simulator: Simulator, experts: Experts) -> Iterator[None]:
    """As `Applied`, inside the block, for a backbone that has gates already."""
    hooks = _register(simulator, _Chooser(simulator, experts, experts.rung, None))
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

    rung: in force where `at` asks for no other. target: the pipeline, whose scheduler knows the timestep before it was
        rounded to the backbone's precision; or the backbone itself.
    """

    def __init__(self, simulator: Simulator, experts: Experts, rung: Rung, target: Any) -> None:
        self.simulator, self.family = simulator, family_of(simulator.backbone)
        self.name, self.place = timestep_argument(backbone_class(simulator.backbone))
        self.experts, self.rung, self.count = experts, rung, len(rung.expert_T)
        self.masks = torch.from_numpy(experts.mask_EL)
        self.rows_E = [HardRows(mask_L[None]) for mask_L in self.masks]
        self.pipeline = weakref.ref(target) if hasattr(target, "scheduler") else None
        self._visited: tuple[Any, list[float]] = (None, [])  # the scheduler's timesteps, and on the host
        self._fit = weakref.WeakSet[Rung]()  # rungs that this backbone can run

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in another process perhaps, serves another pipeline."""
        return {**vars(self), "pipeline": None, "_visited": (None, []), "_fit": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _fit=weakref.WeakSet[Rung]())

    # In a graph that the user compiles around the backbone: outside it, a break before any layer.
    @torch.compiler.disable
    def begin(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if "_is_replica" in vars(module):
            raise InputError("experts: nn.DataParallel's replicas share one choice of layers: use a process each GPU")
        timestep = kwargs[self.name] if self.name in kwargs else args[self.place]
        given = timestep.tolist() if isinstance(timestep, Tensor) else timestep  # the host read
        values = [self._training(value) for value in (given if isinstance(given, list) else [given])]
        if isinstance(timestep, Tensor) and timestep.dtype in (torch.bfloat16, torch.float16):
            values = self._unrounded(values, timestep.dtype)
        rung = self._in_force()
        experts = [self._expert(value, rung) for value in values]
        alike = experts.count(experts[0]) == len(experts)
        if rung.cached and not alike:
            raise InputError("experts: a cached rung serves samples of one expert at a time, and these have timesteps "
                             "of several: call the backbone with one timestep at a time")
        if rung.cached:
            rows: Rows = followed().rows(module, self.experts, rung, experts[0], values[0])
        elif alike:
            rows = self.rows_E[experts[0]]
        else:
            sample = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.dim())
            rows = HardRows(self.masks[experts], sample.device)
        self.simulator.set(rows)

    @torch.compiler.disable
    def end(self, *_: Any) -> None:
        self.simulator.set(None)

    def check(self, rung: Rung) -> None:
        """Raises InputError if this backbone cannot run the rung, on the ladder or not."""
        if rung not in self._fit:
            backbone: Any = self.simulator.backbone
            check_caches(backbone, check_fit(backbone, self.experts, (rung,)), self.experts, rung)
            self._fit.add(rung)

    def _in_force(self) -> Rung:
        """The rung for the present call: what is asked for in this thread or task, or the one that is applied."""
        for experts, asked in _ASKED.get():
            if not isinstance(asked, Rung):
                return self.experts.pick(asked)
            if experts.same_masks(self.experts):
                self.check(asked)
                return asked
            if experts.component == self.experts.component:
                raise InputError("experts: at a Rung of other experts than those that are applied: ask for a keep "
                                 "ratio, or apply the experts of the Rung")
        return self.rung

    def _training(self, value: float | list[float]) -> float:
        """The training timestep; where every token has its own, that of the noisiest."""
        if isinstance(value, list):
            return max(map(self._training, value))
        return self.family.training(value, self.count)

    def _unrounded(self, values: list[float], dtype: torch.dtype) -> list[float]:
        """The scheduler's present timestep, if `values` are what it is rounded to: before the backbone's units, or
        after."""
        pipeline = self.pipeline or vars(self.simulator.backbone).get("_alter_drawn_by")  # of validation images
        scheduler: Any = getattr(pipeline() if pipeline else None, "scheduler", None)
        timesteps, step = getattr(scheduler, "timesteps", None), getattr(scheduler, "step_index", None)
        if not isinstance(timesteps, Tensor):
            return values
        if self._visited[0] is not timesteps:
            self._visited = timesteps, timesteps.tolist()
        visited = self._visited[1]
        step = (getattr(scheduler, "begin_index", None) or 0) if step is None else step
        if step >= len(visited):
            return values
        exact = torch.tensor(visited[step])
        rounded = [self._training(self.family.value(each).to(dtype).item()) for each in (exact, exact.to(dtype))]
        return [visited[step]] * len(values) if all(value in rounded for value in values) else values

    def _expert(self, timestep: float, rung: Rung) -> int:
        """Of the nearest training timestep."""
        count = self.count
        if not -0.5 <= timestep <= count:  # a flow begins at T itself
            target: Any = self.pipeline() if self.pipeline else None
            scheduler = type(target.scheduler).__name__ if target is not None else "the scheduler"
            raise InputError(f"experts: timestep={timestep} is outside the training timesteps 0 to {count - 1}: "
                             f"{scheduler} counts noise in other units; use one that counts training timesteps, such "
                             "as DPMSolverMultistepScheduler, or for a flow FlowMatchEulerDiscreteScheduler")
        return int(rung.expert_T[min(max(round(timestep), 0), count - 1)])


def _register(simulator: Simulator, chooser: _Chooser) -> list[Any]:
    backbone = simulator.backbone
    return [backbone.register_forward_pre_hook(chooser.begin, with_kwargs=True),
            backbone.register_forward_hook(chooser.end, always_call=True)]
