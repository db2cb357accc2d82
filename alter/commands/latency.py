"""Measure a backbone's latencies on this machine, for a budget of time that is trained for elsewhere.

`alter latency --config sd21 --out latency.json [key.path=value ...]`; then train with
`budget.cost=latency budget.latency_file=latency.json`. Needs the backbone's configuration, not its weights.
"""

import argparse

from ..common.files import check_writable
from ..common.load import load_config
from .options import add_config, announce_loading, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--out", type=user_path, metavar="FILE", required=True, help="JSON file to write")


def run(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    check_writable(arguments.out, "--out")
    announce_loading()
    import torch

    from ..training.setup.plan import measure

    latency = measure(config, "cuda" if torch.cuda.is_available() else "cpu")
    latency.save(arguments.out)
    print(f"{latency.place}: {latency.seconds_total * 1e3:.2f} ms a forward")
    for name, seconds, share in zip(latency.sites, latency.seconds, latency.share_L, strict=True):
        print(f"  {name:60} {seconds * 1e3:9.3f} ms  {share:6.2%}")
    print(f"  prunable: {latency.share_L.sum():.1%}")
