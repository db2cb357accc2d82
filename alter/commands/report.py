"""A finished run as one HTML page: `alter report --run outputs/demo_dit/latest`.

Several runs are compared on one page. The page needs no other file and asks for none.
"""

import argparse
from pathlib import Path

from ..common.errors import InputError
from ..common.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="DIR", nargs="+", required=True, help="run directories, or saved folders")
    parser.add_argument("--out", metavar="FILE", help="page to write (default: report.html in the first of them)")


def run(arguments: argparse.Namespace) -> None:
    from ..evaluation.report.page import build_page, read_run

    runs = [read_run(folder) for folder in arguments.run]
    out = Path(arguments.out or runs[0].folder / "report.html")
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"--out {out}: name a file in a folder that exists")
    write_text(out, build_page(runs))
    print(f"written to {out} ({out.stat().st_size / 1e6:.1f} MB)")
