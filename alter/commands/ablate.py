"""Compare ways to choose layers and steps at equal MACs, over several seeds:

`alter ablate --config ablation_glyphs [key.path=value ...] [--variants hypernetwork elastic]`

All variants share the dense model, the number of training iterations (`elastic_range`, which serves every budget, has
half as many more), the MACs of all denoising steps, and the sampler. `dense` trains nothing and takes fewer steps;
`elastic_range` also gives the rows `planned`. Rows are written as soon as they are known; started again, what is there
is not run again. At the end it prints a table of means and standard deviations, and draws the rows beside FILE. Models
as small as these leave most of a GPU and of several cores idle: `--jobs` trains several at a time.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from ..backbones.latency import device_name
from ..common.config import Config
from ..common.errors import InputError
from ..common.files import check_writable, read_text, write_text
from ..common.load import load_config
from ..evaluation.report.figures import plot_fronts
from ..training.ablation import UNSEARCHED, ablation_table, dense_rows, run_rows, unsearched_experts
from ..training.demo import make_demo
from ..training.rating import Rating, digest
from ..training.run import train
from ..training.setup.parts import build
from .options import add_config, check_keep, check_least, user_path

_RANGE = (0.35, 1.0)  # of keep ratios, that one elastic run serves
SEARCHED = {
    "paper": ["paper=true"], "two_stage": ["paper=true", "train.schedule=two_stage"],
    "manual": ["paper=true", "experts.router=uniform"],
    "hypernetwork": ["paper=true", "search.draws=sample", "search.supernet=true", "experts.router=ordered",
                     "experts.start=measured", "experts.offset=2"],
    "elastic": ["paper=true", "search.method=elastic"],
    "elastic_one": ["paper=true", "search.method=elastic", "experts.count=1"],
    "elastic_range": ["paper=true", "search.method=elastic", f"budget.keep_ratio={list(_RANGE)}"],
}
_KEY = {"variant", "seed", "budget", "run"}  # what tells rows apart
VARIANTS = ("dense", *SEARCHED, *UNSEARCHED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "YAML file of a demo's run")
    parser.add_argument("--out", type=user_path, metavar="FILE",
                        help="JSON file of rows, continued if it is there (default docs/results/NAME.json)")
    parser.add_argument("--runs", type=user_path, metavar="DIR", default="outputs/ablation",
                        help="folder of the runs themselves")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="NAME",
                        help=f"of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5], help="keep ratios (default 0.5)")
    parser.add_argument("--jobs", type=int, default=1,
                        help="runs side by side, each in a process of one thread printing to DIR/RUN.log (default 1)")


def run(arguments: argparse.Namespace) -> None:
    check_keep(arguments)
    check_least(arguments, 1, "jobs")
    for seed in arguments.seeds:
        if load_config(arguments.config, [*arguments.overrides, f"seed={seed}"]).data.holdout == 0:
            raise InputError("data.holdout=0: some samples are needed to measure the output error on")
    out = arguments.out or Path(f"docs/results/{Path(arguments.config).stem}.json")
    check_writable(out, "--out")
    check_writable(arguments.runs, "--runs", folder=True)
    rows = _rows_of(out) if out.is_file() else []
    wanted: dict[tuple[str, float, int], str] = {}
    for seed, keep, variant in itertools.product(arguments.seeds, arguments.keep, arguments.variants):
        if variant in ("dense", "elastic_range", "dense_tuned", "every_second"):  # of all budgets, or one of their own
            keep = 1.0
        name = " ".join((variant, *arguments.overrides))
        if not any((row["run"], row["seed"], row["budget"]) == (name, seed, keep) for row in rows):
            wanted[variant, keep, seed] = name
    if wanted:
        make_demo(load_config(arguments.config, arguments.overrides), _device())  # of the same seed for all
    for found in _found(arguments, wanted, rows):
        rows += found
        write_text(out, json.dumps(rows, indent=1) + "\n")
    print(ablation_table(rows))
    plot_fronts(rows, out.with_suffix(".png"))


def _found(arguments: argparse.Namespace, wanted: dict[tuple[str, float, int], str],
           rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each, as soon as they are known."""
    if arguments.jobs == 1:
        for (variant, keep, seed), name in wanted.items():
            print(f"== {name}, keep ratio {keep}, seed {seed}", flush=True)
            yield _rows(arguments, variant, name, keep, seed, rows)
        return
    arguments.runs.mkdir(parents=True, exist_ok=True)
    first = sorted(wanted, key=lambda job: job[0] != "dense")  # most others are compared with its samples
    failed = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = {pool.submit(_beside, arguments, job, wanted[job], list(rows)): job for job in first}
        try:
            for job in as_completed(jobs):
                variant, keep, seed = jobs[job]
                said = f"{wanted[jobs[job]]}, keep ratio {keep}, seed {seed}"
                if isinstance(found := job.result(), Path):
                    failed.append(f"{said}: see {found}")
                else:
                    print(f"== {said}", flush=True)
                    yield found
        finally:
            pool.shutdown(cancel_futures=True)
    if failed:
        raise InputError(f"--jobs: failed: {'; '.join(failed)} (the others' rows are written)")


