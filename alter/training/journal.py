"""What a run writes down while it trains, none of which is worth stopping it for."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from ..common.files import append_text
from ..evaluation.report.figures import plot_experts
from ..evaluation.report.records import HISTORY, describe_masks
from ..experts.artefact import TemporalExperts
from .validation import log_pictures


class Journal:
    """metrics.jsonl, history.jsonl, experts.png and unreadable.jsonl of `run_dir`, and the trackers."""

    def __init__(self, run_dir: Path, accelerator: Accelerator) -> None:
        self.run_dir, self.accelerator = run_dir, accelerator
        self._unwritable: set[str] = set()  # of what has been warned of

    def metrics(self, step: int, metrics: dict[str, float], bar: tqdm) -> None:
        """A line of metrics.jsonl, and the progress bar's."""
        with self.dispensable("the tracker's log"):
            self.accelerator.log(metrics, step=step)
        if self.accelerator.is_main_process:
            with self.dispensable("metrics.jsonl"):
                append_text(self.run_dir / "metrics.jsonl", json.dumps({"step": step, **metrics}) + "\n")
            perf = metrics.get("train/perf", metrics.get("search/perf", math.nan))
            searching = {name: f"{metrics[f'search/{name}']:.3f}" for name in ("ratio", "balance")
                         if f"search/{name}" in metrics}
            bar.set_postfix(searching, loss=f"{perf:.4f}", keep=f"{metrics['keep_ratio']:.3f}",
                            experts=f"{metrics['experts_used']:.0f}")

    def masks(self, step: int, keep_ratio: float, experts: TemporalExperts) -> None:
        """The search's masks and routes now: a line of history.jsonl, and a picture to disk and to the trackers."""
        if not self.accelerator.is_main_process:
            return
        record = {"step": step, "keep_ratio": keep_ratio, **describe_masks(experts.mask_EL, experts.expert_T)}
        picture = self.run_dir / "experts.png"
        with self.dispensable(HISTORY):
            append_text(self.run_dir / HISTORY, json.dumps(record) + "\n")
            plot_experts(experts, picture)
            with Image.open(picture) as image:
                log_pictures(self.accelerator, "experts", np.asarray(image.convert("RGB"))[None], step)

    def unreadable(self, step: int, samples: list[str]) -> None:
        """Name unreadable samples in unreadable.jsonl, which all processes append to."""
        lines = [json.dumps({"step": step, "sample": name}) + "\n" for name in samples]
        with self.dispensable("unreadable.jsonl"):
            append_text(self.run_dir / "unreadable.jsonl", "".join(lines))

    @contextlib.contextmanager
    def dispensable(self, name: str) -> Iterator[None]:
        """On a full disk, the run goes on without what is written here: one line says so, the first time."""
        try:
            yield
        except OSError as error:
            if name not in self._unwritable:
                self._unwritable.add(name)
                tqdm.write(f"warning: {self.run_dir}: {name} could not be written ({error}): the run goes on without",
                           file=sys.stderr)
