"""The table of diffusers' classes: what they cost at a usual size, and what the tests verify of them.

models.json is written by scripts/write_models.py, from counted costs and from what the tests run on.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("models.json")
MARKS = {  # by which the table's last columns are headed
    "dense": "with all layers kept, equal to the plain model bit for bit (under soft masks but for rounding)",
    "blocks": "each layer removed is that layer with zero weights",
    "batches": "samples of one batch run different layers, each as if alone; gradients too",
    "pipeline": "images of its real pipeline equal those of a model whose layers were removed by hand",
    "training": "its real pipeline is trained, exported and loaded again",
}


@dataclass(frozen=True)
class Known:
    """One row.

    Attributes:
        cls: the class. model: a released one, or None where the class's own defaults are counted.
        size: of the image or video in pixels, or of the latents where no model is named.
        sites, tmacs, prunable: None where it cannot be counted.
        verified: mark to "yes", "no", or what it holds for.
    """

    cls: str
    model: str | None
    size: str | None
    sites: int | None
    tmacs: float | None
    prunable: float | None
    verified: dict[str, str]


@cache
def known_models() -> tuple[Known, ...]:
    return tuple(Known(**row) for row in json.loads(FILE.read_text(encoding="utf-8")))


def blocks_are_verified(cls: str) -> bool:
    """Whether the tests have removed every block of a class."""
    return any(row.cls == cls and row.verified["blocks"] != "no" for row in known_models())


def table(markdown: bool = False) -> str:
    """All rows, as text for a terminal or as a page for docs/."""
    cells = [["class", "model", "at", "sites", "TMACs", "prunable", *MARKS], *map(_cells, known_models())]
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        lines.insert(1, "|" + "---|" * len(cells[0]))
        return "\n".join(lines)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in cells)


def _cells(row: Known) -> list[str]:
    return [row.cls, row.model or "(defaults)", row.size or "-", "-" if row.sites is None else str(row.sites),
            "-" if row.tmacs is None else f"{row.tmacs:.3g}", "-" if row.prunable is None else f"{row.prunable:.1%}",
            *(row.verified[mark] for mark in MARKS)]
