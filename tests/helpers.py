"""What several test files use: scripts in this process, trainers, pipelines with experts, pictures."""

import copy
import dataclasses
import errno
import io
import json
import os
import runpy
import socket
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from alter import TemporalExperts
from alter.backbones.cost import count_cost
from alter.backbones.latency import Latency
from alter.common.config import BackboneConfig, Config, DataConfig
from alter.experts.ladder import Rung
from alter.method.budget import nearest, timestep_weights
from alter.method.routers import Times
from alter.method.sensitivity import Sensitivity
from alter.training.run import make_accelerator
from alter.training.setup.parts import build
from alter.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
# Overrides of a demo's configuration, so that it takes seconds, and what its summary tells.
SHORT = ["demo.steps=30", "train.steps=12", "train.search_steps=6", "train.batch_size=16", "optim.warmup_steps=0",
         "evaluate.samples=100", "evaluate.sampling_steps=2", "checkpoint.every=5", "log.every=2", "data.holdout=32",
         "search.samples=4", "search.bins=4"]
KEYS = {
    "keep_ratio_target", "keep_ratio", "macs_dense", "macs_experts", "experts_count", "experts_used", "sampling_steps",
    "fd_dense", "fd_experts", "fd_dense_50", "accuracy_dense", "accuracy_experts", "output_error", "seconds_total",
}
HANGING = 900  # seconds after which a process is taken to hang, however busy the machine is


def times_of(noising, visited=None, only=False, features_TD=None):
    """Of a thousand timesteps, of which a sampler's may count, or be the `only` ones that are trained."""
    log_snr_T = noising.log_snr(noising.at(torch.arange(1000)))
    if only:
        log_snr_T = log_snr_T[torch.from_numpy(nearest(1000, visited))]
    if features_TD is None:
        features_TD = torch.zeros(1000, 8)
    return Times(features_TD, log_snr_T, timestep_weights(1000, visited), torch.arange(1000))


def run_script(name, *arguments, cwd=None, **environment):
    """scripts/`name`.py in this process: its exit code, and what it wrote to both streams."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        if cwd is not None:
            patch.chdir(cwd)
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        patch.setattr(sys, "path", list(sys.path))
        for variable, value in environment.items():
            patch.setenv(variable, value)
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def make_trainer(config, folder):
    """A fresh trainer, with `folder`/run as its run directory."""
    (folder / "run").mkdir(exist_ok=True)
    accelerator = make_accelerator(config)
    return Trainer(config, build(config, device=accelerator.device), accelerator, folder / "run")


def prepared(trainer):
    """The batches of its first iteration."""
    return trainer._prepare(trainer.micro_batches(1))


def metrics_of_updates(trainer, batches, masks=None):
    """What one update of each part prints; the backbone's under `masks`, or those of the hypernetwork."""
    trainer.readout.metrics = {}
    trainer.search.update(batches)
    trainer.update_backbone(batches, *(masks or trainer.masks()))
    trainer.readout.read()
    return trainer.readout.metrics


def snapshot(module):
    return copy.deepcopy(module.state_dict())


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def changed(module, before):
    """Names of what differs from a snapshot."""
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def uneven_latency(**changes) -> Latency:
    """The tiny DiT's blocks, of equal MACs, of which the first takes most of the time."""
    sites = tuple(f"transformer_blocks.{i}" for i in range(4))
    return dataclasses.replace(Latency(sites, (0.6, 0.1, 0.1, 0.1), 1.0, "a device", "float32", 2, 8), **changes)


_COSTS: dict = {}


def known_cost(backbone, size, frames=1):
    """`count_cost`, which depends on the configuration alone, counted once for each."""
    values = {name: value for name, value in backbone.config.items() if not name.startswith("_")}
    key = type(backbone), str(values), size, frames
    if key not in _COSTS:
        _COSTS[key] = count_cost(backbone, size, frames)
    return _COSTS[key]


def experts_for(backbone, size, count=3, seed=0):
    """Random masks, equal intervals of timesteps."""
    cost = known_cost(backbone, size)
    mask_EL = np.random.default_rng(seed).random((count, len(cost.sites))) < 0.6
    return TemporalExperts.build(mask_EL, np.arange(1000) * count // 1000, cost, 0.6, "total")


TARGETS = (0.35, 0.5, 0.65)


def chain(backbone, size=8, component=None, chosen=0.5, seed=0, cost=None, **changes):
    """A nested chain, row d without the d layers that come first in a random order, with a ladder of TARGETS."""
    cost = cost or known_cost(backbone, size)
    count = len(cost.sites)
    rank = np.random.default_rng(seed).permutation(count)
    mask_EL = rank >= np.arange(count)[:, None]

    def routes(target):
        deep, flat = (round(count * (1 - target + shift)) for shift in (0.15, -0.15))
        return np.where(np.arange(1000) < 500, min(deep, count - 1), flat)

    ladder = [Rung(target, routes(target), tuned=target > 0.4, error=target / 10) for target in TARGETS]
    return TemporalExperts.build(mask_EL, routes(chosen), cost, chosen, "total", component=component,
                                 **{"ladder": ladder, **changes})


def load_quietly(folder, cls=StableDiffusionPipeline, **components):
    pipe = cls.from_pretrained(folder, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts="a red circle", **arguments):
    """Images of 32 x 32 pixels, from one seed."""
    settings = {"num_inference_steps": 4, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    if isinstance(pipe, StableDiffusionPipeline):
        settings |= {"height": 32, "width": 32}
    return pipe(prompts, **{**settings, **arguments}).images


def table_of(error_LB, denoise=1.0, steps=1000):
    """A sensitivity table of bins of equal width, in which every bin's errors move samples alike."""
    error_LB = np.array(error_LB, dtype=float)
    layers, bins = error_LB.shape
    edges = tuple(int(edge) for edge in np.linspace(0, steps, bins + 1))
    names = tuple(f"layer.{i}" for i in range(layers))
    return Sensitivity(names, edges, 4, error_LB, np.full(bins, denoise), np.ones(bins))


def grey(value: int, size=(4, 4)) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", size, (value, value, value))


def png(value: int) -> bytes:
    stream = io.BytesIO()
    grey(value).save(stream, "PNG")
    return stream.getvalue()


def shade(sample) -> int:
    """The value of a `grey` picture, from a sample of a data set."""
    assert sample["images"].unique().numel() == 1
    return round((sample["images"].mean().item() + 1) * 127.5)


def save_greys(folder, count, first=0):
    """Pictures `first`, `first` + 1, ... of one colour each, named from 0."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        grey(first + i).save(folder / f"{i}.png")
    return folder


def folder_config(path, **changes) -> DataConfig:
    return DataConfig(**{"path": str(path), "resolution": 4, **changes})


def run_config(path, **changes) -> Config:
    return Config(backbone=BackboneConfig(pretrained="unused"), data=folder_config(path, **changes))


def save_noise(folder, count=12, size=24, seed=0, shift=0):
    """Pictures of random colours, named by their number."""
    folder.mkdir(parents=True)
    source = np.random.default_rng(seed)
    for i in range(count):
        pixels = source.integers(shift, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


class Harmless:
    """Opens a file for writing when it is unpickled."""

    def __reduce__(self):
        return open, ("unpickled", "w")


WEIGHTS = "final/transformer/diffusion_pytorch_model.safetensors"


def metrics_of(run):
    """Lines of metrics.jsonl, without the time that they took."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]


def assert_same_result(run, other):
    """Of two runs of a DiT: the same bits in their weights, experts and metrics."""
    for name in (WEIGHTS, "final/experts.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    assert metrics_of(run) == metrics_of(other)
