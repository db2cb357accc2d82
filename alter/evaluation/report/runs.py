"""Reading a finished run: its experts, configuration, measurements and history."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...backbones.schedules import hands_sigmas, load_scheduler, make_sampler, make_solver, tokens_of, visited_rows
from ...common.config import Config
from ...common.errors import InputError
from ...common.load import load_config
from ...experts.artefact import FILE_NAME as EXPERTS
from ...experts.artefact import TemporalExperts
from ...method.budget import Budget
from ...method.sensitivity import Sensitivity
from ..pictures import AGAINST, read_pairs
from .records import HISTORY, SENSITIVITY, read_history, read_sensitivity
from .words import achieved, verdict


@dataclass(frozen=True)
class Run:
    """A run directory, or a saved folder with an experts.json; what it lacks is None or empty.

    final: the folder with experts.json. summary: of summary.json. metrics: values by name, of metrics.json.
    pairs: of against.json, by metric; worst: of against.png, as `read_pairs` returns it.
    losses: lines of metrics.jsonl. history: as `read_history` returns it. table: of sensitivity.json.
    """

    folder: Path
    final: Path
    experts: TemporalExperts
    config: Config | None
    summary: dict[str, Any]
    metrics: dict[str, Any]
    pairs: dict[str, Any]
    worst: list[Any]
    losses: list[dict[str, Any]]
    history: list[dict[str, Any]]
    table: Sensitivity | None

    @property
    def name(self) -> str:
        return self.config.name if self.config else self.folder.resolve().name

    @property
    def measured(self) -> dict[str, Any]:
        """The summary; what the experts say themselves where there is none."""
        return {**achieved(self.experts), **self.summary}

    @property
    def verdict(self) -> str:
        """What the sensitivity table says about experts at this run's budget; of a run without one, that."""
        if self.table is None:
            return ("No sensitivity of the layers (`alter measure` measures it): the run has no "
                    f"{SENSITIVITY}.")
        experts = self.experts
        share_L = experts.latency.share_L if experts.latency else np.array(experts.macs) / experts.macs_total
        visited = None if experts.timesteps is None else np.array(experts.timesteps)
        return verdict(self.table, Budget(share_L, experts.keep_ratio_target, experts.budget_over, visited),
                       len(experts.used))

    def visited(self, sampler: str, steps: int) -> list[int]:
        """The training timesteps at which that diffusers scheduler runs the backbone, in its order."""
        solver = make_sampler(sampler, "", load_scheduler(self.final), self.tokens)
        return visited_rows(solver, steps, self.tokens, hands_sigmas(self.final)).tolist()

    @property
    def sampler(self) -> str:
        """Class of the diffusers scheduler of the samples at the end of a run."""
        return type(make_solver(load_scheduler(self.final), self.tokens)).__name__

    @property
    def tokens(self) -> int:
        """Of an image, by which dynamic shifts of flows go."""
        return tokens_of(self.final, self.config.data.resolution if self.config else None)

    def macs_per_image(self, steps: int, dense: bool = False) -> float:
        """Of the backbone, in that many steps; with classifier-free guidance it runs twice per step."""
        scale = 1 if self.config is None else self.config.evaluate.guidance_scale
        runs_per_step = 1 if self.summary.get("free_guidance", scale) == 1 else 2
        if dense:
            return runs_per_step * steps * self.experts.macs_total
        if not (self.final / "scheduler").is_dir():
            return runs_per_step * steps * self.experts.macs_mean
        return runs_per_step * float(self.experts.macs_T[self.visited(self.sampler, steps)].sum())


def read_run(folder: str | Path) -> Run:
    """Read a run directory, or the newest in a folder of runs, or a saved folder.

    Raises:
        InputError: if it is none of these, or naming the file that cannot be read.
    """
    finals = [final for run in (Path(folder), Path(folder) / "latest") for final in (run / "final", run)]
    final = next((final for final in finals if (final / EXPERTS).is_file()), None)
    if final is None:
        raise InputError(f"--run {folder}: neither it nor its final/ holds an {EXPERTS}: name a finished run")
    run, experts = final.parent if final.name == "final" else final, TemporalExperts.from_pretrained(final)

    def read(name: str, parse: Callable[[Path], Any], absent: Any = None) -> Any:
        try:
            return parse(run / name) if (run / name).is_file() else absent
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{run / name}: cannot be read ({error}): repair or remove it") from None

    def lines(file: Path) -> list[dict[str, Any]]:
        found = [dict(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
        return [line for line in found if "step" in line and {"search/perf", "train/perf"} & line.keys()]

    def pairs(file: Path) -> dict[str, Any]:
        return {name: {"value": result["value"], "ci95": result.get("ci95"), "protocol": result["protocol"],
                       "images": result["reference"]["images"], "differs": dict(result["reference"]["differs"])}
                for name, result in json.loads(file.read_bytes()).items()}

    found = Run(
        run, final, experts, read("config.yaml", load_config),
        read("summary.json", lambda file: dict(json.loads(file.read_bytes())), {}),
        read("metrics.json", lambda file: {name: result["value"] for name, result
                                           in json.loads(file.read_bytes()).items()}, {}),
        read(f"{AGAINST}.json", pairs, {}), read(f"{AGAINST}.png", read_pairs, []),
        read("metrics.jsonl", lines, []),
        read(HISTORY, lambda file: read_history(file, len(experts.expert_T)), []),
        read(SENSITIVITY, read_sensitivity))
    if any(record["mask_EL"].shape != experts.mask_EL.shape for record in found.history):
        raise InputError(f"{run / HISTORY}: belongs to other layers or experts than {final / EXPERTS}")
    if found.table and found.table.sites != experts.sites:
        raise InputError(f"{run / SENSITIVITY}: belongs to other layers than {final / EXPERTS}")
    return found
