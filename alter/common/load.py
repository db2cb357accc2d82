"""A configuration from a YAML file, a name or dictionaries, with overrides; and written back."""

import copy
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from . import schema
from .config import Config
from .errors import Faults, InputError
from .files import write_text

_PACKAGE = Path(__file__).resolve().parents[1]
# Inside an installed package; of a checkout, beside it.
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
# Keys of finished runs that are gone (docs/log.md), with the value that still means what it meant.
RETIRED = {"experts.annealing": 1.0, "experts.resnet_skip": "identity", "experts.transformer_skip": "block"}
# What the paper has where the defaults, or files of this package, have something else; `paper=true` sets it.
PAPER = {
    "search.method": "hypernetwork", "search.draws": "iteration", "search.supernet": False, "experts.router": "learned",
    "experts.start": "dense", "experts.offset": 4.0, "budget.descent": 0.0,
}
# Of the hypernetwork alone. Its losses' weights and learning rate are left out: files hold them for `paper=true`.
_LEARNED = ("experts.router", "experts.tau", "experts.offset", "search.draws")
_MEASURED = ("search.samples", "search.bins", "search.least", "search.features")  # of the elastic search alone
_PATHS = ("output_dir", "resume", "backbone.pretrained", "teacher.pretrained", "experts.pretrained", "data.path",
          "data.prior_path", "budget.latency_file", "search.features")


def load_config(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration.

    Args:
        source: a YAML file, or the name of one in the package ("demo_dit"); or its content, as nested dictionaries.
        overrides: `key.path=value` strings, applied after the file, values in YAML syntax. Where either says
            `paper: true`, PAPER comes between them, and the result has its values with `paper` false.

    Raises:
        InputError: for a missing or malformed file, an unknown key, a wrong type or a value out of range.
    """
    if isinstance(source, dict):
        values = copy.deepcopy(source)
    else:
        file = _find(str(source))
        values = schema.read_yaml(file)
        values.setdefault("name", file.stem)
    for path, unchanged in RETIRED.items():
        section, _, name = path.partition(".")
        found = values[section].pop(name, unchanged) if isinstance(values.get(section), dict) else unchanged
        if found != unchanged:
            raise InputError(f"{path}={found!r}: this option was taken out (docs/log.md): remove it")
    faults = Faults()
    for text in overrides:
        with faults.caught():
            schema.override(Config, values, text)
    if values.get("paper") is True:
        values["paper"] = False
        named = {text.partition("=")[0] for text in overrides}
        for path, value in PAPER.items():
            if path not in named:
                with faults.caught():
                    schema.override(Config, values, f"{path}={value}")
    faults.refuse()
    for path in _PATHS:
        section, _, name = path.rpartition(".")
        place = values.get(section) if section else values
        if isinstance(place, dict) and isinstance(place.get(name), str) and place[name].startswith("~"):
            place[name] = os.path.expanduser(place[name])
    return schema.fill(Config, values)


def flatten(config: Config) -> dict[str, Any]:
    """Every key's dotted path and value, with T_end resolved."""
    values: dict[str, Any] = {}
    for path, _, _ in schema.keys(Config):
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        values[path] = value
    return values | {"train.search_steps": config.train.t_end}


def without_effect(config: Config) -> list[str]:
    """Each "key=value" of the other method of search that has another value than its default."""
    values, defaults = flatten(config), {path: entry.default for path, entry, _ in schema.keys(Config)}
    unused = _LEARNED if config.search.method == "elastic" else _MEASURED
    searched = config.experts.pretrained is None
    return [f"{path}={values[path]}" for path in unused if searched and values[path] != defaults[path]]


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration; `load_config` reads it back to an equal object."""
    write_text(path, as_yaml(config))


def as_yaml(config: Config) -> str:
    """Every key and its value, resolved."""
    return yaml.safe_dump(schema.plain(dataclasses.asdict(config)), sort_keys=False)


def reference() -> str:
    """Every key with its type, default, range and meaning, as text for `--help`."""
    return schema.reference(Config)


def _find(source: str) -> Path:
    """A file; else one of CONFIGS, named with or without its folder and ending."""
    path = Path(source)
    for candidate in (path, CONFIGS / path.relative_to("configs") if path.parts[:1] == ("configs",) else CONFIGS / path,
                      CONFIGS / f"{source}.yaml"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
    if path.is_dir():
        file = path / "config.yaml"
        named = f"{file} in it" if file.is_file() else "a YAML file"
        raise InputError(f"--config {source}: is a folder: name {named}, or one of {known}")
    raise InputError(f"--config {source}: no such file: name one, or one of {known}")
