"""What every specimen is made of: its configuration and random inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Specimen:
    """A model class of diffusers, tiny.

    config: of its constructor. inputs: (model, batch, generator) -> the arguments of one forward.
    lists: its lists of blocks that can be pruned. cls: its class's name, where the specimen has another.
    whole: whether a sample gives the same alone as in its batch. double: whether it computes in float64.
    backward: whether a CPU has its gradients.
    slow: it takes more than 0.3 s, or is much like another.
    """

    config: dict[str, Any]
    inputs: Callable[[Any, int, torch.Generator], dict[str, Any]]
    lists: tuple[str, ...] = ("transformer_blocks",)
    cls: str = ""
    whole: bool = True
    double: bool = True
    backward: bool = True
    slow: bool = False


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def times(generator: torch.Generator, batch: int) -> Tensor:
    """Training timesteps [B], of 1 to 998."""
    return torch.randint(1, 999, (batch,), generator=generator).float()


def sigmas(generator: torch.Generator, batch: int) -> Tensor:
    """[B], of 0 to 1."""
    return times(generator, batch) / 1000


def ids(height: int, width: int, columns: int = 3, first: int = 0) -> Tensor:
    """Positions [height * width, columns] of image tokens: the last two columns are row and column."""
    grid = torch.zeros(height, width, columns)
    grid[..., -2] = torch.arange(height)[:, None] + first
    grid[..., -1] = torch.arange(width)[None] + first
    return grid.flatten(0, 1)


def mask(batch: int, length: int) -> Tensor:
    """int64 [B, length]: the first sample is whole, each further one a token shorter, but no shorter than 2."""
    return (torch.arange(length) < (length - torch.arange(batch)).clamp(min=2)[:, None]).long()
