"""scikit-learn's digits, which need no download."""

from typing import Any

import torch

from .base import SourceDefaults


class Digits(SourceDefaults):
    """1797 grey digits in ten classes, used as latents: float32 [1, 8, 8] in [-1, 1]."""

    num_classes: int | None = 10
    encoded = True

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
        self.labels = torch.from_numpy(digits.target).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return {"latents": self.images[key[1]], "labels": int(self.labels[key[1]])}

    def describe(self, index: int) -> str:
        return f"digit {index}"
