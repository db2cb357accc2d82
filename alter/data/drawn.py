"""What a model draws itself, in place of data."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import SourceDefaults


class Drawn(SourceDefaults):
    """Prompts (or classes), and the latents that a model draws of them.

    Attributes:
        latents: float32 [N, ...], as the scheduler steps them; None until they are drawn.
    """

    latents: Tensor | None = None

    def __init__(self, conditions: Sequence[str] | Sequence[int]) -> None:
        self.conditions = conditions
        labels = [condition for condition in conditions if isinstance(condition, int)]
        self.num_classes = 1 + max(labels) if labels else 0
        self.encoded = bool(labels)  # prompts are still to be encoded

    def __len__(self) -> int:
        return len(self.conditions)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        latents = {} if self.latents is None else {"latents": self.latents[key[1]]}
        return {**latents, "labels" if self.encoded else "captions": self.conditions[key[1]]}

    def describe(self, index: int) -> str:
        return f"image {index}, {self.conditions[index]!r}"
