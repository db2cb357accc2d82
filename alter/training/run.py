"""One run, from its configuration to its summary: `train(load_config(...))`."""

import contextlib
import dataclasses
import json
import os
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
    set_seed,
)
from torch import Tensor
from tqdm import tqdm

from ..backbones.latency import Latency
from ..backbones.lora import FILE_NAME as ADAPTERS
from ..backbones.lora import merge_adapters, save_adapters
from ..backbones.sampling import sample_latents
from ..backbones.sites import PIPELINE_COMPONENT
from ..common.config import Config, flatten, load_config, save_config
from ..common.errors import InputError
from ..common.files import write_text
from ..data.batches import Tolerant, collate, split
from ..evaluation import accuracy, errors_by_timestep, frechet_distance, train_classifier
from ..evaluation.report.card import model_card
from ..evaluation.report.figures import plot_experts, plot_samples, summary_table
from ..evaluation.report.history import FILE_NAME as HISTORY
from ..experts.artefact import TemporalExperts
from .checkpoint import CONFIG, UNWRITTEN, checkpoints, export, find_run, set_aside, step_of
from .demo import Exam, exam, make_demo
from .sensitivity import FILE_NAME as SENSITIVITY
from .sensitivity import measure_sensitivity, start_near
from .setup.parts import Parts, build, check
from .setup.plan import by_time, plan_latency, set_tf32
from .trainer import Trainer
from .trainer_state import check_inputs, restore_state
from .trial import describe_memory, measure_memory

_MAY_CHANGE = ("name", "output_dir", "resume", "train.steps", "train.gradient_accumulation", "train.mixed_precision",
               "backbone.gradient_checkpointing", "backbone.pretrained", "backbone.channels_last", "backbone.compile",
               "teacher.", "data.path", "data.workers", "data.max_unreadable", "optim.backbone_lr",
               "optim.hypernetwork_lr", "optim.betas", "optim.weight_decay", "optim.lr_schedule", "optim.warmup_steps",
               "checkpoint.", "log.", "validate.", "evaluate.", "demo.")
LATENCY = "latency.json"
_SHOWN = 12  # images a row of samples.png


def train(config: Config) -> Path:
    """Train temporal experts and return the run directory, with final/, summary.json and pictures in it.

    Raises:
        InputError: for bad input, before anything is written.
        NonFiniteLoss, Interrupted: see `Trainer.run`.
    """
    started = time.perf_counter()
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise _only_data_parallel(name)
    accelerator = make_accelerator(config)
    if accelerator.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise _only_data_parallel(accelerator.distributed_type.value)
    config, run_dir, resume_from = _run_dir(config, accelerator)
    latency = Latency.load(run_dir / LATENCY) if resume_from and by_time(config) else None
    check(config, accelerator.num_processes, latency)
    set_seed(config.seed)
    if config.demo.model and accelerator.is_main_process:
        make_demo(config, accelerator.device)
    accelerator.wait_for_everyone()
    if latency is None and by_time(config):
        measured = plan_latency(config, accelerator.device) if accelerator.is_main_process else None
        latency = broadcast_object_list([measured])[0]
    parts = build(config, accelerator.num_processes, accelerator.device, latency)
    _open(config, accelerator, run_dir, resume_from)
    if parts.latency is not None and accelerator.is_main_process:
        parts.latency.save(run_dir / LATENCY)

    if config.experts.start == "greedy" and parts.experts is None and not resume_from and accelerator.is_main_process:
        table = measure_sensitivity(config, parts)
        table.save(run_dir / SENSITIVITY)
        start_near(table, parts.budget, parts.hypernetwork)  # the trainer tells the other processes
    trainer = Trainer(config, parts, accelerator, run_dir)
    if resume_from:
        check_inputs(trainer, resume_from)
    begun = step_of(resume_from) if resume_from else 0
    if begun < config.train.steps:
        peaks = measure_memory(trainer, searching=parts.experts is None and begun < config.train.t_end)
        if accelerator.is_main_process:
            print(describe_memory(trainer, peaks))
    if resume_from:
        restore_state(trainer, resume_from)
    experts = trainer.run()
    trainer.close()
    if accelerator.is_main_process:
        try:
            summary = _finish(config, parts, experts, accelerator.num_processes, trainer.counts, run_dir, started)
        except UNWRITTEN as error:
            raise InputError(f"{run_dir}: the results could not be written ({' '.join(str(error).split())[:200]}): "
                             "make room and set resume=latest; the training itself is done") from error
        print(summary_table(summary))
        print(f"run directory: {run_dir}")
    accelerator.wait_for_everyone()
    with contextlib.suppress(OSError):  # of a tracker whose disk is full
        accelerator.end_training()
    return run_dir


