"""What this machine, with so many processes, can do of a configuration."""

import importlib.util

import torch
from accelerate.utils import parse_flag_from_env

from ...common.config import Config
from ...common.errors import Faults, InputError


def check_shares(config: Config, processes: int) -> None:
    """Refuse a batch that so many processes cannot share.

    Raises:
        InputError: naming the keys.
    """
    train, parts = config.train, processes * config.train.gradient_accumulation
    if train.batch_size % parts:
        raise InputError(f"train.batch_size={train.batch_size} cannot be shared by {processes} processes with "
                         f"train.gradient_accumulation={train.gradient_accumulation}: choose a multiple of {parts}")


def check_machine(config: Config, processes: int) -> None:
    """Refuse what this machine, with so many processes, cannot do.

    Raises:
        InputError: naming the keys.
    """
    faults = Faults()
    with faults.caught():
        check_shares(config, processes)
    optional = [
        ("wandb", f"log.tracker={config.log.tracker}", config.log.tracker == "wandb"),
        ("bitsandbytes", f"optim.optimizer={config.optim.optimizer}", config.optim.optimizer == "adamw_8bit"),
        ("torchao", "backbone.quantize=int8", config.backbone.quantize == "int8"),
        ("bitsandbytes", "backbone.quantize=nf4", config.backbone.quantize == "nf4"),
        ("peft", f"lora.rank={config.lora.rank}", config.lora.rank is not None),
    ]
    for package, option, wanted in optional:
        if wanted and importlib.util.find_spec(package) is None:
            faults.lines.append(f"{option}: the package {package} is not installed: pip install {package}, or "
                                "change it")
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if config.train.mixed_precision == "fp16" and on_cpu:  # where accelerate would switch it off without a word
        faults.lines.append("train.mixed_precision='fp16' needs a GPU: use no or bf16 on a CPU")
    if config.backbone.quantize == "nf4" and on_cpu:
        faults.lines.append("backbone.quantize='nf4' needs a GPU: use int8 on a CPU")
    faults.refuse()
