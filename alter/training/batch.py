"""What both updates of an iteration are made on."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..backbones.draws import Draw


@dataclass
class Batch:
    """One micro-batch, and the teacher's answer to it. What was drawn for it stays on the CPU."""

    noisy_latents: Tensor
    drawn: Draw
    conditioning: dict[str, Any]
    target: Tensor
    teacher_pred: Tensor | None
    teacher_features: list[Tensor]

    @property
    def timesteps(self) -> Tensor:
        """What the backbone is told, [B]."""
        return self.drawn.timesteps

    @property
    def rows(self) -> Tensor:
        """The training timesteps by which experts are chosen, int64 [B]."""
        return self.drawn.rows
