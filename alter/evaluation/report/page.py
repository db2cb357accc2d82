"""A run as one HTML page that needs nothing else: no script, no request."""

import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from ...common import schema
from ...common.config import Config
from . import figures
from .html import html_details, html_drawing, html_figure, html_image, html_page, html_table
from .pairs import pairs_section
from .records import HISTORY
from .runs import Run
from .runs import read_run as read_run
from .samples import read_strip
from .words import Groups, macs, number, percent, quality, summary_groups

_UNITS = "MACs: multiply-accumulate operations of the backbone; M: 10⁶, G: 10⁹, T: 10¹²."


def build_page(runs: list[Run]) -> str:
    """One page on one run, or on several with a comparison before them."""
    folders = [run.folder.resolve() for run in runs]
    shared = Path(os.path.commonpath([folder.parent for folder in folders])) if runs else Path()
    names = [run.name if len(runs) == 1 else f"{run.name} ({folder.relative_to(shared)})"
             for run, folder in zip(runs, folders, strict=True)]
    sections = [list(_sections(run, f"run{i}-")) for i, run in enumerate(runs)]
    parts = ["<h1>Temporal experts</h1>"]
    parts += [f'<p class="headline"><strong>{escape(name)}</strong>: {escape(_headline(run))}</p>'
              for run, name in zip(runs, names, strict=True)]
    parts += ["<nav>", *(_contents(i, name, [title for title, _ in section])
                         for i, (name, section) in enumerate(zip(names, sections, strict=True))), "</nav>"]
    if len(runs) > 1:
        parts += ["<h2>Comparison</h2>", _measurements(runs, names)]
    for i, (name, section) in enumerate(zip(names, sections, strict=True)):
        parts.append(f'<h2 id="run{i}">{escape(name)}</h2>')
        for title, content in section:
            parts += [f'<h3 id="{_anchor(i, title)}">{title}</h3>', content]
    return html_page(f"Temporal experts: {', '.join(names)}", parts)


def _headline(run: Run) -> str:
    """Budget, MACs and quality."""
    experts, summary = run.experts, run.summary
    budget = f"{percent(experts.keep_ratio)} of the dense model's MACs per step"
    if experts.time_ratio is not None:
        budget += f", {percent(experts.time_ratio)} of its time"
    sentences = [f"{budget} (target: {percent(experts.keep_ratio_target)})."]
    steps = run.config.evaluate.sampling_steps if run.config else 20
    here, there = run.macs_per_image(steps), run.macs_per_image(50, dense=True)
    sentences.append(f"An image in {steps} steps takes {macs(here)}, {there / here:.1f} times fewer than the "
                     f"{macs(there)} of the dense model in 50 steps.")
    found = [title + quality(summary, model) for model, title in (("experts", ""), ("dense_50", "dense in 50 steps: "))
             if quality(summary, model)]
    if found:
        sentences.append(f"{'; '.join(found)}.")
    return " ".join(sentences)


def _contents(index: int, name: str, titles: list[str]) -> str:
    links = "".join(f'<li><a href="#{_anchor(index, title)}">{title}</a></li>' for title in titles)
    return f'<ul><li><a href="#run{index}">{escape(name)}</a></li>{links}</ul>'


def _anchor(index: int, title: str) -> str:
    return f"run{index}-{re.sub('[^a-z]+', '-', title.lower())}"


