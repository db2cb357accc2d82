"""torch.compile for experts at work: the ways to do it, measured on the user's device, the fastest kept.

eager: nothing is compiled. layers: every site's layer is a graph of its own, shared by alike layers and all experts.
experts: the whole backbone is one graph an expert, without the layers that it skips. cudagraphs: those, replayed as
CUDA graphs. The expert is chosen outside compiled code in all of them, so that changing it compiles nothing.
"""

import functools
import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from ..backbones.gates import Simulator
from ..backbones.sites import example_inputs
from ..common.errors import InputError

WAYS = ("eager", "layers", "experts", "cudagraphs")
_PASSES, _MEASURED = 3, 0.1  # over the ways; seconds of every expert's step in each


@dataclass(frozen=True)
class Compiled:
    """What was measured, by way, and what was kept.

    Attributes:
        kept: the fastest way.
        seconds: median time of a denoising step, averaged over the training timesteps; the least of three passes.
        graphs: graphs compiled. failed: why a way could not be compiled.
        batch, latent_size: of the measured inputs.
    """

    kept: str
    seconds: dict[str, float]
    graphs: dict[str, int]
    failed: dict[str, str]
    batch: int
    latent_size: int

    def __str__(self) -> str:
        lines = [f"a denoising step, batch {self.batch}, latents of {self.latent_size} x {self.latent_size}:"]
        lines += [f"  {way:10} {1e3 * seconds:10.2f} ms  {self.graphs[way]:4} graphs"
                  + ("  kept" if way == self.kept else "") for way, seconds in self.seconds.items()]
        return "\n".join(lines + [f"  {way:10} failed: {reason}" for way, reason in self.failed.items()])


def check_ways(backbone: Any, ways: Sequence[str] | None, options: dict[str, Any]) -> tuple[str, ...]:
    """The ways to measure; None: all that the device has.

    Raises:
        InputError: for an unknown way or option, or if the backbone is offloaded already.
    """
    on_gpu = backbone.device.type == "cuda"
    ways = tuple(ways) if ways is not None else WAYS if on_gpu else WAYS[:-1]
    for way in ways:
        if way not in WAYS or (way == "cudagraphs" and not on_gpu):
            raise InputError(f"ways={way!r}: use {', '.join(WAYS[:-1])} or, on a GPU, cudagraphs")
    if {"mode", "options"} & options.keys():
        raise InputError("mode, options: these belong to the ways: choose among `ways`, or call torch.compile yourself")
    own = vars(backbone).get("forward")
    hooked = hasattr(backbone, "_hf_hook") or hasattr(backbone, "_diffusers_hook")
    if own is not None and not hooked and inspect.unwrap(own) is inspect.unwrap(type(backbone).forward):
        del backbone.forward  # left by accelerate's hooks when they were removed
    elif own is not None and set(ways) & set(WAYS[2:]):
        raise InputError("experts: this backbone is offloaded already: compile first, then enable offloading")
    return ways


def compile_fastest(backbone: Any, simulator: Simulator, expert_T: np.ndarray, batch: int, latent_size: int | None,
                    text_tokens: int, ways: tuple[str, ...], options: dict[str, Any]) -> Compiled:
    """Measure the ways and leave the fastest in force, until `leave`.

    Args:
        backbone: with experts applied, whose gates `simulator` holds.
        expert_T: the expert of each training timestep. options: further arguments of torch.compile.

    Raises:
        InputError: if none of the ways works.
    """
    size = latent_size or backbone.config.sample_size
    inputs = example_inputs(backbone, size, text_tokens, batch)
    # One graph an expert, and again for other shapes; past these limits dynamo would quietly run eagerly.
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64 + 8 * (int(expert_T.max()) + 1))
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * dynamo.recompile_limit)
    seconds: dict[str, float] = {}
    graphs: dict[str, int] = {}
    failed: dict[str, str] = {}
    for way in _PASSES * ways:  # in turn, since other work on the machine slows one of them more than another
        if way in failed:
            continue
        before = _graphs()
        _enter(way, backbone, simulator, options)
        try:
            seconds[way] = min(_measure(backbone, inputs, expert_T), seconds.get(way, math.inf))
        except RuntimeError as error:  # of dynamo, of a backend, or out of memory
            failed[way] = " ".join(str(error).split())[:200]
            seconds.pop(way, None)
        finally:
            leave(backbone, simulator)
        graphs[way] = graphs.get(way, 0) + _graphs() - before
    if not seconds:
        raise InputError(f"experts: torch.compile failed ({next(iter(failed.values()))})")
    kept = min(seconds, key=seconds.__getitem__)
    _enter(kept, backbone, simulator, options)
    return Compiled(kept, seconds, graphs, failed, batch, size)


