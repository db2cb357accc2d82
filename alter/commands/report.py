"""A finished run as one HTML page: `alter report --run outputs/demo_dit/latest`.

Several runs are compared on one page. The page needs no other file and asks for none.
"""

import argparse

from ..common.files import check_writable, write_text
from .options import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=user_path, metavar="DIR", nargs="+", required=True,
                        help="run directories, or saved folders")
    parser.add_argument("--out", type=user_path, metavar="FILE",
                        help="page to write (default: report.html in the first of them)")


def run(arguments: argparse.Namespace) -> None:
    if arguments.out is not None:
        check_writable(arguments.out, "--out")
    from ..evaluation.report.page import build_page, read_run

    runs = [read_run(folder) for folder in arguments.run]
    out = arguments.out or runs[0].folder / "report.html"
    check_writable(out, "--out")
    write_text(out, build_page(runs))
    print(f"written to {out} ({out.stat().st_size / 1e6:.1f} MB)")
