"""The backbones that alter knows: layers, MACs of a forward at a usual size, and what was verified.

Others work too if their blocks return what they were given, changed; they are checked before they are trained.
"""

import argparse

from ..common.files import check_writable, write_text
from .options import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", type=user_path, metavar="FILE", help="write a page instead (docs/models.md)")


def run(arguments: argparse.Namespace) -> None:
    from ..backbones.models import MARKS, table

    marks = [f"{name}: {meaning}" for name, meaning in MARKS.items()]
    if arguments.markdown is None:
        print("\n".join([table(), "", *marks]))
        return
    check_writable(arguments.markdown, "--markdown")
    listed = "\n".join(f"- {mark}" for mark in marks)
    write_text(arguments.markdown, PAGE.format(table=table(markdown=True), marks=listed))


PAGE = """# Backbones

Written by `alter models --markdown docs/models.md`. One row for each class of diffusers that the tests know, and for
each released model that has a configuration in `configs/models/`.

TMACs are those of one forward with batch 1: convolutions, matrix and attention products, at the size in "at". Sites
are layers that can be skipped; their share of the MACs is in "prunable". A dash: not counted, because the arguments of
a forward depend on a pipeline or the computation on values; experts apply to it, `alter train` does not count it.
"(defaults)" are those of the class; HiDreamImageTransformer2DModel has none and is counted as HiDream-I1.

What was verified, on tiny random models of the class (`tests/`):

{marks}

"yes", "no", or what it does not hold for. Whether images of a released model stay good under experts is not among these
marks.

{table}
"""