def _beside(arguments: argparse.Namespace, job: tuple[str, float, int], name: str,
            rows: list[dict[str, Any]]) -> list[dict[str, Any]] | Path:
    """The rows that this command finds in a process of its own; its log, if it fails."""
    variant, keep, seed = job
    folder = _folder(arguments, variant, name, keep, seed)
    log, part = folder.with_name(f"{folder.name}.log"), folder.with_name(f"{folder.name}-rows.json")
    write_text(part, json.dumps(rows))
    command = [sys.executable, "-m", "alter", "ablate", *arguments.overrides, "--config", arguments.config, "--out",
               part, "--runs", arguments.runs, "--variants", variant, "--seeds", seed, "--keep", keep]
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with log.open("a") as stream:
        done = subprocess.run(list(map(str, command)), stdout=stream, stderr=stream, env=alone)
    if done.returncode:
        return log
    found = json.loads(read_text(part, "--out"))[len(rows) :]
    for file in (part, part.with_suffix(".png")):
        file.unlink()
    return found


def _folder(arguments: argparse.Namespace, variant: str, name: str, keep: float, seed: int) -> Path:
    """Of a run, and of what is kept beside it."""
    short = name if len(name) < 100 else f"{variant}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return arguments.runs / f"{Path(arguments.config).stem}-{short.replace('/', '_')}-{keep}-{seed}"


def _rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows that an earlier call wrote."""
    try:
        rows = json.loads(read_text(file, "--out"))
    except json.JSONDecodeError:
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and _KEY <= row.keys() for row in rows):
        raise InputError(f"--out {file}: holds no rows of `alter ablate`: choose another file")
    return rows


def _rows(arguments: argparse.Namespace, variant: str, name: str, keep: float, seed: int,
          beside: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train the variant, unless that is done, and rate it, by the same real images as the rows beside it."""
    device, folder = _device(), _folder(arguments, variant, name, keep, seed)
    settings = [*arguments.overrides, f"seed={seed}", f"output_dir={folder / 'run'}"]
    config = load_config(arguments.config, settings)
    rating = Rating(config, build(config, device=device), arguments.runs / f"{Path(arguments.config).stem}-rating")
    real = digest(rating.reference)
    for other in {row.get("real", "unknown ones") for row in beside} - {real}:
        raise InputError(f"--out: its rows were rated by other real images ({other}) than are drawn here ({real}), by "
                         "other versions of matplotlib or Pillow or another configuration: choose another file")
    for other in {row.get("yardstick", "unknown ones") for row in beside} - {rating.yardstick}:
        raise InputError(f"--out: its rows were rated by another dense model or classifier ({other}) than are here "
                         f"({rating.yardstick}): choose another file")
    if variant != "dense" and not (folder / "run" / "summary.json").is_file():
        _train(arguments, config, variant, folder, [*settings, *SEARCHED.get(variant, ["paper=true"])], keep, seed)
    steps, total = config.evaluate.sampling_steps, rating.parts.cost.macs_total
    found = dense_rows(rating, steps) if variant == "dense" else run_rows(rating, folder / "run", variant, steps)
    common = {"run": name, "seed": seed, "budget": keep, "device": device_name(device), "torch": torch.__version__,
              "samples": config.evaluate.samples, "real": real, "yardstick": rating.yardstick}
    return [{**common, **row, "share": row["macs"] / (steps * total)} for row in found]


def _train(arguments: argparse.Namespace, config: Config, variant: str, folder: Path, settings: list[str], keep: float,
           seed: int) -> None:
    """Without the samples that a demo draws at its end: `Rating` draws its own."""
    settings += ["evaluate.dense=false", "evaluate.samples=100"]
    if variant == "elastic_range":
        settings += [f"train.{name}={value * 3 // 2}" for name, value in (
            ("steps", config.train.steps), ("search_steps", config.train.t_end))]
    else:
        settings.append(f"budget.keep_ratio={keep}")
    if variant in UNSEARCHED:
        asked = dataclasses.replace(config, budget=dataclasses.replace(config.budget, keep_ratio=keep))
        unsearched_experts(variant, asked, build(asked, device=_device()), seed).save_pretrained(folder / "experts")
        settings.append(f"experts.pretrained={folder / 'experts'}")
    if any((folder / "run" / "checkpoints").glob("step-*")):
        settings.append("resume=latest")
    train(load_config(arguments.config, settings))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