def _only_data_parallel(kind: str) -> InputError:
    return InputError(f"accelerate's {kind} is not supported, since two models are updated in turn, on layers that "
                      "differ from sample to sample: use plain data parallelism (configs/accelerate/), and save memory "
                      "with backbone.gradient_checkpointing, optim.optimizer=adamw_8bit, teacher.precision=bf16 or "
                      "lora.rank")


def make_accelerator(config: Config) -> Accelerator:
    set_tf32(config)
    tracker = config.log.tracker
    AcceleratorState._reset_state(reset_partial_state=True)  # a process may train several runs, of different precision
    return Accelerator(
        mixed_precision=config.train.mixed_precision, step_scheduler_with_optimizer=False,
        log_with=None if tracker == "none" else tracker,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=timedelta(hours=4)),  # while one process makes a demo, or measures
        ],
        project_config=ProjectConfiguration(logging_dir="."),  # the run directory, once it is known
    )


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


def _run_dir(config: Config, accelerator: Accelerator) -> tuple[Config, Path, Path | None]:
    """The configuration, the run directory, the same on every process, and the checkpoint to go on from."""
    if config.resume:
        run_dir, resume_from = _found_run(config, accelerator)
        return _resumed(config, run_dir, resume_from, accelerator.is_main_process), run_dir, resume_from
    if config.output_dir:
        run_dir = Path(config.output_dir)
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            resumable = run_dir.is_dir() and checkpoints(run_dir / "checkpoints")
            remedy = "set resume=latest" if resumable else "empty it: it holds no checkpoint to go on from"
            raise InputError(f"output_dir={config.output_dir!r} is not empty: choose another, or {remedy}")
        return _follow_links(config), run_dir, None
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")
    stamp = broadcast_object_list([stamp])[0]
    return _follow_links(config), Path("outputs") / config.name / stamp, None


def _found_run(config: Config, accelerator: Accelerator) -> tuple[Path, Path]:
    """`find_run`'s answer, or its InputError, on every process; one process reads the checkpoints to judge them."""
    found: Any = None
    if accelerator.is_main_process:
        try:
            found = find_run(str(config.resume), config.output_dir, config.name)
        except InputError as error:
            found = error
    found = broadcast_object_list([found])[0]
    if isinstance(found, InputError):
        raise found
    return found


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
    if refused:
        raise InputError(f"{', '.join(refused)}, with which the run began: keep that, or start a new run")
    if is_main_process:
        for line in taken:
            tqdm.write(line)
    return config


def _open(config: Config, accelerator: Accelerator, run_dir: Path, resume_from: Path | None) -> None:
    """Write the resolved configuration before the first step, and start the tracker."""
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / CONFIG)
        if resume_from is None and config.output_dir is None:
            _link(run_dir.parent / "latest", run_dir.name)
        if resume_from is not None:
            step = step_of(resume_from)
            for later in checkpoints(run_dir / "checkpoints"):
                if step_of(later) > step:  # passed over as damaged, or of a branch that is left
                    set_aside(later, "damaged" if config.resume == "latest" else "abandoned")
            for name in ("metrics.jsonl", "unreadable.jsonl", HISTORY):
                _forget_after(run_dir / name, step)
    accelerator.wait_for_everyone()
    accelerator.project_configuration.logging_dir = str(run_dir)
    accelerator.init_trackers(config.name if config.log.tracker == "wandb" else "tensorboard")


def _link(link: Path, target: str) -> None:
    fresh = link.with_name(f".latest-{os.getpid()}")
    fresh.symlink_to(target, target_is_directory=True)
    fresh.replace(link)


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


