"""Compare the method with its ablations and with other ways to choose layers, over several seeds:

`python scripts/ablate.py --config configs/ablation_dit.yaml --out docs/results/ablation_dit.json [key.path=value ...]`

All variants share the dense model, the number of training iterations, the keep ratio (every_second has its own) and the
sampler. A row is written as soon as it is known; started again, what is there is not run again.
"""

import argparse
import itertools
import json
import platform
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from alter import InputError, load_config  # noqa: E402
from alter.ablation import GIVEN, given_experts  # noqa: E402
from alter.build import build  # noqa: E402
from alter.demo import make_demo  # noqa: E402
from alter.files import write_text  # noqa: E402
from alter.run import train  # noqa: E402

SEARCHED = {
    "alter": [], "static": ["experts.count=1"], "manual": ["experts.router=uniform"],
    "two_stage": ["train.schedule=two_stage"], "no_distillation": ["loss.output_kd=0", "loss.feature_kd=0"],
    "experts_2": ["experts.count=2"], "experts_10": ["experts.count=10"],
}
VARIANTS = ("dense", *SEARCHED, *GIVEN)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="PATH", required=True, help="YAML file of a demo's run")
    parser.add_argument("--out", metavar="FILE", required=True, help="JSON file of rows, continued if it is there")
    parser.add_argument("--runs", metavar="DIR", default="outputs/ablation", help="folder of the runs themselves")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="NAME",
                        help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5], help="keep ratios (default 0.5)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of the file")
    arguments = parser.parse_intermixed_args()
    try:
        _ablate(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _ablate(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: its folder does not exist")
    rows = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    for keep, seed, variant in itertools.product(arguments.keep, arguments.seeds, arguments.variants):
        if any((row["variant"], row["seed"], row["keep_ratio_target"]) == (variant, seed, keep) for row in rows):
            continue
        print(f"== {variant}, keep ratio {keep}, seed {seed}", flush=True)
        run = _run(arguments, variant, keep, seed)
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        rows += _rows(variant, keep, seed, summary)
        write_text(out, json.dumps(rows, indent=1) + "\n")


def _run(arguments: argparse.Namespace, variant: str, keep: float, seed: int) -> Path:
    """Train the variant, unless that is done; returns the run directory."""
    folder = Path(arguments.runs) / f"{Path(arguments.config).stem}-{variant}-{keep}-{seed}"
    run = folder / "run"
    if (run / "summary.json").is_file():
        return run
    settings = [*arguments.overrides, f"seed={seed}", f"budget.keep_ratio={keep}", f"output_dir={run}",
                f"evaluate.dense={'true' if variant == 'dense' else 'false'}"]
    config = load_config(arguments.config, settings)
    make_demo(load_config(arguments.config, arguments.overrides), torch.device("cpu"))  # of the same seed for all
    if variant in GIVEN or variant == "dense":
        chosen = "dense_tuned" if variant == "dense" else variant
        given_experts(chosen, config, build(config), seed).save_pretrained(folder / "experts")
        settings += [f"experts.pretrained={folder / 'experts'}", *(["train.steps=1"] if variant == "dense" else [])]
    else:
        settings += SEARCHED[variant]
    if any((run / "checkpoints").glob("step-*")):
        settings.append("resume=latest")
    return train(load_config(arguments.config, settings))


def _rows(variant: str, keep: float, seed: int, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """A row; two for the dense model, with the steps of the experts and with 50."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    common = {"variant": variant, "seed": seed, "keep_ratio_target": keep, "device": device,
              "torch": torch.__version__, "samples": summary["samples"]}
    if variant == "dense":
        return [{**common, "keep_ratio": 1.0, "sampling_steps": steps, "fd": summary[f"fd_{name}"],
                 "accuracy": summary[f"accuracy_{name}"], "macs": summary["macs_dense"], "output_error": 0.0}
                for name, steps in (("dense", summary["sampling_steps"]), ("dense_50", 50))]
    return [{**common, "keep_ratio": summary["keep_ratio"], "sampling_steps": summary["sampling_steps"],
             "fd": summary["fd_experts"], "accuracy": summary["accuracy_experts"], "macs": summary["macs_experts"],
             "output_error": summary["output_error"], "experts_used": summary["experts_used"],
             "seconds": summary["seconds_total"]}]


if __name__ == "__main__":
    sys.exit(main())
