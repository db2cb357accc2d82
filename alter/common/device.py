"""Getting numbers of the host to a device."""

import torch
from torch import Tensor


def reads_pinned(device: torch.device | str) -> bool:
    """Whether the device copies from pinned memory while the host goes on: one with memory of its own."""
    return torch.device(device).type not in ("cpu", "mps")


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """`values`, a tensor in main memory, on `device`, without waiting: a plain `to` waits for all work of a GPU."""
    return values.pin_memory().to(device, non_blocking=True) if reads_pinned(device) else values.to(device)
