"""Signal to noise of the search's gradients at its start, with one draw of masks an iteration or one a sample, for each
router: `OMP_NUM_THREADS=1 python scripts/gradient_noise.py --config configs/demo_dit.yaml`. In one process.

The model has to be there: run its demo first.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alter import InputError, load_config  # noqa: E402
from alter.training.gradient_noise import measure_gradient_noise  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", required=True)
    parser.add_argument("--draws", type=int, default=200, help="updates whose gradients are compared (default 200)")
    parser.add_argument("--routers", nargs="+", default=["learned", "smooth", "ordered", "uniform"], metavar="NAME")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args()
    if arguments.draws < 20:
        parser.error("--draws: 20 are the least")
    print("| router | draws | mask logits | router | switches | shares |\n|---|---|---|---|---|---|")
    try:
        for router in arguments.routers:
            for draws in ("iteration", "sample"):
                config = load_config(arguments.config, [*arguments.overrides, "search.method=hypernetwork",
                                                        "log.tracker=none", f"experts.router={router}",
                                                        f"search.draws={draws}"])
                found = measure_gradient_noise(config, arguments.draws)
                masks, routes = ("" if value is None else f"{value[0]:.4f} ± {value[1]:.4f}"
                                 for value in (found.masks, found.router))
                shares = " ".join(f"{share:.0%}" for share in found.share_E)
                switches = np.count_nonzero(np.diff(found.expert_T))
                print(f"| {router} | {draws} | {masks} | {routes} | {switches} | {shares} |", flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
