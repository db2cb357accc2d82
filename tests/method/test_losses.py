import math

import pytest
import torch

from alter.method import losses


def test_mse_is_per_sample():
    value = losses.mse_per_sample(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    assert value.tolist() == [2.5, 2.0]


def test_half_precision_is_summed_in_fp32():
    a = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert losses.mse_per_sample(a, -a).item() == 360_000.0  # not representable in fp16


def test_feature_kd_is_the_mean_over_points_of_different_sizes():
    student = [torch.zeros(1, 2), torch.zeros(1, 4)]
    teacher = [torch.full((1, 2), 2.0), torch.full((1, 4), 1.0)]
    assert losses.feature_kd(student, teacher).item() == (4.0 + 1.0) / 2


def test_feature_kd_leaves_out_massive_activations():
    teacher = torch.zeros(1, 100)
    teacher[0, 7] = 1000.0
    student = torch.ones(1, 100)
    assert losses.feature_kd([student], [teacher], outliers=5.0).item() == 1.0
    assert losses.feature_kd([student], [teacher]).item() == pytest.approx((99 + 999**2) / 100)


@pytest.mark.parametrize("keep", [0.3, 0.65, 0.9])
def test_log_ratio(keep):
    expected = math.log(max(keep, 0.65) / min(keep, 0.65))
    assert losses.log_ratio(torch.tensor(keep, dtype=torch.float64), 0.65).item() == pytest.approx(expected, abs=1e-9)


def test_load_balance_is_one_when_even_and_E_when_one_expert_has_all():
    even = torch.eye(4).repeat(5, 1) * 100
    assert losses.load_balance(even).item() == pytest.approx(1.0)
    assert losses.load_balance(torch.tensor([[100.0, 0, 0, 0]]).repeat(20, 1)).item() == pytest.approx(4.0)


def test_load_balance_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0], [0.0, math.log(3.0)]])
    # F = (2/3, 1/3); P = ((3/4 + 3/4 + 1/4) / 3, ...) = (7/12, 5/12)
    assert losses.load_balance(logits).item() == pytest.approx(2 * (2 / 3 * 7 / 12 + 1 / 3 * 5 / 12))
