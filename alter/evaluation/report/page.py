"""A run as one HTML page that needs nothing else: no script, no request. And the reading of a run for it."""

import base64
import dataclasses
import functools
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from diffusers import DDPMScheduler
from matplotlib.figure import Figure

from ...backbones.sampling import scheduler_class
from ...common import schema
from ...common.config import Config, load_config
from ...common.errors import InputError
from ...experts.artefact import FILE_NAME as EXPERTS
from ...experts.artefact import TemporalExperts
from ...method.budget import Budget
from ...method.sensitivity import Sensitivity, verdict
from . import figures
from .records import HISTORY, SENSITIVITY, read_history, read_sensitivity

_SAMPLER = "DPMSolverMultistepScheduler"
_MEASURED = {"output_error": "Output error against the dense model", "fd_dense": "Fréchet distance, dense",
             "fd_experts": "Fréchet distance, experts", "fd_dense_50": "Fréchet distance, dense, 50 steps",
             "accuracy_dense": "Accuracy, dense", "accuracy_experts": "Accuracy, experts",
             "accuracy_dense_50": "Accuracy, dense, 50 steps", "seconds_total": "Seconds of the run"}
_BOX = '<div class="box" tabindex="0">'
_CSS = """
:root { color-scheme: light dark; --ink: #1a1f26; --paper: #fff; --soft: #f0f2f5; --line: #b3bac4; --muted: #525c69 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7eaee; --paper: #14181d; --soft: #20262d; --line: #56606d; --muted: #a9b2bd } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem .75rem 3rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h2, h3 { line-height: 1.25; margin: 1.8rem 0 .8rem }
h2 { border-top: 1px solid var(--line); padding-top: 1.4rem }
.figures { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)) }
.absent { grid-column: 1 / -1 }
figure { margin: 0 0 1rem; min-width: 0 }
p, figcaption { max-width: 46rem }
.absent, figcaption { color: var(--muted); font-size: .9rem }
.box { overflow-x: auto }
.box:focus-visible, summary:focus-visible { outline: 2px solid currentColor }
svg { display: block; width: 100%; height: auto }
svg * { stroke-linejoin: round; stroke-linecap: butt }
img { display: block; background: #fff; max-height: 40rem }
img.strip { image-rendering: pixelated; width: 30rem; max-width: 100% }
table { border-collapse: collapse; overflow-wrap: normal; font-size: .95rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line) }
pre { background: var(--soft); padding: .8rem; white-space: pre-wrap; font-size: .85rem }
summary { cursor: pointer; padding: .3rem 0 }
"""


