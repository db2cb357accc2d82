"""Distances against closed forms, direct loops and other libraries."""

import numpy as np
import pytest
import torch
import torch_fidelity.metric_fid
import torch_fidelity.metric_isc
import torch_fidelity.metric_kid
import torch_fidelity.metric_prc
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from alter.evaluation import distances


@pytest.fixture
def pair():
    source = np.random.default_rng(0)
    x = source.standard_normal((300, 12)).astype(np.float32)
    y = (source.standard_normal((250, 12)) @ source.standard_normal((12, 12)) * 0.5 + 0.3).astype(np.float32)
    return x, y


def test_frechet_distance_of_known_gaussians():
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 16.0])  # variances along common axes
    found = distances.frechet(np.zeros(3), rotation @ np.diag(a) @ rotation.T, np.full(3, 2.0),
                              rotation @ np.diag(b) @ rotation.T)
    assert found == pytest.approx(3 * 4 + ((a**0.5 - b**0.5) ** 2).sum())


def test_frechet_distance_agrees_with_torchmetrics_torch_fidelity_and_clean_fid(pair):
    from cleanfid.fid import frechet_distance

    x, y = pair
    statistics = distances.moments(x), distances.moments(y)
    ours = distances.frechet_distance(x, y)
    mu_x, sigma_x, mu_y, sigma_y = (torch.from_numpy(value) for value in (*statistics[0], *statistics[1]))
    assert ours == pytest.approx(float(_compute_fid(mu_x, sigma_x, mu_y, sigma_y)), rel=1e-6)
    assert ours == pytest.approx(frechet_distance(*statistics[0], *statistics[1]), rel=1e-6)
    theirs = torch_fidelity.metric_fid.fid_statistics_to_metric(
        *({"mu": mu, "sigma": sigma} for mu, sigma in statistics), False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_identical_sets_have_no_distance(pair):
    x, _ = pair
    assert distances.frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    assert distances.gaussian_mmd(x, x) == pytest.approx(0, abs=1e-9)
    assert distances.precision_recall(x, x) == (1.0, 1.0)


def test_rank_deficient_covariances_are_handled(pair):
    x, y = pair
    assert np.isfinite(distances.frechet_distance(x[:5], y[:6]))


def test_kernel_distance(pair):
    x, y = pair
    value, deviation = distances.kernel_distance(x, y, subsets=7, size=40, seed=3)
    source, expected = np.random.default_rng(3), []
    for _ in range(7):
        a, b = (torch.from_numpy(part[source.choice(len(part), 40, replace=False)].astype(np.float64))
                for part in (x, y))
        expected.append(float(poly_mmd(a, b, 3, None, 1.0)))  # of torchmetrics
    assert (value, deviation) == (pytest.approx(np.mean(expected), rel=1e-9), pytest.approx(np.std(expected), rel=1e-9))
    theirs = torch_fidelity.metric_kid.kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subset_size=200, kid_subsets=200, verbose=False)
    many, spread = distances.kernel_distance(x, y, subsets=200, size=200)
    assert many == pytest.approx(theirs["kernel_inception_distance_mean"], abs=4 * spread / 200**0.5)


def test_gaussian_mmd_against_a_double_loop(pair):
    x, y = (part[:20].astype(np.float64) for part in pair)
    unit = [[row / np.sqrt((row**2).sum()) for row in part] for part in (x, y)]

    def mean_kernel(a, b):
        return np.mean([[np.exp(-((p - q) ** 2).sum() / 200) for q in b] for p in a])

    direct = mean_kernel(unit[0], unit[0]) + mean_kernel(unit[1], unit[1]) - 2 * mean_kernel(*unit)
    assert distances.gaussian_mmd(x, y) == pytest.approx(1000 * direct, rel=1e-9)


def test_precision_and_recall_against_brute_force_and_torch_fidelity(pair):
    x, y = (part[:80] for part in pair)

    def share(points, manifold):
        radii = [sorted(np.linalg.norm(m - o) for o in manifold)[3] for m in manifold]
        return np.mean([any(np.linalg.norm(p - m) <= r for m, r in zip(manifold, radii, strict=True)) for p in points])

    found = distances.precision_recall(x, y, neighbours=3)
    assert found == (pytest.approx(share(x, y)), pytest.approx(share(y, x))) and 0 < found[0] < 1
    theirs = torch_fidelity.metric_prc.prc_features_to_metric(
        torch.from_numpy(x).double(), torch.from_numpy(y).double(), verbose=False)
    assert found == (pytest.approx(theirs["precision"]), pytest.approx(theirs["recall"]))


def test_nothing_depends_on_the_size_of_blocks(pair):
    x, y = pair
    whole = distances.gaussian_mmd(x, y, block=10_000), distances.precision_recall(x, y, block=10_000)
    assert distances.gaussian_mmd(x, y, block=7) == pytest.approx(whole[0], rel=1e-9)
    assert distances.precision_recall(x, y, block=7) == whole[1]


def test_inception_score_bounds_and_agreement():
    sure = np.full((1000, 10), -1e4)
    sure[np.arange(1000), np.arange(1000) % 10] = 0
    assert distances.inception_score(sure, splits=1)[0] == pytest.approx(10)  # every class, surely: the most
    assert distances.inception_score(np.zeros((1000, 10)))[0] == pytest.approx(1)  # knows nothing: the least
    logits = np.random.default_rng(0).standard_normal((100, 10)).astype(np.float32)
    theirs = torch_fidelity.metric_isc.isc_features_to_metric(
        torch.from_numpy(logits[np.random.default_rng(0).permutation(100)]), splits=10, shuffle=False)
    assert distances.inception_score(logits) == (
        pytest.approx(theirs["inception_score_mean"], rel=1e-6), pytest.approx(theirs["inception_score_std"], rel=1e-5))


def test_deviation_of_gaussian_mmd_against_resampling_itself(pair):
    x, y = pair
    direct = distances.bootstrap_deviation(lambda rows: distances.gaussian_mmd(x[rows], y), len(x), 25, seed=4)
    assert distances.gaussian_mmd_deviation(x, y, 25, seed=4, block=64) == pytest.approx(direct, rel=1e-6)


def test_bootstrap_deviation_of_a_mean():
    values = np.random.default_rng(1).standard_normal(400)
    found = distances.bootstrap_deviation(lambda rows: float(values[rows].mean()), 400, resamples=300)
    assert found == pytest.approx(values.std() / 20, rel=0.2)
