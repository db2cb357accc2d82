"""Seconds of every site and of a whole forward, measured on the device that the experts are meant for."""

import contextlib
import dataclasses
import json
import platform
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..common.errors import InputError
from ..common.files import write_text
from .inputs import example_inputs
from .sites import find_sites


@dataclass(frozen=True)
class Latency:
    """Medians of one dense forward without gradients.

    Attributes:
        sites: name of every site, [L]. seconds: what skipping it saves, [L]. seconds_total: of the whole forward.
        device: its name. dtype: of weights and latents. batch, latent_size: of the latents [batch, C, size, size].
    """

    sites: tuple[str, ...]
    seconds: tuple[float, ...]
    seconds_total: float
    device: str
    dtype: str
    batch: int
    latent_size: int

    @property
    def share_L(self) -> np.ndarray:
        """Seconds of every site as a share of the whole forward, float64 [L]."""
        return np.array(self.seconds) / self.seconds_total

    @property
    def place(self) -> str:
        """Where and how it was measured, for the terminal."""
        return f"{self.device}, {self.dtype}, batch {self.batch}, latents of {self.latent_size} x {self.latent_size}"

    def save(self, file: Path) -> None:
        write_text(file, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> "Latency":
        """Raises InputError, naming the file, if it is missing or not one that `save` wrote."""
        try:
            return cls.parse(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file}: no measured latencies ({' '.join(str(error).split())[:200]}): write one with "
                             "`alter latency`") from None

    @classmethod
    def parse(cls, content: Any) -> "Latency":
        """From plain JSON; KeyError, TypeError or ValueError if a field is missing or wrong."""
        latency = cls(
            tuple(map(str, content["sites"])), tuple(map(float, content["seconds"])), float(content["seconds_total"]),
            str(content["device"]), str(content["dtype"]), int(content["batch"]), int(content["latent_size"]),
        )
        if len(latency.seconds) != len(latency.sites) or not all(value > 0 for value in latency.seconds):
            raise ValueError(f"seconds: needs {len(latency.sites)} values above 0, one a site")
        if not latency.seconds_total >= sum(latency.seconds):
            raise ValueError("seconds_total: less than the sites' sum")
        return latency


def measure_latency(backbone: Any, latent_size: int, batch: int, runs: int = 20,
                    inputs: Mapping[str, Any] | None = None) -> Latency:
    """Time the layers of `backbone` within whole forwards, eagerly, on its device and in its dtype.

    On a GPU, times are those between events on its stream, so that gaps in which it waits for the host count.

    Args:
        backbone: in evaluation mode, without experts or at full depth.
        latent_size: side of the latents, in latent pixels.
        batch: of the backbone; guidance doubles that of a pipeline.
        runs: timed forwards, after five untimed ones.
        inputs: of a forward of these sizes; None: zeros.
    """
    inputs = inputs or example_inputs(backbone, latent_size, batch=batch)
    sites = find_sites(backbone)
    on_gpu = backbone.device.type == "cuda"
    starts: dict[nn.Module, Any] = {}
    ends: dict[nn.Module, Any] = {}

    def now() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if on_gpu else end - start

    hooks: list[Any] = []
    times: list[list[float]] = []
    totals: list[float] = []
    layers: list[nn.Module] = [backbone.get_submodule(site.name) for site in sites]
    try:
        for module in layers:
            hooks.append(module.register_forward_pre_hook(lambda module, *_: starts.update({module: now()})))
            hooks.append(module.register_forward_hook(lambda module, *_: ends.update({module: now()})))
        with torch.no_grad(), torch.cuda.device(backbone.device) if on_gpu else contextlib.nullcontext():
            for run in range(runs + 5):
                start = now()
                backbone(**inputs)
                end = now()
                if on_gpu:
                    torch.cuda.synchronize()
                if run >= 5:
                    times.append([between(starts[layer], ends[layer]) for layer in layers])
                    totals.append(between(start, end))
    finally:
        for hook in hooks:
            hook.remove()
    arithmetic = str(backbone.dtype).removeprefix("torch.")
    if on_gpu and backbone.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        arithmetic = "tf32"
    seconds = tuple(statistics.median(column) for column in zip(*times, strict=True))
    return Latency(tuple(site.name for site in sites), seconds, max(statistics.median(totals), sum(seconds)),
                   device_name(backbone.device), arithmetic, batch, latent_size)


def device_name(device: torch.device) -> str:
    """The model of a GPU; or that of a CPU, if the system tells it (else its kind), and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", cpus.read_text(encoding="utf-8")) if cpus.is_file() else None
    return f"{named[1].strip() if named else platform.machine() + ' CPU'}, {torch.get_num_threads()} threads"
