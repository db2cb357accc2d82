"""A trial of both phases before a run begins: does it fit into memory?"""

import os
from typing import Any

import torch
from torch import Tensor

from .checkpoint import trained_parameters
from .errors import InputError
from .memory import forget_peak, peak_memory
from .trainer import Trainer

_STATEFUL = ("backbone_optim", "backbone_lr", "hyper_optim", "hyper_lr", "scaler")


def measure_memory(trainer: Trainer) -> dict[str, int]:
    """Bytes at the peak of one iteration of the search (if there is one) and of the tuning, on this process's device.

    Real iterations on the run's own data, after which weights, optimizers and counters are what they were before.

    Raises:
        InputError: if the device has not enough memory.
    """
    on_gpu = trainer.accelerator.device.type == "cuda"
    before = _remember(trainer)
    peaks = {}
    try:
        for phase in ("search", "tuning"):
            if phase == "search" and trainer.experts is not None:
                continue
            forget_peak()
            _iterate(trainer, phase)
            peaks[phase] = peak_memory()[on_gpu]
    except (torch.OutOfMemoryError, MemoryError):
        name, total = _device(trainer)
        micro = trainer.config.train.batch_size // (
            trainer.config.train.gradient_accumulation * trainer.accelerator.num_processes)
        raise InputError(f"train.batch_size={trainer.config.train.batch_size}: {micro} samples at once do not fit into "
                         f"the {_gib(total)} of {name}: set backbone.gradient_checkpointing=true, a larger "
                         "train.gradient_accumulation, or train.mixed_precision=bf16") from None
    finally:
        _restore(trainer, before)
    return peaks


def describe_memory(trainer: Trainer, peaks: dict[str, int]) -> str:
    """The measured peaks in one line."""
    name, total = _device(trainer)
    return (f"memory of one iteration, measured: {', '.join(f'{phase} {_gib(peak)}' for phase, peak in peaks.items())} "
            f"of {_gib(total)} ({name})")


def _iterate(trainer: Trainer, phase: str) -> None:
    """The updates of one iteration on the first batch, without counting its unusable samples."""
    batches = trainer._prepare({**raw, "skipped": []} for raw in trainer.micro_batches(steps=1))
    masks = trainer.current_masks()
    if phase == "search":
        trainer.update_hypernetwork(batches)
    elif trainer.experts is None:
        budget = trainer.parts.budget
        with torch.no_grad():
            masks = trainer._agreed(budget.masks(trainer.parts.hypernetwork(), trainer.config.budget.keep_ratio))
    if phase == "tuning" or trainer.config.train.schedule == "joint":
        trainer.update_backbone(batches, *masks)


def _remember(trainer: Trainer) -> dict[str, Any]:
    """In main memory, what an iteration changes."""
    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to("cpu", copy=True)
        if isinstance(value, dict):
            return {key: copied(part) for key, part in value.items()}
        return [copied(part) for part in value] if isinstance(value, list) else value

    return copied({
        "backbone": dict(trained_parameters(trainer.backbone)), "hypernetwork": trainer.parts.hypernetwork.state_dict(),
        "ema": trainer.ema.shadow_params if trainer.ema else [],
        "ema_step": trainer.ema.optimization_step if trainer.ema else 0,
        "own": trainer._own, "counts": trainer.counts,
        **{name: getattr(trainer, name).state_dict() for name in _STATEFUL},
    })


@torch.no_grad()
def _restore(trainer: Trainer, before: dict[str, Any]) -> None:
    for name, parameter in trained_parameters(trainer.backbone).items():
        parameter.copy_(before["backbone"][name])
        parameter.grad = None
    trainer.parts.hypernetwork.load_state_dict(before["hypernetwork"])
    if trainer.ema:
        for shadow, value in zip(trainer.ema.shadow_params, before["ema"], strict=True):
            shadow.copy_(value)
        trainer.ema.optimization_step = before["ema_step"]
    for name in _STATEFUL:
        if before[name]:  # a disabled scaler has no state
            getattr(trainer, name).load_state_dict(before[name])
    trainer._own, trainer.counts, trainer._skipped_updates = before["own"], before["counts"], 0


def _device(trainer: Trainer) -> tuple[str, int]:
    device = trainer.accelerator.device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory
    return "main memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gib(amount: int) -> str:
    return f"{amount / 2**30:.1f} GiB"
