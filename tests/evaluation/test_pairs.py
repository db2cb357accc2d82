"""Pairs of images of one seed: closed forms, and invariants."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchvision.models import alexnet

from alter import InputError
from alter.evaluation.networks import Lpips
from alter.evaluation.pairs import drift, mean, psnr, ratio, ssim


def pictures(count=6, side=24, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def gaussian(count, dimensions, seed):
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def test_equal_images():
    images = pictures()
    assert psnr(images, images).tolist() == [math.inf] * 6
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 6)
    found = drift(images, images)
    assert (found.value, found.error, found.low, found.high) == (0, 0, 0, 0)


def test_psnr_of_a_constant_shift():
    images = pictures()
    shifts = torch.tensor([0.01, 0.02, 0.1, 0.2, 1.0, 2.0])  # the range of values is 2 wide
    expected = [20 * math.log10(2 / shift) for shift in shifts.tolist()]
    assert psnr(images + shifts[:, None, None, None], images).tolist() == pytest.approx(expected, abs=1e-3)


def ssim_by_hand(a, b):
    """Wang et al. 2004, of one channel [H, W] with a range of 2: a Gaussian of 1.5 pixels, mirrored at the edges."""
    def smooth(values):
        return gaussian_filter(values, 1.5, mode="mirror", truncate=3.5)

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b, cov = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2, smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    return ((2 * mean_a * mean_b + c1) * (2 * cov + c2) / (mean_a**2 + mean_b**2 + c1) / (var_a + var_b + c2)).mean()


@pytest.mark.parametrize("side", [8, 24])
def test_ssim_is_its_formula(side):
    images = pictures(side=side)
    other = (images + 0.2 * pictures(side=side, seed=1)).clamp(-1, 1)
    expected = [np.mean([ssim_by_hand(x, y) for x, y in zip(a, b, strict=True)])
                for a, b in zip(images.double().numpy(), other.double().numpy(), strict=True)]
    assert ssim(images, other).tolist() == pytest.approx(expected, abs=1e-6)
    assert ssim(other, images).tolist() == pytest.approx(expected, abs=1e-6)


def test_ssim_of_images_that_are_too_small():
    with pytest.raises(ValueError, match="at least 6"):
        ssim(pictures(side=5), pictures(side=5))


def test_drift_of_independent_gaussians_is_one():
    found = drift(gaussian(400, 50, 1), gaussian(400, 50, 2))
    assert found.value == pytest.approx(1, abs=4 * found.error) and found.error < 0.02
    assert found.low < 1 < found.high


def test_drift_is_a_brute_force_ratio_in_which_scale_order_and_shape_do_not_matter():
    dense = gaussian(12, 10, 0)
    moved = dense + 0.3 * gaussian(12, 10, 1)
    others = [float((a - b).square().sum()) for i, a in enumerate(dense) for j, b in enumerate(dense) if i != j]
    expected = float((moved - dense).square().sum(1).mean()) / np.mean(others)
    assert drift(moved, dense).value == pytest.approx(expected, rel=1e-5)
    for same in ((moved.flip(0), dense.flip(0)), (100 * moved + 3, 100 * dense + 3),
                 (moved.view(12, 2, 5), dense.view(12, 2, 5))):
        assert drift(*same).value == pytest.approx(expected, rel=1e-4)


def test_the_interval_covers_the_truth_and_its_error_is_that_of_repeated_draws():
    found = []
    for seed in range(60):
        dense = gaussian(80, 5, 2 * seed)
        found.append(drift(dense + 0.5 * gaussian(80, 5, 2 * seed + 1), dense))
    truth = 0.25 / 2
    inside = sum(one.low < truth < one.high for one in found)
    assert inside >= 48  # of 60, at 95%
    spread = np.std([one.value for one in found], ddof=1)
    assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.3)


def test_a_mean_has_the_error_of_a_mean():
    values = gaussian(200, 1, 0).flatten()
    assert mean(values).value == pytest.approx(float(values.mean()))
    assert mean(values).error == pytest.approx(float(values.std()) / 200**0.5, rel=0.1)
    assert mean(values) == mean(values)  # of one seed
    assert ratio(3 * values, values).value == pytest.approx(3)


def test_what_drift_refuses():
    for dense, message in ((gaussian(4, 3, 0), "shapes"), (gaussian(5, 2, 0), "shapes"), (torch.ones(5, 3), "equal")):
        with pytest.raises(ValueError, match=message):
            drift(gaussian(5, 3, 1), dense)
    with pytest.raises(ValueError, match="at least 2"):
        drift(gaussian(1, 3, 0), gaussian(1, 3, 1))


def test_lpips_with_random_weights_is_its_formula(tmp_path):
    """One of torchvision's AlexNets, whose features are compared by hand."""
    torch.manual_seed(0)
    network = alexnet().eval()
    torch.save(network.state_dict(), tmp_path / "alexnet.pth")
    lpips = Lpips(tmp_path / "alexnet.pth")
    images, dense = pictures(2, 40), pictures(2, 40, seed=1)
    assert lpips(images, images).tolist() == [0, 0]
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((part - shift[:, None, None]) / scale[:, None, None] for part in (images, dense))
    total, heads = torch.zeros(2), iter(lpips.net.lins)
    with torch.no_grad():
        for i, layer in enumerate(network.features[:12]):
            x, y = layer(x), layer(y)
            if i in (1, 4, 7, 9, 11):
                unit = [part / (part.square().sum(1, keepdim=True) + 1e-8).sqrt() for part in (x, y)]
                weight = next(heads).model[-1].weight
                total += ((unit[0] - unit[1]).square() * weight).sum(1).mean((1, 2))
        found = lpips(images, dense)
        torch.testing.assert_close(found, total)
        torch.testing.assert_close(lpips(dense, images), found)
    with pytest.raises(InputError, match="--lpips-weights .*none.pth: no such file: put torchvision's alexnet-owt"):
        Lpips(tmp_path / "none.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other weights than alexnet-owt"):
        Lpips(tmp_path / "other.pth")