def leave(backbone: Any, simulator: Simulator) -> None:
    """Back to eager."""
    simulator.uncompile()
    if hasattr(backbone, "_alter_forward"):
        backbone.__class__ = type(backbone).__mro__[1]
        del backbone._alter_forward
        installed = backbone._alter_applied
        installed.hook = register_chooser(backbone, installed.choose_rows)


def register_chooser(backbone: Any, choose_rows: Callable) -> Any:
    """Call it before every forward; in a graph that the user compiles, outside it: a break, before any layer."""
    return backbone.register_forward_pre_hook(torch.compiler.disable(choose_rows), with_kwargs=True)


def _enter(way: str, backbone: Any, simulator: Simulator, options: dict[str, Any]) -> None:
    if way == "layers":
        simulator.compile(**options)
    elif way != "eager":
        backbone._alter_forward = compile_forward(type(backbone), way, **options)
        backbone._alter_applied.hook.remove()  # the forward chooses the rows itself, with less around it
        backbone.__class__ = _compiled(backbone.__class__)


def compile_forward(cls: Any, way: str, **options: Any) -> Callable:
    """`cls.forward` as one graph, or one CUDA graph; its first argument is the backbone."""
    if way != "cudagraphs":
        return torch.compile(cls.forward, **options)
    forward = torch.compile(cls.forward, mode="reduce-overhead", **options)

    def run(*args: Any, **kwargs: Any) -> Any:
        """CUDA graphs write every output to the same memory: a copy is returned, which schedulers may keep."""
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(torch.Tensor, torch.clone, forward(*args, **kwargs))

    return run


def _measure(backbone: Any, inputs: dict[str, Any], expert_T: np.ndarray) -> float:
    _, first, counts = np.unique(expert_T, return_index=True, return_counts=True)

    def step(timestep: int) -> float:
        arguments = _as_pipelines_do(inputs, timestep)
        synchronize(backbone.device)
        started = time.perf_counter()
        backbone(**arguments)
        synchronize(backbone.device)
        return time.perf_counter() - started

    with torch.no_grad():
        for _ in range(2):  # compiles, and warms up
            warm = [step(timestep) for timestep in first.tolist()]
        runs = max(2, round(_MEASURED / max(warm)))
        seconds_RE = [[step(timestep) for timestep in first.tolist()] for _ in range(runs)]
    return float(np.dot(np.median(seconds_RE, axis=0), counts) / counts.sum())


def _as_pipelines_do(inputs: dict[str, Any], timestep: int) -> dict[str, Any]:
    """With the shapes, strides and flags of diffusers' pipelines, so that their first step finds its graph."""
    value = torch.tensor(timestep, device=inputs["timestep"].device)
    if "class_labels" in inputs:
        return {**inputs, "timestep": value[None].expand(len(inputs["timestep"]))}
    return {**inputs, "timestep": value, "return_dict": False}


def synchronize(device: torch.device) -> None:
    """Wait for everything that was sent to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@functools.cache
def _compiled(cls: Any) -> Any:
    parameters = inspect.signature(cls.forward).parameters
    names = [name for name in parameters if name != "self"]
    defaults = {name: parameter.default for name, parameter in parameters.items()
                if parameter.default is not inspect.Parameter.empty}

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the class's own, which also serves what would be new graphs each time: batches of several experts.

        It may be called after `leave`, by hooks that have kept it.
        """
        compiled_forward = vars(self).get("_alter_forward")
        if compiled_forward is None:
            return cls.forward(self, *args, **kwargs)
        installed = self._alter_applied
        choose_rows = installed.choose_rows
        if torch.compiler.is_compiling():  # the user's graph, around this one; alone it need not pay for the wrapper
            choose_rows = torch.compiler.disable(choose_rows)
        choose_rows(self, args, kwargs)
        if not installed.simulator.is_uniform:
            return cls.forward(self, *args, **kwargs)
        # Pipelines write the same call in several ways, and schedulers the same timestep, each of which would be a
        # graph; the backbone makes a float of it first of all.
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        given["timestep"] = torch.as_tensor(given["timestep"], dtype=torch.float32, device=given[names[0]].device)
        return compiled_forward(self, **given)

    compiled: Any = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
    return compiled
