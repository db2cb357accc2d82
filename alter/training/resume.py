"""Where a run writes, where a resumed one goes on, and what it may change."""

import dataclasses
import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from ..common.config import Config
from ..common.errors import InputError
from ..common.files import LOCK, check_writable, claim, write_text
from ..common.load import as_yaml, flatten, load_config, save_config
from ..common.process import on_main_process
from ..evaluation.report.records import HISTORY
from .checkpoint import CONFIG, checkpoints, damage, set_aside, step_of

_MAY_CHANGE = ("name", "output_dir", "resume", "train.steps", "train.gradient_accumulation", "train.mixed_precision",
               "backbone.gradient_checkpointing", "backbone.pretrained", "backbone.channels_last", "backbone.compile",
               "lora.merge", "teacher.", "search.features", "data.path", "data.workers", "data.max_unreadable",
               "optim.backbone_lr", "optim.hypernetwork_lr", "optim.betas", "optim.weight_decay", "optim.lr_schedule",
               "optim.warmup_steps", "checkpoint.", "log.", "validate.", "evaluate.", "demo.")


def _folders(config: Config) -> dict[str, str | None]:
    return {section: getattr(config, section).pretrained for section in ("backbone", "teacher", "experts")}


def _with_folders(config: Config, folders: dict[str, str | None]) -> Config:
    return dataclasses.replace(config, **{
        section: dataclasses.replace(getattr(config, section), pretrained=value) for section, value in folders.items()
    })


def _follow_links(config: Config) -> Config:
    """Name what outputs/<name>/latest means now: this run may move that link."""
    def follow(value: str | None) -> str | None:
        if value is None or not _through_link(value):
            return value
        return os.path.realpath(value) if os.path.isabs(value) else os.path.relpath(
            os.path.realpath(value), os.path.realpath("."))

    return _with_folders(config, {section: follow(value) for section, value in _folders(config).items()})


def _through_link(folder: str) -> bool:
    return os.path.realpath(folder) != os.path.normpath(os.path.join(os.path.realpath("."), folder))


def find_run_dir(config: Config, accelerator: Accelerator) -> tuple[Config, Path, Path | None]:
    """The configuration, the run directory, the same on every process, and the checkpoint to go on from."""
    if config.resume:
        run_dir, resume_from = on_main_process(
            lambda: find_run(str(config.resume), config.output_dir, config.name))
        return _resumed(config, run_dir, resume_from, accelerator.is_main_process), run_dir, resume_from
    config = _follow_links(config)
    return config, on_main_process(lambda: _new_run_dir(config)), None


def _new_run_dir(config: Config) -> Path:
    """Where a run that is not resumed writes; nothing is made there yet."""
    if config.output_dir is None:
        stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")
        run_dir = Path("outputs") / config.name / stamp
        check_writable(run_dir, "name", folder=True)
        return run_dir
    run_dir = Path(config.output_dir)
    check_writable(run_dir, "output_dir", folder=True)
    if _refuse_used(config, run_dir):
        tqdm.write(f"{run_dir}: this run was stopped before its first checkpoint: it begins anew")
    return run_dir


def _refuse_used(config: Config, run_dir: Path) -> bool:
    """Refuse a folder with anything in it but this very run, stopped early; whether it is one of those."""
    if run_dir.exists() and (not run_dir.is_dir() or any(path.name != LOCK for path in run_dir.iterdir())):
        if _stopped_early(config, run_dir):
            return True
        resumable = run_dir.is_dir() and checkpoints(run_dir / "checkpoints")
        remedy = "set resume=latest" if resumable else "empty it: it holds no checkpoint to go on from"
        raise InputError(f"output_dir={config.output_dir!r} is not empty: choose another, or {remedy}")
    return False


def _stopped_early(config: Config, run_dir: Path) -> bool:
    """Whether a folder is that of this very run, stopped when there was nothing to keep yet."""
    file = run_dir / CONFIG
    if not file.is_file() or checkpoints(run_dir / "checkpoints") or (run_dir / "final").exists():
        return False
    try:
        recorded = load_config(file)
    except InputError:
        return False
    written_by_a_run = as_yaml(recorded) == file.read_text(encoding="utf-8")
    return written_by_a_run and not _changes(recorded, config)[0]


def _resumed(config: Config, run_dir: Path, resume_from: Path, is_main_process: bool) -> Config:
    """The configuration, with the folders that links meant when the run began; what changes harmlessly is printed.

    Raises:
        InputError: if it would change the model, the masks or the data.
    """
    if config.output_dir and Path(config.output_dir).resolve() != run_dir.resolve():
        raise InputError(f"output_dir={config.output_dir!r} is not the run of resume={config.resume!r}: unset it")
    recorded = load_config(resume_from / CONFIG)
    began = _folders(recorded)
    config = _with_folders(config, {
        section: began[section] if value and began[section] and _through_link(value) else value
        for section, value in _folders(config).items()
    })
    refused, taken = _changes(recorded, config)
    if refused:
        raise InputError(f"{', '.join(refused)}, with which the run began: keep that, or start a new run")
    if is_main_process:
        for line in taken:
            tqdm.write(line)
    return config


