"""How much of what their MACs promise experts realise, in use and in training; everything interleaved in one process.

`alter benchmark --cases dit_xl2 --kinds step trajectory --json FILE` times backbones with random weights. The masks are
random draws at each keep ratio (of all MACs), each reported with its own MACs, or those of a run.

efficiency = (dense time / expert time) * (expert MACs / dense MACs), for training floor / time ratio; overhead =
expert time / time of the same model with the skipped layers taken out by hand, for training time ratio / floor.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from typing import Any

from ..common.errors import InputError
from ..common.files import check_writable, write_text
from .benchmarking import CASES, KINDS
from .options import announce_loading, check_keep, check_least, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", choices=CASES,
                        help="default: all on a GPU, demo_sd and demo_dit on a CPU")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["step", "trajectory"],
                        help="default step trajectory; training is for dit_xl2 and sd21")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager"], help="default eager")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.65, 0.5], metavar="P", help="default 0.65 0.5")
    parser.add_argument("--masks", type=int, default=5, help="random draws at each keep ratio (default 5)")
    parser.add_argument("--run", type=user_path, metavar="DIR", help="a finished run, whose masks are taken instead")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="default 1")
    parser.add_argument("--runs", type=int, default=6, help="timed runs of each alternative (default 6)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of inference (default fp32)")
    parser.add_argument("--json", type=user_path, metavar="FILE", required=True)


def run(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "masks", "batch", "runs")
    check_keep(arguments)
    check_writable(arguments.json, "--json")
    announce_loading()
    import torch

    from .benchmarking.cases import trained_experts
    from .benchmarking.training import CUT

    on_gpu = torch.cuda.is_available()
    arguments.cases = arguments.cases or (list(CASES) if on_gpu else ["demo_sd", "demo_dit"])
    untrained = [name for name in arguments.cases if name not in CUT]
    if set(arguments.kinds) & set(KINDS[2:]) and (untrained or arguments.run):
        raise InputError(f"--kinds train_*: for --cases {' '.join(CUT)}, and without --run")
    if arguments.run is not None:
        trained_experts(arguments.run)  # what is wrong with it is said before the backbones are made
    rows: list[dict[str, Any]] = []
    for row in _rows(arguments, torch.device("cuda" if on_gpu else "cpu")):
        rows.append(row)
        print(_line(row), flush=True)
        write_text(arguments.json, json.dumps(rows, indent=1) + "\n")
    print("\nmeans (least to most):")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in _GROUPED), []).append(row)
    for group in groups.values():
        print(_line(group[0], {name: [row[name] for row in group] for name in _SHOWN}))


_GROUPED = ("case", "kind", "mode", "batch", "keep_ratio", "optimizer_step")
_SHOWN = {"macs_ratio": "MACs", "time_ratio": "time", "efficiency": "efficiency", "overhead": "overhead"}


def _line(row: dict[str, Any], values: dict[str, list[float]] | None = None) -> str:
    extra = {None: "", True: "with optimizer step", False: "without optimizer step"}[row.get("optimizer_step")]
    mask = "" if values else f"mask {row['mask_seed']} " if row["mask_seed"] is not None else "trained mask "
    if row.get("expert") is not None and not values:
        mask += f"{row['expert']} "
    numbers = "  ".join(
        f"{label} {row[name]:.3f}" if values is None else
        f"{label} {statistics.mean(values[name]):.3f} ({min(values[name]):.3f} to {max(values[name]):.3f})"
        for name, label in _SHOWN.items()
    )
    return (f"{row['case']:8} {row['kind']:12} {row['mode']:8} batch {row['batch']} keep {row['keep_ratio']:.2f} "
            f"{mask} {numbers}  {extra}")


def _rows(arguments: argparse.Namespace, device: Any) -> Iterator[dict[str, Any]]:
    import diffusers
    import torch

    from ..backbones.latency import device_name
    from .benchmarking import inference, training
    from .benchmarking.cases import load_case

    about = {"device": device_name(device), "threads": torch.get_num_threads(), "dtype": arguments.dtype,
             "torch": torch.__version__, "diffusers": diffusers.__version__}
    in_use = {"step": inference.steps, "trajectory": inference.trajectories}
    for name in arguments.cases:
        used = [kind for kind in in_use if kind in arguments.kinds]
        case: Any = load_case(name, device, arguments.dtype, arguments.run) if used else None
        for batch in arguments.batch:
            for kind in used:
                for mode in arguments.modes:
                    for row in in_use[kind](case, arguments, batch, mode):
                        yield {"case": name, "kind": kind, "mode": mode, "batch": batch, **about, **row}
            kinds = [kind for kind in KINDS if kind in arguments.kinds and kind not in in_use]
            for row in training.iterations(name, arguments, batch, kinds, device) if kinds else []:
                yield {"case": name, "mode": "eager", "batch": batch, **about, **row}
