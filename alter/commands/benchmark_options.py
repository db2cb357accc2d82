"""What the trainer's options of speed gain on this machine, as ratios in one run.

`alter benchmark-options --config demo_sd --option optim.fused=true --option backbone.channels_last=true --out FILE
[key.path=value ...]` times whole iterations (data, teacher, updates) of the search and of the tuning, without any
option first and last, and each option in between.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.files import check_writable, write_text
from ..common.load import load_config
from .options import add_config, announce_loading, check_least, user_path

PLAIN = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "YAML file, whose model and data must exist")
    parser.add_argument("--option", metavar="KEY=VALUE", action="append", default=[], help="an option to measure")
    parser.add_argument("--steps", type=int, default=12, help="iterations timed in each phase (default 12)")
    parser.add_argument("--warmup", type=int, default=4, help="iterations before them (default 4)")
    parser.add_argument("--out", type=user_path, metavar="FILE", required=True, help="JSON file to write")


def run(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "steps")
    check_least(arguments, 0, "warmup")
    for option in ("", *arguments.option):
        t_end = load_config(arguments.config, [*arguments.overrides, *option.split()]).train.t_end
        steps = arguments.warmup + arguments.steps
        if steps >= t_end:
            raise InputError(f"--steps and --warmup: {steps} steps do not fit into train.search_steps={t_end}")
    check_writable(arguments.out, "--out")
    announce_loading()
    import diffusers
    import torch

    from ..backbones.latency import device_name

    rows = []
    for option in [PLAIN, *arguments.option, PLAIN]:
        changes = [] if option == PLAIN else option.split()
        rows.append({"option": option, **_measure(arguments, [*arguments.overrides, *changes])})
        print(json.dumps(rows[-1]), flush=True)
    for phase in ("search", "tuning"):
        plain = statistics.mean(row[f"{phase}_seconds"] for row in (rows[0], rows[-1]))
        for row in rows:
            row[f"{phase}_ratio"] = row[f"{phase}_seconds"] / plain
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    write_text(arguments.out, json.dumps({
        "config": arguments.config, "overrides": arguments.overrides, "device": device,
        "torch": torch.__version__, "diffusers": diffusers.__version__,
        "rows": rows,
    }, indent=2) + "\n")
    for row in rows:
        print(f"{row['option']:32} search {row['search_ratio']:.2f}  tuning {row['tuning_ratio']:.2f}")


def _measure(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Median seconds of an iteration in each phase and, on a GPU, the peak memory in bytes."""
    import torch

    from ..training.run import make_accelerator
    from ..training.setup.parts import build
    from ..training.trainer import Trainer

    config = load_config(arguments.config, [*overrides, "log.tracker=none", "validate.every=null"])
    accelerator = make_accelerator(config)
    device = accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, build(config, 1, device), accelerator, Path(folder))
        steps = arguments.warmup + arguments.steps
        micro_batches = trainer.micro_batches(2 * steps)
        result: dict[str, Any] = {}
        for phase in ("search", "tuning"):
            if phase == "tuning":
                trainer.freeze()
            seconds = [_timed(trainer, micro_batches, device) for _ in range(steps)]
            result[f"{phase}_seconds"] = statistics.median(seconds[arguments.warmup :])
    if device.type == "cuda":
        result["peak_memory"] = torch.cuda.max_memory_allocated()
    accelerator.free_memory()
    del trainer, accelerator, micro_batches
    gc.collect()
    torch.compiler.reset()
    return result


def _timed(trainer: Any, micro_batches: Any, device: Any) -> float:
    from .benchmarking.timing import synchronize

    started = time.perf_counter()
    trainer.iteration(micro_batches)
    trainer.step += 1
    synchronize(device)
    return time.perf_counter() - started
