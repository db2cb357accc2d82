"""torch.compile for experts at work: the ways to do it, measured on the user's device, the fastest kept.

eager: nothing is compiled. layers: every site's layer is a graph of its own, shared by alike layers and all experts.
experts: the whole backbone is one graph an expert, without the layers that it skips. cudagraphs: those, replayed as
CUDA graphs. The expert is chosen outside compiled code in all of them, so that changing it compiles nothing.
"""

import functools
import inspect
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .errors import InputError
from .simulator import Simulator
from .sites import example_inputs

WAYS = ("eager", "layers", "experts", "cudagraphs")


@dataclass(frozen=True)
class Compiled:
    """What was measured, by way, and what was kept.

    Attributes:
        kept: the fastest way.
        seconds: median time of a denoising step, averaged over the training timesteps.
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


def compile_fastest(backbone: Any, simulator: Simulator, expert_T: np.ndarray, batch: int, latent_size: int | None,
                    text_tokens: int, ways: Sequence[str] | None, options: dict[str, Any]) -> Compiled:
    """Measure `ways` (None: all that the device has) and leave the fastest in force, until `leave`.

    Args:
        backbone: with experts applied, whose gates `simulator` holds.
        expert_T: the expert of each training timestep. options: further arguments of torch.compile.

    Raises:
        InputError: for an unknown way, or if none of them works.
    """
    on_gpu = backbone.device.type == "cuda"
    ways = tuple(ways) if ways is not None else WAYS if on_gpu else WAYS[:-1]
    for way in ways:
        if way not in WAYS or (way == "cudagraphs" and not on_gpu):
            raise InputError(f"ways={way!r}: use {', '.join(WAYS[:-1])} or, on a GPU, cudagraphs")
    if "forward" in vars(backbone):  # accelerate's hooks: they would go round the compiled forward
        raise InputError("experts: this backbone is offloaded already: compile first, then enable offloading")
    size = latent_size or backbone.config.sample_size
    inputs = {name: value.repeat(batch, *[1] * (value.dim() - 1))
              for name, value in example_inputs(backbone, size, text_tokens).items()}
    seconds: dict[str, float] = {}
    graphs: dict[str, int] = {}
    failed: dict[str, str] = {}
    for way in ways:
        before = _graphs()
        _enter(way, backbone, simulator, options)
        try:
            seconds[way] = _measure(backbone, inputs, expert_T)
        except torch._dynamo.exc.TorchDynamoException as error:
            failed[way] = " ".join(str(error).split())[:200]
        graphs[way] = _graphs() - before
        leave(backbone, simulator)
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


def _enter(way: str, backbone: Any, simulator: Simulator, options: dict[str, Any]) -> None:
    if way == "layers":
        simulator.compile(**options)
    elif way != "eager":
        # One graph an expert, and again for other shapes; past the limit dynamo would quietly run eagerly.
        dynamo: Any = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 128)
        if way == "cudagraphs":
            options = {**options, "mode": "reduce-overhead"}
        forward = torch.compile(type(backbone).forward, **options)
        backbone._alter_forward = _replayed(forward) if way == "cudagraphs" else forward
        backbone.__class__ = _compiled(backbone.__class__)


def _replayed(forward: Any) -> Any:
    """CUDA graphs write every output to the same memory: return copies, which schedulers may keep."""
    def run(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(torch.Tensor, torch.clone, forward(*args, **kwargs))
    return run


def _measure(backbone: nn.Module, inputs: dict[str, Any], expert_T: np.ndarray, runs: int = 5) -> float:
    experts, first, counts = np.unique(expert_T, return_index=True, return_counts=True)
    times_E: list[list[float]] = [[] for _ in experts]
    with torch.no_grad():
        for run in range(runs + 2):  # the first two compile and warm up
            for timestep, times in zip(first, times_E, strict=True):
                arguments = _as_pipelines_do(inputs, int(timestep))
                _synchronize()
                started = time.perf_counter()
                backbone(**arguments)
                _synchronize()
                if run > 1:
                    times.append(time.perf_counter() - started)
    return float(np.dot([statistics.median(times) for times in times_E], counts) / counts.sum())


def _as_pipelines_do(inputs: dict[str, Any], timestep: int) -> dict[str, Any]:
    """With the shapes, strides and flags of diffusers' pipelines, so that their first step finds its graph."""
    value = torch.tensor(timestep, device=inputs["timestep"].device)
    if "class_labels" in inputs:
        return {**inputs, "timestep": value[None].expand(len(inputs["timestep"]))}
    return {**inputs, "timestep": value, "return_dict": False}


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@functools.cache
def _compiled(cls: Any) -> Any:
    missing = inspect.Parameter.empty
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls.forward).parameters.items()
                if name != "self"}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the class's own; a batch of several experts, which would be a new graph each time, runs eagerly."""
        run = self._alter_forward if self._alter_applied.simulator.is_uniform else cls.forward
        # Pipelines write the same call in several ways, each of which would be a graph.
        given = {**dict(zip(defaults, args, strict=False)), **kwargs}
        return run(self, **{name: given[name] for name in (*defaults, *given)
                            if name in given and given[name] is not defaults.get(name, missing)})

    compiled: Any = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
    return compiled
