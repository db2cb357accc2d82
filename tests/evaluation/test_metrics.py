import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid

from alter.evaluation import frechet_distance


def exactly(mean, variance, n=4000, seed=0):
    """Samples whose empirical mean and covariance are exactly `mean` and diag(`variance`)."""
    sample = np.random.default_rng(seed).standard_normal((n, len(mean)))
    sample -= sample.mean(0)
    sample = sample @ np.linalg.inv(np.linalg.cholesky(np.cov(sample, rowvar=False))).T
    return sample * np.sqrt(variance) + mean


def test_frechet_distance_of_diagonal_gaussians():
    a, b = exactly([0, 1], [1, 4]), exactly([2, 1], [9, 1], seed=1)
    assert frechet_distance(a, b) == pytest.approx(4 + (1 - 3) ** 2 + (2 - 1) ** 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_agrees_with_torchmetrics():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6)), rng.standard_normal((400, 6))
    moments = [torch.tensor(f(x)) for x in (a, b) for f in (lambda x: x.mean(0), lambda x: np.cov(x, rowvar=False))]
    assert frechet_distance(a, b) == pytest.approx(_compute_fid(*moments).item(), rel=1e-6)
