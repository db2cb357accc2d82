"""A trial of both phases, and of validation images, before a run begins: does it fit into memory?"""

import os
from typing import Any

import numpy as np
import torch

from ..common.errors import InputError
from ..common.process import forget_peak, peak_memory
from .trainer import Trainer
from .validation import Validator


def measure_memory(trainer: Trainer, searching: bool) -> dict[str, int]:
    """Bytes at the peak of one iteration of the search (if `searching`), of one of the tuning, and of drawing the
    validation images (where this process does), on its device.

    Real iterations on the run's own data, by optimizers that have their state already, at a learning rate of zero: no
    weight changes. `trainer` must be fresh, before `restore_state`; afterwards it is fresh again.

    Raises:
        InputError: if the device has not enough memory.
    """
    on_gpu = trainer.accelerator.device.type == "cuda"
    updates = [update for update, _ in trainer.updates.values()]
    optimizers = [update.optimizer for update in updates]
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    states = [(update.schedule.state_dict(), update.scaler.state_dict()) for update in updates]
    counts, ema, trainer.ema = dict(trainer.readout.counts), trainer.ema, None
    peaks, phase = {}, "tuning"
    try:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            _stand_still(optimizers)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for phase in ("search", "tuning") if searching else ("tuning",):
            forget_peak()
            masks = _iterate(trainer, phase, optimizers)
            peaks[phase] = peak_memory()[on_gpu]
        if trainer.validator:
            phase, trainer.ema = "validation images", ema
            forget_peak()
            _draw(trainer, trainer.validator, masks)
            peaks[phase] = peak_memory()[on_gpu]
    except (MemoryError, RuntimeError) as error:
        on_cpu = type(error) is RuntimeError and "memory" in str(error)  # as torch says it there
        if not on_cpu and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        name, total = _device(trainer)
        if phase not in ("search", "tuning"):
            raise InputError(f"validate.every={trainer.config.validate.every}: validation images do not fit into the "
                             f"{_gib(total)} of {name} beside the training: set validate.every=null, or give fewer "
                             "prompts or labels") from None
        micro = trainer.config.train.micro_batch(trainer.accelerator.num_processes)
        raise InputError(f"train.batch_size={trainer.config.train.batch_size}: {micro} samples at once do not fit into "
                         f"the {_gib(total)} of {name}: set backbone.gradient_checkpointing=true, a larger "
                         "train.gradient_accumulation, or train.mixed_precision=bf16") from None
    for optimizer, before in zip(optimizers, rates, strict=True):
        optimizer.state.clear()
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate
    for update, (schedule, scaler) in zip(updates, states, strict=True):
        update.schedule.load_state_dict(schedule)
        if scaler:  # a disabled one has no state
            update.scaler.load_state_dict(scaler)
        update.skipped = 0
    trainer.ema = ema
    trainer.readout.restore(counts)
    return peaks


def describe_memory(trainer: Trainer, peaks: dict[str, int]) -> str:
    """The measured peaks in one line."""
    name, total = _device(trainer)
    measured = ", ".join(f"{phase} {_gib(peak)}" for phase, peak in peaks.items())
    return f"memory of one iteration, measured: {measured} of the {_gib(total)} of {name}: fits"


def _iterate(trainer: Trainer, phase: str, optimizers: list) -> tuple[np.ndarray, np.ndarray]:
    """The updates of one iteration on the first batch, without counting its unusable samples; returns its masks."""
    batches = trainer._prepare({**raw, "skipped": []} for raw in trainer.micro_batches(steps=1))
    masks = trainer.masks()
    _stand_still(optimizers)
    if trainer.search and phase == "search":
        trainer.search.update(batches)
    elif trainer.search:
        masks = trainer.search.tried()
    elif trainer.experts:
        dearest = max(rung.keep_ratio_target for rung in trainer.experts.ladder if rung.tuned)
        masks = trainer.experts.mask_EL, trainer.experts.pick(dearest).expert_T
    if phase == "tuning" or trainer.config.train.schedule == "joint":
        trainer.update_backbone(batches, *masks)
    trainer.readout.read()
    return masks


def _draw(trainer: Trainer, validator: Validator, masks: tuple[np.ndarray, np.ndarray]) -> None:
    """Images of the dense model and of the weights to be exported, in two steps and not to disk."""
    def draw(backbone: Any, step: int, title: str) -> None:
        validator.images(backbone, steps=2)

    trainer._masks = masks
    trainer._validate_start(draw)
    trainer._validate(draw)
    trainer._masks = None


def _stand_still(optimizers: list) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0


def _device(trainer: Trainer) -> tuple[str, int]:
    device = trainer.accelerator.device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory
    return "main memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gib(amount: int) -> str:
    return f"{amount / 2**30:.1f} GiB"
