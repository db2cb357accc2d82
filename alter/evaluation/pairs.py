"""How far images are from those of the dense model: pairs of one seed and prompt, tensors in, numbers out.

Images are float [N, C, H, W] in [-1, 1]; pair i is made of row i of both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 1000  # of the bootstrap over pairs
SMALLEST = 6  # sides in pixels from which SSIM's window fits


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs: its value, its standard error, and an interval that holds it in 95 of 100 cases."""

    value: float
    error: float
    low: float
    high: float


def psnr(images: Tensor, dense: Tensor) -> Tensor:
    """Peak signal-to-noise ratios in dB, float64 [N]: 10·log10(2² / mean squared difference); inf of equal images."""
    return 10 * torch.log10(4 / (images.double() - dense.double()).square().flatten(1).mean(1))


def ssim(images: Tensor, dense: Tensor) -> Tensor:
    """Structural similarities, float64 [N], at most 1: that of equal images (torchmetrics; Gaussian of 1.5 pixels).

    Raises:
        ValueError: for images of a side under 6 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(images.shape[-2:]) < SMALLEST:
        raise ValueError(f"SSIM: images of {tuple(images.shape[-2:])} pixels: give sides of at least {SMALLEST}")
    found = structural_similarity_index_measure(images.double(), dense.double(), data_range=(-1.0, 1.0),
                                                reduction="none")
    assert isinstance(found, Tensor)
    return found.reshape(len(images))


def drifts(features: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """What each pair adds to `drift`: its squared distance, and its share of those between dense samples; float64 [N].

    The mean of the second is the mean squared distance of all pairs of two different dense samples.
    """
    features, dense = features.double().flatten(1), dense.double().flatten(1)
    if features.shape != dense.shape or len(dense) < 2:
        raise ValueError(f"drift: features of shapes {tuple(features.shape)} and {tuple(dense.shape)}: give the same "
                         "number of both, at least 2")
    count = len(dense)
    spread = 2 * count / (count - 1) * (dense - dense.mean(0)).square().sum(1)
    if not spread.any():
        raise ValueError("drift: all dense samples are equal: give samples of several seeds")
    return (features - dense).square().sum(1), spread


def drift(features: Tensor, dense: Tensor) -> Estimate:
    """How far samples moved: mean |a_i − b_i|² / mean over i ≠ j of |b_i − b_j|².

    0: the same samples; 1: as far as from a dense sample of another seed. It can be compared between models.

    Args:
        features: [N, ...] of anything with distances that mean something: features, latents, pixels. dense: the same of
            the dense model's samples of the same seeds and prompts.

    Raises:
        ValueError: for other shapes, fewer than 2 samples, or dense samples that are all equal.
    """
    return ratio(*drifts(features, dense))


def ratio(above: Tensor, below: Tensor, seed: int = 0) -> Estimate:
    """The mean of `above` [N] divided by that of `below` [N], over pairs."""
    above, below = above.double().cpu(), below.double().cpu()
    source = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(above), (len(above),), generator=source) for _ in range(RESAMPLES))
    found = torch.stack([above[rows].sum() / below[rows].sum() for rows in draws])
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(above.mean() / below.mean()), float(found.std()), low, high)


def mean(values: Tensor) -> Estimate:
    """The mean of `values` [N] over pairs."""
    return ratio(values, torch.ones_like(values))
