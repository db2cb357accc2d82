"""README's pictures, from finished runs: `python scripts/draw_readme.py --run outputs/demo_sd/latest`.

Writes samples-{light,dark}.png, map-{light,dark}.png and, for --ladder, strip-{light,dark}.png to docs/images/. The
images are drawn and timed on this machine, so that nothing else should run on it. Start it in the folder in which the
run was started.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alter import InputError  # noqa: E402
from alter.evaluation.report.readme import (  # noqa: E402
    draw_map,
    rows_figure,
    sample_rows,
    save_in_both,
    strip_rows,
)
from alter.evaluation.report.runs import read_run  # noqa: E402

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
KEEP_RATIOS = (1.0, 0.8, 0.65, 0.5, 0.35)
PROMPTS = ["a small red circle left of a large blue square", "a large green triangle",
           "a yellow square above a red circle", "a small blue circle",
           "a large red square right of a small green circle", "a large yellow circle above a small blue triangle"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="DIR", required=True, help="finished run whose samples are drawn")
    parser.add_argument("--map", metavar="DIR", help="finished run whose map is drawn (default: the same)")
    parser.add_argument("--ladder", metavar="DIR", help="finished run of a range of budgets, of which strip is drawn")
    parser.add_argument("--out", metavar="DIR", type=Path, default=IMAGES, help="folder (default: docs/images)")
    arguments = parser.parse_args()
    try:
        run = read_run(arguments.run)
        conditions = PROMPTS if (run.final / "text_encoder").is_dir() else list(range(10))
        arguments.out.mkdir(parents=True, exist_ok=True)
        files = save_in_both(draw_map(read_run(arguments.map or arguments.run)), arguments.out, "map")
        samples = rows_figure(sample_rows(run, conditions), [str(condition) for condition in conditions])
        files += save_in_both(samples, arguments.out, "samples")
        if arguments.ladder:
            ladder, classes = read_run(arguments.ladder), list(range(10))
            strip = rows_figure(strip_rows(ladder, classes, KEEP_RATIOS), [str(number) for number in classes])
            files += save_in_both(strip, arguments.out, "strip")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"written to {file}" for file in files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