def _changes(recorded: Config, config: Config) -> tuple[list[str], list[str]]:
    """How a configuration differs from that with which a run began: what makes it another run, and what does not."""
    before, now = flatten(recorded), flatten(config)
    refused, taken = [], []
    for name, value in now.items():
        moved = name == "experts.pretrained" and value and before[name]  # the checkpoint has them
        if value == before[name] or name in ("output_dir", "resume"):
            continue
        if name.startswith(_MAY_CHANGE) or moved:
            taken.append(f"{name}: {before[name]!r} → {value!r}")
        else:
            refused.append(f"{name}={value!r} differs from {before[name]!r}")
    return refused, taken


def _claim(config: Config, run_dir: Path, resume_from: Path | None) -> None:
    """For this run, unless another has begun there while models and data were loaded."""
    run_dir.mkdir(parents=True, exist_ok=True)
    claim(run_dir, "output_dir" if config.output_dir else "resume")
    if resume_from is None and config.output_dir is not None:
        _refuse_used(config, run_dir)


def open_run_dir(config: Config, accelerator: Accelerator, run_dir: Path, resume_from: Path | None) -> None:
    """Write the resolved configuration before the first step, and start the tracker."""
    on_main_process(lambda: _claim(config, run_dir, resume_from))
    if accelerator.is_main_process:
        save_config(config, run_dir / CONFIG)
        print(f"run directory: {run_dir}", flush=True)
        step = step_of(resume_from) if resume_from else 0
        for later in checkpoints(run_dir / "checkpoints"):
            if step_of(later) > step:  # passed over as damaged, or of a branch that is left
                set_aside(later, "damaged" if config.resume == "latest" else "abandoned")
        for name in ("metrics.jsonl", "unreadable.jsonl", HISTORY):
            _forget_after(run_dir / name, step)
    accelerator.wait_for_everyone()
    accelerator.project_configuration.logging_dir = str(run_dir)
    accelerator.init_trackers(config.name if config.log.tracker == "wandb" else "tensorboard")


def link_latest(config: Config, run_dir: Path) -> None:
    """Let outputs/<name>/latest mean this run, of which there is a checkpoint now; nothing where a folder was named."""
    if config.output_dir is None and config.resume is None:
        fresh = run_dir.with_name(f".latest-{os.getpid()}")
        fresh.unlink(missing_ok=True)  # left by a process that was killed
        fresh.symlink_to(run_dir.name, target_is_directory=True)
        fresh.replace(run_dir.with_name("latest"))


def _forget_after(file: Path, step: int) -> None:
    """Drop the lines of steps that will be run again, and what a killed process left of a line."""
    def kept(line: str) -> bool:
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, TypeError):
            return False

    if file.is_file():
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        write_text(file, "".join(f"{line}\n" for line in lines if kept(line)))


def find_run(resume: str, output_dir: str | None, name: str) -> tuple[Path, Path]:
    """The run directory and the checkpoint that `resume` means: with latest, the newest that is not damaged.

    Changes nothing; damaged checkpoints that are passed over are named on the terminal.

    Raises:
        InputError: if there is none, or the one that is named is damaged.
    """
    if resume != "latest":
        checkpoint = Path(resume)
        if checkpoint not in checkpoints(checkpoint.parent):
            raise InputError(f"resume={resume!r}: not a checkpoint: use latest, or a folder step-NNNNNN")
        if reason := damage(checkpoint):
            raise InputError(f"resume={resume!r} is damaged ({reason}): use latest, or name another checkpoint")
        return checkpoint.parent.parent, checkpoint
    run = Path(output_dir) if output_dir else Path("outputs") / name / "latest"
    found = checkpoints(run.resolve() / "checkpoints")  # another run of this name may move the link meanwhile
    if not found:
        raise InputError(f"resume=latest: no checkpoint in {run / 'checkpoints'}: set output_dir to the run, or leave "
                         "resume unset and start anew in an empty output_dir")
    damaged: list[str] = []
    for checkpoint in reversed(found):
        reason = damage(checkpoint)
        if reason is None:
            for line in damaged:
                tqdm.write(f"warning: {line}: set aside, and {checkpoint.name} is used", file=sys.stderr)
            return run.resolve(), checkpoint
        damaged.append(f"{checkpoint} is damaged ({reason})")
    raise InputError(f"resume=latest: {', '.join(damaged)}: no other is left; start anew in an empty output_dir")