def _finish(config: Config, parts: Parts, experts: TemporalExperts, processes: int, counts: dict[str, int],
            run_dir: Path, started: float) -> dict[str, Any]:
    """Export final/, measure it, and write summary.json, samples.png and experts.png; returns the summary."""
    final, component = run_dir / "final", PIPELINE_COMPONENT[type(parts.backbone)]
    parts.simulator.remove()
    parts.backbone.eval()
    if config.lora.rank is not None:
        merge_adapters(parts.backbone)
    export(final, parts.folder, parts.backbone)
    experts.save_pretrained(final)
    if config.lora.rank is not None:
        save_adapters(parts.backbone, component, final)

    summary: dict[str, Any] = {
        "keep_ratio_target": experts.keep_ratio_target, "budget_over": experts.budget_over,
        "keep_ratio": experts.keep_ratio, "prunable_share": parts.cost.prunable_share,
        "macs_dense": experts.macs_total, "macs_experts": round(experts.macs_mean),
        "experts_count": len(experts.mask_EL), "experts_used": len(experts.used),
        "experts_unused": [e for e in range(len(experts.mask_EL)) if e not in experts.used], **counts,
    }
    if experts.latency is not None:
        summary |= {"time_ratio": experts.time_ratio, "time_measured_on": experts.latency.place}
    experts.apply(parts.backbone)
    micro_batch = config.train.batch_size // (config.train.gradient_accumulation * processes)
    summary |= _held_out_errors(config, parts, micro_batch)
    judge = exam(config, parts.source)
    if judge is not None:
        summary |= _sample_quality(config, parts, judge, run_dir)
    summary["seconds_total"] = time.perf_counter() - started
    write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    plot_experts(experts, run_dir / "experts.png")
    index = final / "model_index.json"
    pipeline = json.loads(index.read_text(encoding="utf-8"))["_class_name"] if index.is_file() else "DiffusionPipeline"
    card = model_card(config, experts, summary, pipeline, ADAPTERS if config.lora.rank else None)
    write_text(final / "README.md", card)
    return summary


def _held_out_errors(config: Config, parts: Parts, batch_size: int, most: int = 256) -> dict[str, Any]:
    """`errors_by_timestep` on at most `most` held-out samples, and their means; None without any, or a dense model."""
    _, held_out = split(parts.source, config.data.holdout, config.seed)
    if parts.teacher is None or not len(held_out):
        return {"output_error": None, "denoise_error": None}
    held_out, errors = held_out[:most], []
    source = Tolerant(parts.source, held_out, config.seed, parts.fit)
    for first in range(0, len(held_out), batch_size):
        batch = collate([source[0, int(i)] for i in held_out[first : first + batch_size]])
        count = min(batch_size, len(held_out) - first)
        batch = {name: value.to(parts.backbone.device) if isinstance(value, Tensor) else value
                 for name, value in batch.items()}
        latents = parts.latents(batch, torch.zeros(count, *parts.latent_shape))
        conditioning = parts.conditioning(batch, torch.zeros(count, dtype=torch.bool))
        errors.append(count / len(held_out) * errors_by_timestep(
            parts.backbone, parts.teacher, parts.scheduler, latents, conditioning, config.seed + first))
    parts.release_teacher()
    output, denoise = np.sum(errors, axis=0).tolist()
    return {"output_error": fmean(output), "denoise_error": fmean(denoise),
            "output_error_by_timestep": output, "denoise_error_by_timestep": denoise}


def _sample_quality(config: Config, parts: Parts, judge: Exam, run_dir: Path) -> dict[str, Any]:
    """Fréchet distances and accuracies, dense and experts, from the same seeds and conditions."""
    evaluate, device = config.evaluate, parts.backbone.device
    classifier = train_classifier(judge.images, judge.targets, 0)  # one judge for runs of all seeds
    reference = classifier.features(judge.images).numpy()
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in judge.batch.items()}
    everything = torch.ones(len(judge.asked), dtype=torch.bool)
    given, nothing = parts.conditioning(batch, ~everything), parts.conditioning(batch, everything)
    steps = evaluate.sampling_steps
    summary: dict[str, Any] = {
        "sampling_steps": steps, "guidance_scale": evaluate.guidance_scale, "samples": evaluate.samples,
    }
    pictures = {}
    for name, model, count in (("dense", parts.teacher, steps), ("experts", parts.backbone, steps),
                               ("dense_50", parts.teacher, 50)):
        if model is None or not evaluate.dense and model is parts.teacher:
            continue
        images = parts.images(sample_latents(model, parts.scheduler, parts.latent_shape, given, nothing, count,
                                             config.seed, evaluate.guidance_scale))
        features = classifier.features(images).numpy()
        summary[f"fd_{name}"] = frechet_distance(features, reference)
        summary[f"fd_halves_{name}"] = [frechet_distance(half, reference) for half in np.array_split(features, 2)]
        summary[f"accuracy_{name}"] = accuracy(classifier, images, judge.asked)
        pictures[f"{name.removesuffix('_50')}, {count} steps"] = images[:_SHOWN]
    parts.release_teacher()
    plot_samples(pictures, judge.titles[:_SHOWN], run_dir / "samples.png")
    return summary
