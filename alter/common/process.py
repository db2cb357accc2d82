"""The processes of a launch."""

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def this_process() -> PartialState:
    """This process among those of `accelerate launch` or torchrun; without an accelerator they use the CPU, where
    accelerate by itself would take each for the only one."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available(),
                        timeout=timedelta(hours=12))  # processes meet only when all work is done
