"""What both updates of an iteration are made on."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Batch:
    """One micro-batch, and the teacher's answer to it. `timesteps` and `rows` (of experts) stay on the CPU."""

    noisy_latents: Tensor
    timesteps: Tensor
    rows: Tensor
    conditioning: dict[str, Any]
    target: Tensor
    teacher_pred: Tensor | None
    teacher_features: list[Tensor]
