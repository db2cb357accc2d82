"""Before GPU days are spent: what is each layer worth at each timestep, and have experts anything to gain?

`alter measure --config dit_xl2 --out DIR [key.path=value ...]` skips each layer alone, at timesteps of every bin,
prints the table and writes sensitivity.json and sensitivity.png. It also samples with a few layers skipped in one bin
each time, to see how far an error of the output moves samples.
"""

import argparse
import dataclasses

from ..common.files import check_writable
from ..common.load import load_config
from .options import add_config, announce_loading, check_least, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--out", type=user_path, metavar="DIR", required=True)
    parser.add_argument("--bins", type=int, default=10, help="equal intervals of timesteps (default 10)")
    parser.add_argument("--samples", type=int, default=32, help="samples of each bin (default 32)")
    parser.add_argument("--trials", type=int, default=4,
                        help="layers skipped while sampling; each costs bins + 1 forwards a bin (default 4)")
    parser.add_argument("--batch", type=int, default=16, help="samples of one forward (default 16)")


def run(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "bins", "samples", "trials", "batch")
    config = load_config(arguments.config, arguments.overrides)
    check_writable(arguments.out, "--out", folder=True)
    announce_loading()
    import torch

    from ..evaluation.report.figures import plot_sensitivity
    from ..evaluation.report.records import SENSITIVITY, write_sensitivity
    from ..method.sensitivity import as_text, verdict
    from ..training.measure import measure_sensitivity
    from ..training.setup.parts import build

    loss = dataclasses.replace(config.loss, output_kd=0.0, feature_kd=0.0, denoise=1.0)  # no teacher is needed
    config = dataclasses.replace(config, loss=loss)
    parts = build(config, device="cuda" if torch.cuda.is_available() else "cpu")
    table = measure_sensitivity(config, parts, arguments.bins, arguments.samples, arguments.batch, arguments.trials)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    write_sensitivity(table, out / SENSITIVITY)
    plot_sensitivity(table, out / "sensitivity.png")
    print(as_text(table))
    print(verdict(table, parts.budget, config.experts.count))
    print(f"written to {out / SENSITIVITY} and {out / 'sensitivity.png'}")
