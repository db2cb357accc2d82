"""Compare the method with its ablations and with other ways to choose layers, over several seeds:

`alter ablate --config ablation_dit [key.path=value ...] [--variants alter static]`

All variants share the dense model, the number of training iterations, the keep ratio (every_second has its own) and the
sampler. A row is written as soon as it is known; started again, what is there is not run again. Rows of overridden keys
are further variants, named by these. At the end it prints a table of means and standard deviations, and draws the
rows beside FILE.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from ..backbones.latency import device_name
from ..common.errors import InputError
from ..common.files import check_writable, read_text, write_text
from ..common.load import load_config
from ..evaluation.report.figures import plot_quality
from ..training.ablation import UNSEARCHED, ablation_table, time_ratio, unsearched_experts
from ..training.demo import make_demo
from ..training.run import train
from ..training.setup.parts import build
from .options import add_config, check_keep, user_path

PAPER = ["experts.start=dense", "experts.offset=4"]  # where the search starts, whatever the file's own start
SEARCHED = {
    "alter": [], "static": ["experts.count=1"], "manual": ["experts.router=uniform"],
    "two_stage": ["train.schedule=two_stage"], "no_distillation": ["loss.output_kd=0", "loss.feature_kd=0"],
    "experts_2": ["experts.count=2"], "experts_10": ["experts.count=10"], "low_balance": ["loss.balance=0.1"],
    "slow_search": ["optim.hypernetwork_lr=1.0e-3"], "long_search": ["train.search_steps=400"],
    "gradual": ["budget.descent=0.75"], "gradual_static": ["budget.descent=0.75", "experts.count=1"],
    "started": ["experts.start=greedy", "experts.offset=2"],
    "started_static": ["experts.start=greedy", "experts.offset=2", "experts.count=1"],
}
_KEY = {"variant", "seed", "keep_ratio_target"}  # what tells rows apart
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


def run(arguments: argparse.Namespace) -> None:
    check_keep(arguments)
    for seed in arguments.seeds:
        if load_config(arguments.config, [*arguments.overrides, f"seed={seed}"]).data.holdout == 0:
            raise InputError("data.holdout=0: some samples are needed to measure the output error on")
    out = arguments.out or Path(f"docs/results/{Path(arguments.config).stem}.json")
    check_writable(out, "--out")
    check_writable(arguments.runs, "--runs", folder=True)
    rows = _rows_of(out) if out.is_file() else []
    for keep, seed, variant in itertools.product(arguments.keep, arguments.seeds, arguments.variants):
        name = " ".join((variant, *arguments.overrides))
        if any((row["variant"], row["seed"], row["keep_ratio_target"]) == (name, seed, keep) for row in rows):
            continue
        print(f"== {name}, keep ratio {keep}, seed {seed}", flush=True)
        rows += [{"variant": name, "seed": seed, "keep_ratio_target": keep, **row}
                 for row in _rows(_train(arguments, variant, name, keep, seed))]
        write_text(out, json.dumps(rows, indent=1) + "\n")
    print(ablation_table(rows))
    plot_quality(rows, out.with_suffix(".png"))


def _rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows that an earlier call wrote."""
    try:
        rows = json.loads(read_text(file, "--out"))
    except json.JSONDecodeError:
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and _KEY <= row.keys() for row in rows):
        raise InputError(f"--out {file}: holds no rows of `alter ablate`: choose another file")
    return rows


def _train(arguments: argparse.Namespace, variant: str, name: str, keep: float, seed: int) -> Path:
    """Train the variant, unless that is done; returns the run directory."""
    folder = arguments.runs / f"{Path(arguments.config).stem}-{name.replace('/', '_')}-{keep}-{seed}"
    run = folder / "run"
    if (run / "summary.json").is_file():
        return run
    settings = [*PAPER, *arguments.overrides, f"seed={seed}", f"budget.keep_ratio={keep}", f"output_dir={run}",
                f"evaluate.dense={'true' if variant == 'dense' else 'false'}"]
    config, device = load_config(arguments.config, settings), _device()
    if config.demo.model:
        make_demo(load_config(arguments.config, arguments.overrides), device)  # of the same seed for all
    if variant in UNSEARCHED or variant == "dense":
        chosen = "dense_tuned" if variant == "dense" else variant
        unsearched_experts(chosen, config, build(config, device=device), seed).save_pretrained(folder / "experts")
        settings.append(f"experts.pretrained={folder / 'experts'}")
        if variant == "dense":
            settings += ["train.steps=1", "optim.warmup_steps=1"]  # a step at rate 0
    else:
        settings += SEARCHED[variant]
    if any((run / "checkpoints").glob("step-*")):
        settings.append("resume=latest")
    return train(load_config(arguments.config, settings)).run_dir


def _rows(run: Path) -> list[dict[str, Any]]:
    """What was measured of a run; twice of the dense model, with the steps of the experts and with 50."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    common = {"device": device_name(_device()), "torch": torch.__version__, "samples": summary["samples"]}
    if "fd_dense" in summary:
        nothing_lost = {"output_error": 0.0, "denoise_error": summary["denoise_error"],
                        "denoise_error_by_timestep": summary["denoise_error_by_timestep"]}
        return [{**common, "keep_ratio": 1.0, "sampling_steps": steps, "fd": summary[f"fd_{name}"],
                 "fd_halves": summary[f"fd_halves_{name}"], "accuracy": summary[f"accuracy_{name}"],
                 "macs": summary["macs_dense"], "time_ratio": steps / summary["sampling_steps"], **nothing_lost}
                for name, steps in (("dense", summary["sampling_steps"]), ("dense_50", 50))]
    errors = {name: summary[name] for name in ("output_error", "denoise_error", "output_error_by_timestep",
                                               "denoise_error_by_timestep")}
    return [{**common, "keep_ratio": summary["keep_ratio"], "sampling_steps": summary["sampling_steps"],
             "fd": summary["fd_experts"], "fd_halves": summary["fd_halves_experts"],
             "accuracy": summary["accuracy_experts"], "macs": summary["macs_experts"],
             "time_ratio": time_ratio(run, _device()), "experts_used": summary["experts_used"], **errors}]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
