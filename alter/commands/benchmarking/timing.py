"""Interleaved timing of alternatives in one process, and what makes the host wait."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

_TURN = 0.05  # seconds
_WAITING = ("cpu", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__")


def interleave(ways: dict[str, Callable], runs: int,
               device: torch.device) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Seconds of every way in each of `runs` rounds, in which each has every place in turn; and their last results.

    Rounds run forwards and backwards, since a way gains from caches that one with the same layers has just filled.
    What takes milliseconds is called several times in a turn, for 0.05 s at least. Every round is some calls deeper in
    Python's stack: CPython grows it by chunks, and a loop whose calls cross the end of one allocates and frees the next
    at each call (https://github.com/python/cpython/issues/142183).
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    repeats = 1
    for run in range(-2, runs):  # the first two are warm-ups
        shift, longest = run % len(ways), 0.0
        order = [*ways.items()][shift:] + [*ways.items()][:shift]
        for name, way in order[:: -1 if run // len(ways) % 2 else 1]:
            took, results[name] = _turn(way, repeats, device, depth=5 * (run % 20))
            longest = max(longest, took)
            if run >= 0:
                seconds[name].append(took / repeats)
        if run == -1:
            repeats = max(1, round(_TURN / longest))
    return {name: np.array(times) for name, times in seconds.items()}, results


def ratio(seconds: dict[str, np.ndarray], name: str, to: str) -> float:
    """Median of the rounds' ratios: a machine whose clock changes slows both ways of a round alike."""
    return float(np.median(seconds[name] / seconds[to]))


def synchronize(device: torch.device) -> None:
    """Wait for everything that was sent to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _turn(way: Callable, repeats: int, device: torch.device, depth: int) -> tuple[float, Any]:
    """Seconds of all its calls, `depth` calls below this one, and the last result."""
    if depth:
        return _turn(way, repeats, device, depth - 1)
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        result = way()
    synchronize(device)
    return time.perf_counter() - started, result


def peak_memory(way: Callable, device: torch.device) -> int | None:
    """Bytes allocated at most while it runs, weights included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    way()
    return torch.cuda.max_memory_allocated()


@contextlib.contextmanager
def host_reads(device: torch.device) -> Iterator[list[str]]:
    """Yields a list to which every call is added that reads a tensor of the device; on a CPU, of host memory."""
    calls: list[str] = []
    own = {name: getattr(torch.Tensor, name) for name in _WAITING}

    def counted(name: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if args[0].device.type == device.type:
                calls.append(name)
            return own[name](*args, **kwargs)
        return call

    for name in own:
        setattr(torch.Tensor, name, counted(name))
    try:
        yield calls
    finally:
        for name, function in own.items():
            setattr(torch.Tensor, name, function)
