"""One run, from its configuration to its summary: `train(load_config(...))`."""

import contextlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
    set_seed,
)
from tqdm import tqdm

from ..backbones.latency import Latency
from ..backbones.pretrained import set_tf32
from ..common.config import Config
from ..common.errors import InputError
from ..common.files import release, write_text
from ..common.load import without_effect
from ..common.process import MEETING, on_main_process
from ..evaluation.report.figures import summary_table
from ..experts.artefact import TemporalExperts
from .checkpoint import UNWRITTEN, step_of
from .demo import make_demo
from .probe import check_blocks
from .resume import find_run_dir, open_run_dir
from .search.elastic import remeasure
from .setup.parts import build
from .setup.plan import by_time, check, plan_latency
from .state import check_inputs, restore_state
from .summary import finish
from .trainer import Trainer
from .trial import describe_memory, measure_memory

LATENCY = "latency.json"
CLASSES = "classes.json"  # name → label, where the data name their classes


@dataclass(frozen=True)
class FinishedRun:
    """run_dir: holds final/, summary.json and pictures. summary: what summary.json holds."""

    run_dir: Path
    experts: TemporalExperts
    summary: dict[str, Any]


def train(config: Config) -> FinishedRun:
    """Train temporal experts, from a configuration to a run directory.

    Raises:
        InputError: for bad input, before anything is written.
        NonFiniteLoss, Interrupted: see `Trainer.run`.
    """
    try:
        return _train(config)
    finally:
        release()


def _train(config: Config) -> FinishedRun:
    started = time.perf_counter()
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise _only_data_parallel(name)
    accelerator = make_accelerator(config)
    if accelerator.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise _only_data_parallel(accelerator.distributed_type.value)
    config, run_dir, resume_from = find_run_dir(config, accelerator)
    latency = Latency.load(run_dir / LATENCY) if resume_from and by_time(config) else None
    check(config, accelerator.num_processes, latency)
    set_seed(config.seed)
    if config.demo.model:
        on_main_process(lambda: make_demo(config, accelerator.device))
    if latency is None and by_time(config):
        latency = on_main_process(lambda: plan_latency(config, accelerator.device))
    if accelerator.is_main_process:
        tqdm.write("loading models and data")
    parts = build(config, accelerator.num_processes, accelerator.device, latency)
    check_blocks(config, parts)
    if resume_from:
        check_inputs(parts, resume_from)
    open_run_dir(config, accelerator, run_dir, resume_from)
    if parts.source.classes and accelerator.is_main_process:
        write_text(run_dir / CLASSES, json.dumps(parts.source.classes, indent=1) + "\n")
    if parts.latency is not None and accelerator.is_main_process:
        parts.latency.save(run_dir / LATENCY)

    trainer = Trainer(config, parts, accelerator, run_dir)
    if trainer.search and not resume_from:
        tell_unused(config)
        trainer.search.begin()
    begun = step_of(resume_from) if resume_from else 0
    if begun < config.train.steps:
        peaks = measure_memory(trainer, searching=parts.experts is None and begun < config.train.t_end)
        if accelerator.is_main_process:
            print(describe_memory(trainer, peaks))
    if resume_from:
        restore_state(trainer, resume_from)
    experts = trainer.run()
    trainer.close()
    if experts.measured is not None:
        experts = remeasure(config, parts, experts)
    summary: dict[str, Any] = {}
    if accelerator.is_main_process:
        try:
            summary = finish(config, parts, experts, accelerator.num_processes, trainer.readout.counts, run_dir,
                             started)
        except UNWRITTEN as error:
            raise InputError(f"{run_dir}: the results could not be written ({' '.join(str(error).split())[:200]}): "
                             "make room and set resume=latest; the training itself is done") from error
        print(summary_table(summary))
        print(f"run directory: {run_dir}")
    (summary,) = broadcast_object_list([summary])
    with contextlib.suppress(OSError):  # of a tracker whose disk is full
        accelerator.end_training()
    return FinishedRun(run_dir, experts, summary)


def _only_data_parallel(kind: str) -> InputError:
    return InputError(f"accelerate's {kind} is not supported, since two models are updated in turn, on layers that "
                      "differ from sample to sample: use plain data parallelism (configs/accelerate/), and save memory "
                      "with backbone.gradient_checkpointing, optim.optimizer=adamw_8bit, teacher.precision=bf16 or "
                      "lora.rank")


def tell_unused(config: Config) -> None:
    """Name the keys of the other method of search that are set, on the main process."""
    if (unused := without_effect(config)) and PartialState().is_main_process:
        tqdm.write(f"warning: {', '.join(unused)}: no effect with search.method={config.search.method}", sys.stderr)


def make_accelerator(config: Config) -> Accelerator:
    set_tf32(config.train.tf32)
    tracker = config.log.tracker
    AcceleratorState._reset_state(reset_partial_state=True)  # a process may train several runs, of different precision
    return Accelerator(
        mixed_precision=config.train.mixed_precision, step_scheduler_with_optimizer=False,
        log_with=None if tracker == "none" else tracker,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=MEETING),  # while one makes a demo, or measures layers
        ],
        project_config=ProjectConfiguration(logging_dir="."),  # the run directory, once it is known
    )


