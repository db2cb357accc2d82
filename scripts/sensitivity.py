"""Before GPU days are spent: what is each layer worth at each timestep, and have experts anything to gain?

`python scripts/sensitivity.py --config configs/dit_xl2.yaml --out DIR [key.path=value ...]` skips each layer alone, at
timesteps of every bin, prints the table and writes sensitivity.json and sensitivity.png. It also samples with a few
layers skipped in one bin each time, to see how far an error of the output moves samples.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from alter import (
    InputError,
    load_config,  # noqa: E402
)
from alter.evaluation.report.figures import plot_sensitivity  # noqa: E402
from alter.method.sensitivity import as_text, verdict  # noqa: E402
from alter.training.measure import measure_sensitivity  # noqa: E402
from alter.evaluation.report.records import SENSITIVITY, write_sensitivity  # noqa: E402
from alter.training.setup.parts import build  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="PATH", required=True, help="YAML file of the run")
    parser.add_argument("--out", metavar="DIR", required=True)
    parser.add_argument("--bins", type=int, default=10, help="equal intervals of timesteps (default 10)")
    parser.add_argument("--samples", type=int, default=32, help="samples of each bin (default 32)")
    parser.add_argument("--trials", type=int, default=4,
                        help="layers skipped while sampling; each costs bins + 1 forwards a bin (default 4)")
    parser.add_argument("--batch", type=int, default=16, help="samples of one forward (default 16)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of the file")
    arguments = parser.parse_intermixed_args()
    try:
        for name in ("bins", "samples", "trials", "batch"):
            if getattr(arguments, name) < 1:
                raise InputError(f"--{name} {getattr(arguments, name)}: choose at least 1")
        _measure(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    loss = dataclasses.replace(config.loss, output_kd=0.0, feature_kd=0.0, denoise=1.0)  # no teacher is needed
    config = dataclasses.replace(config, loss=loss)
    parts = build(config, device="cuda" if torch.cuda.is_available() else "cpu")
    table = measure_sensitivity(config, parts, arguments.bins, arguments.samples, arguments.batch,
                                arguments.trials)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    write_sensitivity(table, out / SENSITIVITY)
    plot_sensitivity(table, out / "sensitivity.png")
    print(as_text(table))
    print(verdict(table, parts.budget, config.experts.count))
    print(f"written to {out / SENSITIVITY} and {out / 'sensitivity.png'}")


if __name__ == "__main__":
    sys.exit(main())