def _sections(run: Run, prefix: str) -> Iterator[tuple[str, str]]:
    """Title and content of each part of the page on one run."""
    ids = (f"{prefix}f{i}-" for i in itertools.count())  # those of one figure differ from those of another
    experts, config = run.experts, run.config

    def drawn(figure: Figure, caption: str) -> str:
        return html_figure(html_drawing(figure, next(ids)), caption)

    def absent(file: str, what: str) -> str:
        return f'<p class="absent">No {what}: the run has no {file}.</p>'

    def grid(*parts: str) -> str:
        return "\n".join(['<div class="figures">', *parts, "</div>"])

    samples = run.folder / "samples.png"
    yield "Samples", _samples(samples) if samples.is_file() else absent("samples.png", "images")
    if run.pairs:
        yield "Against the dense model", pairs_section(run.pairs, run.worst)
    everything = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in run.summary.items())
    yield "Measurements", _measurements([run], ["Value"]) + (
        html_details("Everything in summary.json", everything) if run.summary
        else absent("summary.json", "measurements"))
    yield "Experts", f"<pre>{escape(experts.summary())}</pre>" + grid(
        drawn(figures.masks_figure(experts), "Layers in order, from the input of the backbone (top) to its output."),
        drawn(figures.frequency_figure(experts), "Share of the training timesteps at which the layer runs."),
        drawn(figures.routes_figure(experts), "Denoising goes from right to left."),
        drawn(figures.similarity_figure(experts), "1: the same layers. 0: no layer in common."))
    if (run.final / "scheduler").is_dir():
        visited = run.visited(run.sampler, config.evaluate.sampling_steps if config else 20)
        steps = drawn(figures.steps_figure(experts, visited),
                      f"{run.sampler}, one run of the backbone per step (guidance needs two).")
    else:
        steps = absent("scheduler/", "denoising steps")
    yield "Cost", grid(drawn(figures.macs_figure(experts), f"One run of the backbone. {_UNITS}"), steps)
    yield "Search and training", grid(
        *([drawn(figures.evolution_figure(run.history, experts), "The masks with which the backbone was trained."),
           drawn(figures.mask_history_figure(run.history, experts),
                 "Bright: the expert keeps the layer. From the backbone's input (top) to its output."),
           drawn(figures.routing_figure(run.history, experts), "Bright: the expert serves the timesteps.")]
          if run.history else [absent(HISTORY, "history of the masks")]),
        drawn(figures.losses_figure(run.losses), "Each point is one mini-batch.") if run.losses
        else absent("metrics.jsonl", "losses"))
    if strips := sorted((run.folder / "samples").glob("*.png")):
        yield "Validation images", _validation(strips[:1] + strips[1:][-5:])  # the first, and the last five
    kind = "" if run.table else ' class="absent"'
    yield "Sensitivity", f"<p{kind}>{escape(run.verdict)}</p>" + (
        drawn(figures.sensitivity_figure(run.table), "Bright: skipping the layer changes the output strongly.")
        if run.table else "")
    yield "Configuration", _configuration(config) if config else absent("config.yaml", "configuration")


def _samples(file: Path) -> str:
    picture = html_image(file, "samples", "Samples of the dense model and of the experts, a row each.")
    return html_figure(picture, "Each column has one seed. Quality is that of all samples, not only of those shown. "
                       + _UNITS)


def _validation(strips: list[Path]) -> str:
    """The images of each strip in a row, the captions above them."""
    rows, captions = list[list[str]](), list[str]()
    for file in strips:
        images, captions = read_strip(file)
        step = re.sub(r"step-0*(\d+)-", r"\1, ", file.stem)
        rows.append([escape(step), *(html_image(image, "shot", f"Validation image of {caption}, step {step}")
                                     for image, caption in zip(images, captions, strict=True))])
    return html_table(["Step", *map(escape, captions)], {"": rows})


def _measurements(runs: list[Run], names: list[str]) -> str:
    """What any of the runs has, a column each; of several, also the keys in which their configurations differ."""
    columns: list[Groups] = []
    for run in runs:
        metrics = {name: number(value) for name, value in run.metrics.items()}
        columns.append({**summary_groups(run.measured), **({"metrics.json": metrics} if metrics else {})})
    settings = [_settings(run.config) if run.config else {} for run in runs]
    differing = [key for key in dict.fromkeys(itertools.chain(*settings))
                 if len({values.get(key) for values in settings if values}) > 1]
    if differing:
        for column, values in zip(columns, settings, strict=True):
            column["Configuration"] = {key: values[key] for key in differing if key in values}
    groups = {title: [[escape(row), *(escape(column.get(title, {}).get(row, "–")) for column in columns)]
                      for row in dict.fromkeys(row for column in columns for row in column.get(title, {}))]
              for title in dict.fromkeys(itertools.chain(*columns))}
    return html_table(["Quantity", *map(escape, names)], {escape(title): rows for title, rows in groups.items()})


def _settings(config: Config) -> dict[str, str]:
    return {path: _plain(functools.reduce(getattr, path.split("."), config)) for path, _, _ in schema.keys(Config)}


def _plain(value: object) -> str:
    """As YAML has it, so that None is null."""
    return "null" if (plain := schema.plain(value)) is None else str(plain)


def _configuration(config: Config) -> str:
    settings, defaults = _settings(config), {path: _plain(entry.default) for path, entry, _ in schema.keys(Config)}
    changed = [[*map(escape, (path, value, defaults[path]))]
               for path, value in settings.items() if value != defaults[path]]
    everything = yaml.safe_dump(schema.plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)
    return html_table(["Changed key", "Value", "Default"], {"": changed}) + html_details("The whole configuration",
                                                                                          everything)