@dataclass(frozen=True)
class Run:
    """A run directory, or a saved folder with an experts.json; what it lacks is None or empty.

    final: the folder with experts.json. summary: of summary.json. metrics: values by name, of metrics.json.
    losses: lines of metrics.jsonl. history: as `read_history` returns it. table: of sensitivity.json.
    """

    folder: Path
    final: Path
    experts: TemporalExperts
    config: Config | None
    summary: dict[str, Any]
    metrics: dict[str, Any]
    losses: list[dict[str, Any]]
    history: list[dict[str, Any]]
    table: Sensitivity | None

    @property
    def name(self) -> str:
        return self.config.name if self.config else self.folder.resolve().name

    @property
    def verdict(self) -> str:
        """What the sensitivity table says about experts at this run's budget; of a run without one, that."""
        if self.table is None:
            return ("No table of what each layer is worth (scripts/sensitivity.py measures it): the run has no "
                    f"{SENSITIVITY}.")
        experts = self.experts
        share_L = experts.latency.share_L if experts.latency else np.array(experts.macs) / experts.macs_total
        return verdict(self.table, Budget(share_L, experts.keep_ratio_target, experts.budget_over),
                                   len(experts.mask_EL))

    def visited(self, sampler: str, steps: int) -> list[int]:
        """The training timesteps at which that diffusers scheduler runs the backbone, in its order."""
        solver = scheduler_class(sampler, "").from_config(DDPMScheduler.load_config(self.final / "scheduler"))
        solver.set_timesteps(steps)
        return np.asarray(solver.timesteps).round().clip(0, len(self.experts.expert_T) - 1).astype(int).tolist()


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
            raise InputError(f"{run / name}: cannot be read ({error}): mend or remove it") from None

    def lines(file: Path) -> list[dict[str, Any]]:
        found = [dict(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
        return [line for line in found if "step" in line and {"search/perf", "train/perf"} & line.keys()]

    found = Run(
        run, final, experts, read("config.yaml", load_config),
        read("summary.json", lambda file: dict(json.loads(file.read_bytes())), {}),
        read("metrics.json", lambda file: {name: result["value"] for name, result
                                           in json.loads(file.read_bytes()).items()}, {}),
        read("metrics.jsonl", lines, []),
        read(HISTORY, lambda file: read_history(file, len(experts.expert_T)), []),
        read(SENSITIVITY, read_sensitivity))
    if any(record["mask_EL"].shape != experts.mask_EL.shape for record in found.history):
        raise InputError(f"{run / HISTORY}: belongs to other layers or experts than {final / EXPERTS}")
    if found.table and found.table.sites != experts.sites:
        raise InputError(f"{run / SENSITIVITY}: belongs to other layers than {final / EXPERTS}")
    return found


def build_page(runs: list[Run]) -> str:
    """One page on one run, or on several with a comparison before them."""
    folders = [run.folder.resolve() for run in runs]
    shared = Path(os.path.commonpath([folder.parent for folder in folders])) if runs else Path()
    names = [run.name if len(runs) == 1 else f"{run.name} ({folder.relative_to(shared)})"
             for run, folder in zip(runs, folders, strict=True)]
    title = escape(f"Temporal experts: {', '.join(names)}")
    ids = (f"f{i}-" for i in itertools.count())  # those of one figure differ from those of another
    parts = ["<h1>Temporal experts</h1>"]
    if len(runs) > 1:
        parts += ["<h2>Comparison</h2>", _facts(runs, names)]
    for run, name in zip(runs, names, strict=True):
        parts += [f"<h2>{escape(name)}</h2>", _facts([run], ["Value"]), *_sections(run, ids)]
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
            + "\n".join(parts) + "\n</main>\n</body>\n</html>\n")


def _sections(run: Run, ids: Iterator[str]) -> Iterator[str]:
    def drawn(figure: Figure, caption: str) -> str:
        return _figure(_svg(figure, next(ids)), caption)

    def absent(file: str, what: str) -> str:
        return f'<p class="absent">No {what}: the run has no {file}.</p>'

    experts, config = run.experts, run.config
    yield (_details("Everything in summary.json", figures.summary_table(run.summary)) if run.summary
           else absent("summary.json", "measurements"))
    yield f'<h3>Experts</h3><pre>{escape(experts.summary())}</pre><div class="figures">'
    yield drawn(figures.masks_figure(experts), "From the input of the backbone (above) to its output.")
    yield drawn(figures.frequency_figure(experts), "Over all training timesteps.")
    yield drawn(figures.routes_figure(experts), "Denoising goes from right to left.")
    yield drawn(figures.similarity_figure(experts), "1: the same layers. 0: none in common.")
    yield '</div><h3>Cost</h3><div class="figures">'
    yield drawn(figures.macs_figure(experts), "Multiply-accumulate operations (MACs) of one forward.")
    if (run.final / "scheduler").is_dir():
        visited = run.visited(_SAMPLER, config.evaluate.sampling_steps if config else 20)
        yield drawn(figures.steps_figure(experts, visited), f"{_SAMPLER}, {len(visited)} steps.")
    else:
        yield absent("scheduler/", "denoising steps")
    yield '</div><h3>Search and tuning</h3><div class="figures">'
    if run.history:
        yield drawn(figures.evolution_figure(run.history, experts), "Of the masks with which the backbone was trained.")
        yield drawn(figures.mask_history_figure(run.history, experts),
                    "Bright where the expert keeps the layer; from the backbone's input (above) to its output.")
        yield drawn(figures.routing_figure(run.history, experts), "Bright where the expert serves the timesteps.")
    else:
        yield absent(HISTORY, "history of the masks")
    yield (drawn(figures.losses_figure(run.losses), "Each point is one mini-batch.") if run.losses
           else absent("metrics.jsonl", "losses"))
    yield "</div><h3>Sensitivity</h3>"
    kind = "" if run.table else ' class="absent"'
    yield f"<p{kind}>{escape(run.verdict)}</p>"
    if run.table:
        yield drawn(figures.sensitivity_figure(run.table), "Bright: skipping the layer changes the output much.")
    yield "<h3>Samples</h3>"
    strips = sorted((run.folder / "samples").glob("*.png"))
    if (samples := run.folder / "samples.png").is_file():
        yield _image(samples, "", "A row a model, dense or with experts; a column a condition, written below.")
    elif not strips:
        yield absent("samples.png", "images")
    for file in strips[:1] + strips[1:][-5:]:
        yield _image(file, "strip", f"Validation images of the configured prompts or labels, {file.stem}.")
    yield "<h3>Configuration</h3>"
    yield _configuration(config) if config else absent("config.yaml", "configuration")


def _facts(runs: list[Run], names: list[str]) -> str:
    """What any of the runs has, a column each."""
    columns = []
    for run in runs:
        experts = run.experts
        over = f"{'all' if experts.budget_over == 'total' else 'prunable'} {'time' if experts.latency else 'MACs'}"
        facts = {"Keep ratio": f"{experts.keep_ratio:.4f} of all MACs",
                 "Target": f"{experts.keep_ratio_target:g} of {over}",
                 "MACs of a step": f"{figures.count(experts.macs_mean)} of {figures.count(experts.macs_total)}",
                 "Experts": f"{len(experts.mask_EL)}, {len(experts.used)} used, over {len(experts.sites)} layers"}
        if experts.latency:
            facts["Time of a step"] = f"{experts.time_ratio:.1%} ({experts.latency.place})"
        facts |= {title: figures.readable(run.summary[key]) for key, title in _MEASURED.items()
                  if run.summary.get(key) is not None}
        facts |= {f"{key} (metrics.json)": figures.readable(value) for key, value in run.metrics.items()}
        columns.append(facts)
    settings = [_settings(run.config) if run.config else {} for run in runs]
    for key in dict.fromkeys(itertools.chain(*settings)):
        if len({values.get(key) for values in settings}) > 1:
            for facts, values in zip(columns, settings, strict=True):
                facts |= {key: values[key]} if key in values else {}
    return _table_of(["Quantity", *names], [[row, *(facts.get(row, "–") for facts in columns)]
                                    for row in dict.fromkeys(itertools.chain(*columns))])


def _settings(config: Config) -> dict[str, str]:
    return {path: str(schema.plain(functools.reduce(getattr, path.split("."), config)))
            for path, _, _ in schema.keys(Config)}


def _configuration(config: Config) -> str:
    settings, defaults = _settings(config), {path: str(schema.plain(entry.default))
                                             for path, entry, _ in schema.keys(Config)}
    changed = [[path, value, defaults[path]] for path, value in settings.items() if value != defaults[path]]
    everything = yaml.safe_dump(schema.plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)
    return _table_of(["Changed key", "Value", "Default"], changed) + _details("The whole configuration", everything)


def _table_of(head: list[str], rows: list[list[str]]) -> str:
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = (f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
             + "</tr>\n" for name, *cells in rows)
    return f"{_BOX}<table><thead><tr>{columns}</tr></thead><tbody>\n{''.join(lines)}</tbody></table></div>"


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"


def _figure(content: str, caption: str) -> str:
    return f"<figure>{_BOX}{content}</div><figcaption>{escape(caption)}</figcaption></figure>"


def _image(file: Path, kind: str, caption: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return _figure(f'<img class="{kind}" alt="{escape(caption)}" src="data:image/png;base64,{data}">', caption)


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as inline SVG in the page's colours, with text as text; its ids begin with `prefix`."""
    written, size = io.StringIO(), figure.get_size_inches() * 72
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "alter"}):
        figure.savefig(written, format="svg", transparent=True, dpi=200)
    _, _, svg = re.sub(r"<(metadata|style).*?</\1>", "", written.getvalue(), flags=re.DOTALL).partition("<svg")
    for pattern, replacement in ((figures.INK, "currentColor"), ("xlink:href", "href"),
                                 (r"font-family: [^;\"]*", "font-family: inherit"),
                                 (r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}")):
        svg = re.sub(pattern, replacement, svg)
    return (f'<svg role="img" aria-label="{escape(str(figure.get_label()))}" viewBox="0 0 {size[0]:g} {size[1]:g}" '
            f'style="min-width: {size[0]:g}pt; max-width: {1.3 * size[0]:g}pt">{svg.partition(">")[2]}')
