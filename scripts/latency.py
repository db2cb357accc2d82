"""Measure a backbone's latencies on this machine, for a budget of time that is trained for elsewhere.

`python scripts/latency.py --config configs/sd21.yaml --out latency.json [key.path=value ...]`; then train with
`budget.cost=latency budget.latency_file=latency.json`. Needs the backbone's configuration, not its weights.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from alter import (
    InputError,
    load_config,  # noqa: E402
)
from alter.training.setup.plan import measure  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="PATH", required=True, help="YAML file of the run")
    parser.add_argument("--out", metavar="FILE", required=True, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of the file")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        if not Path(arguments.out).parent.is_dir():
            raise InputError(f"--out {arguments.out}: its folder does not exist")
        latency = measure(config, "cuda" if torch.cuda.is_available() else "cpu")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    latency.save(Path(arguments.out))
    print(f"{latency.place}: {latency.seconds_total * 1e3:.2f} ms a forward")
    for name, seconds, share in zip(latency.sites, latency.seconds, latency.share_L, strict=True):
        print(f"  {name:60} {seconds * 1e3:9.3f} ms  {share:6.2%}")
    print(f"  prunable: {latency.share_L.sum():.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
