"""A sampler's timesteps weigh the training timesteps: in the budget, in the loss and in what is reported alike."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import table_of

from alter import TemporalExperts
from alter.backbones.cost import CostTable
from alter.evaluation.report.words import verdict
from alter.method import losses
from alter.method.budget import Budget, timestep_weights
from alter.method.hypernetwork import Logits
from alter.method.sensitivity import allocate
from alter.training.run import make_accelerator
from alter.training.setup.parts import build
from alter.training.trainer import Trainer

VISITED = np.array([9, 5, 2])


def weights_by_hand(count, visited):
    weights = np.zeros(count)
    for step in visited:
        nearest = [t for t in range(count) if min(visited, key=lambda other: (abs(t - other), other)) == step]
        weights[nearest] += 1 / len(visited) / len(nearest)
    return weights


@pytest.mark.parametrize("count, visited", [(10, [9, 5, 2]), (10, [4]), (7, [0, 6]), (20, [19, 18, 17, 3])])
def test_each_timestep_weighs_as_the_visited_one_nearest_to_it(count, visited):
    weights = timestep_weights(count, np.array(visited))
    assert weights == pytest.approx(weights_by_hand(count, visited)) and weights.sum() == pytest.approx(1)


def test_ties_repetitions_and_no_sampler():
    halfway = timestep_weights(5, np.array([4, 0]))  # 2 belongs to 0
    assert halfway == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4])
    assert timestep_weights(4, np.array([3, 3, 0])) == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])
    assert timestep_weights(4, None) == pytest.approx([1 / 4] * 4)


def test_the_expected_keep_ratio_reaches_every_row_of_the_router():
    budget = Budget(np.array([0.2, 0.3, 0.4]), 0.6, "total", VISITED)
    source = torch.Generator().manual_seed(0)
    logits = Logits(torch.randn(2, 3, generator=source), torch.randn(10, 2, generator=source, requires_grad=True))
    expected = budget.expected(logits)
    cost_E = logits.mask_EL.sigmoid().double().numpy() @ budget.share_L
    cost_T = logits.router_TE.softmax(-1).detach().double().numpy() @ cost_E
    assert expected.item() == pytest.approx(0.1 + weights_by_hand(10, VISITED) @ cost_T, abs=1e-6)
    expected.backward()
    assert (logits.router_TE.grad.abs().sum(1) > 0).all()


def test_one_share_is_found_measured_and_reported():
    share = np.random.default_rng(0).uniform(0.5, 1, 12)
    share *= 0.9 / share.sum()
    budget = Budget(share, 0.6, "total", np.array([999, 400, 390, 20]))
    source = torch.Generator().manual_seed(0)
    logits = Logits(torch.randn(4, 12, generator=source), torch.randn(1000, 4, generator=source))
    mask_EL, expert_T = budget.masks(logits, 0.6)
    by_hand = 0.1 + weights_by_hand(1000, [999, 400, 390, 20]) @ (mask_EL[expert_T] @ share)
    assert abs(by_hand - 0.6) <= 0.005 and budget.measured(mask_EL, expert_T) == pytest.approx(by_hand)
    macs = tuple(round(1e9 * value) for value in share)
    cost = CostTable(tuple(map(str, range(12))), macs, macs, 10**9, 10**9)
    experts = TemporalExperts.build(mask_EL, expert_T, cost, 0.6, "total", budget.timesteps)
    assert experts.keep_ratio == pytest.approx(by_hand)


def test_the_balance_counts_a_timestep_as_often_as_it_weighs():
    logits_TE = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([1, 2, 0, 4, 3])
    weighted = losses.load_balance(logits_TE, counts * 5 / counts.sum())
    torch.testing.assert_close(weighted, losses.load_balance(logits_TE.repeat_interleave(counts, dim=0)))


@pytest.mark.parametrize("experts", [1, 2])
def test_masks_by_sensitivity_are_those_of_bins_as_wide_as_they_weigh(experts):
    """Of 10 timesteps the upper half weighs three times as much: as 5 and 15 of 20 timesteps that weigh the same."""
    error_LB = np.random.default_rng(1).exponential(size=(6, 2)) * [[1, 3]]
    wide = dataclasses.replace(table_of(error_LB), edges=(0, 5, 20))
    table, even = dataclasses.replace(wide, edges=(0, 5, 10)), Budget(np.full(6, 1 / 6), 0.5, "total")
    budget = dataclasses.replace(even, timesteps=np.array([7, 7, 2, 7]))
    (mask_EL, expert_T), (expected_EL, expected_T) = allocate(table, budget, experts), allocate(wide, even, experts)
    assert np.array_equal(mask_EL, expected_EL) and np.array_equal(expert_T[[0, 5]], expected_T[[0, 5]])
    assert table.predicted_effect(mask_EL, expert_T, budget.weight_T(10)) == pytest.approx(
        wide.predicted_effect(expected_EL, expected_T))
    assert table.gain(budget, 2) == pytest.approx(wide.gain(even, 2)) != pytest.approx(table.gain(even, 2))
    assert verdict(table, budget, 2) != verdict(table, even, 2)


def test_the_loss_has_the_weights_of_the_budget(small_config, tmp_path):
    plain = small_config("unet", loss={"output_kd": 0.0, "feature_kd": 0.0})
    sampled = small_config("unet", loss={"output_kd": 0.0, "feature_kd": 0.0},
                           budget={"sampler": "DPMSolverMultistepScheduler", "sampling_steps": 4})
    terms = []
    for config in (plain, sampled):
        trainer = Trainer(config, build(config), make_accelerator(config), tmp_path)
        (batch,) = trainer._prepare(trainer.micro_batches(1))
        with torch.no_grad():
            terms.append(trainer.terms(trainer.backbone, batch, None)["denoise"])
            pred = trainer.backbone(batch.noisy_latents, batch.timesteps, **batch.conditioning).sample
    each = losses.mse_per_sample(pred, batch.target)
    assert torch.equal(terms[0], each.mean())
    weights = torch.from_numpy(1000 * weights_by_hand(1000, trainer.parts.budget.timesteps.tolist())).float()
    assert weights.std() > 0
    torch.testing.assert_close(terms[1], (each * weights[batch.timesteps]).mean())
