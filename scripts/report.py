"""A finished run as one HTML page: `python scripts/report.py --run outputs/demo_dit/latest`.

Several runs are compared on one page. The page needs no other file and asks for none.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alter import InputError  # noqa: E402
from alter.common.files import write_text  # noqa: E402
from alter.evaluation.report.page import build_page, read_run  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="DIR", nargs="+", required=True, help="run directories, or saved folders")
    parser.add_argument("--out", metavar="FILE", help="page to write (default: report.html in the first of them)")
    arguments = parser.parse_args()
    try:
        runs = [read_run(folder) for folder in arguments.run]
        out = Path(arguments.out or runs[0].folder / "report.html")
        if out.is_dir() or not out.parent.is_dir():
            raise InputError(f"--out {out}: name a file in a folder that exists")
        write_text(out, build_page(runs))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
