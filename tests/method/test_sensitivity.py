"""Masks from a table of sensitivities, and what the table says of experts."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from helpers import table_of, times_of
from scipy.optimize import linprog

from alter.backbones.noising import Flow
from alter.evaluation.report.words import verdict
from alter.method.budget import Budget
from alter.method.hypernetwork import HyperNetwork
from alter.method.sensitivity import allocate, start_near


def test_the_response_decides_which_timesteps_keep_layers():
    flat = table_of([[2, 1], [2, 1], [4, 2], [4, 2]])
    budget = Budget(np.full(4, 0.25), 0.5, "prunable")
    tilted = dataclasses.replace(flat, amplification_B=np.array([1.0, 10.0]))
    for table, more in ((flat, 0), (tilted, 1)):
        mask_EL, expert_T = allocate(table, budget, 2)
        kept_B = mask_EL[expert_T[[0, 999]]].sum(1)
        assert kept_B.sum() == 4 and kept_B[more] >= kept_B[1 - more]
        assert table.predicted_effect(mask_EL, expert_T) <= table.predicted_effect(np.array([[0, 0, 1, 1]], bool),
                                                                                  np.zeros(1000, int))
    assert tilted.gain(budget, 2) > flat.gain(budget, 2)


def test_the_allocation_is_nearly_the_best_of_all_borders():
    """Against every choice of borders, the masks of each by a linear programme (whose optimum is a lower bound)."""
    random = np.random.default_rng(3)
    for _ in range(4):
        table = table_of(random.exponential(size=(12, 1)) * random.exponential(size=(12, 6)))
        budget = Budget(random.dirichlet(np.full(12, 5.0)) * 0.9, 0.6, "total")
        mask_EL, expert_T = allocate(table, budget, 3)
        assert abs(budget.measured(mask_EL, expert_T) - 0.6) <= 0.004 and set(expert_T) == {0, 1, 2}
        best = np.inf
        for borders in itertools.combinations(range(1, 6), 2):
            segments = np.split(np.arange(6), borders)
            avoided = np.array([table.error_LB[:, part].sum(1) / 6 for part in segments]).ravel()
            cost = np.array([budget.share_L * len(part) / 6 for part in segments]).ravel()
            found = linprog(-avoided, A_ub=cost[None], b_ub=[0.6 + 0.004 - budget.fixed], bounds=(0, 1))
            best = min(best, avoided.sum() + found.fun)
        assert best <= table.predicted_effect(mask_EL, expert_T) <= best * 1.1


def test_experts_follow_the_error():
    """Layers 0 and 1 matter early, 2 and 3 late: two masks lose nothing, one loses half."""
    table = table_of([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    budget = Budget(np.full(4, 0.25), 0.5, "total")
    mask_EL, expert_T = allocate(table, budget, 2)
    assert mask_EL.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert expert_T.tolist() == [0] * 500 + [1] * 500
    assert table.predicted_effect(mask_EL, expert_T) == 0
    assert table.predicted_effect(*allocate(table, budget, 1)) == pytest.approx(1.0)
    assert table.agreement == pytest.approx(-1 / 3)  # 1 within the halves, -1 between them


def started(router, offset=20.0):
    """Masks and routes of a search that starts apart, where layers 0 and 1 matter in bin 0 and the others later."""
    torch.manual_seed(0)
    hyper = HyperNetwork(2, 4, times_of(Flow(1000), features_TD=torch.randn(1000, 8)), router, offset=offset)
    table = table_of([[4, 0, 0, 0], [4, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]])
    start_near(table, Budget(np.full(4, 0.25), 0.5, "total"), hyper, apart=True)
    logits = hyper()
    return logits.mask_EL.gt(0).tolist(), logits.router_TE.argmax(1).numpy()


def test_a_start_apart_puts_ordered_cut_points_where_the_table_has_its_borders():
    masks, expert_T = started("ordered")
    assert masks == [[True, True, False, False], [False, False, True, True]]
    assert expert_T.tolist() == [0] * 250 + [1] * 750


def test_a_start_apart_gives_experts_of_fixed_intervals_their_masks():
    """Of the first half, bin 0 decides; the table's own border is not there."""
    masks, expert_T = started("uniform")
    assert masks == [[True, True, False, False], [False, False, True, True]]
    assert expert_T.tolist() == [0] * 500 + [1] * 500


def test_a_start_apart_keeps_the_budget_for_the_routes_that_it_finds():
    masks, expert_T = started("learned")
    assert (np.diff(expert_T) != 0).sum() > 2
    assert abs(Budget(np.full(4, 0.25), 0.5, "total").measured(np.array(masks), expert_T) - 0.5) < 0.25 * min(
        np.bincount(expert_T) / 1000) + 0.004  # the least that one layer of one expert costs


def test_the_verdict():
    budget = Budget(np.full(4, 0.25), 0.5, "total")
    same = table_of(np.outer([1, 2, 3, 4], [4.0, 1, 1, 1]))
    assert same.agreement == pytest.approx(1)
    text = verdict(same, budget, 4)
    assert "nearly the same at all timesteps (mean rank correlation 1.00)" in text
    assert "around t = 124: 2.3 times the mean" in text
    crossed = table_of([[4, 4, 1, 1], [3, 3, 2, 2], [2, 2, 3, 3], [1, 1, 4, 4]])
    text = verdict(crossed, budget, 2)
    assert "different at different timesteps" in text and "experts may have something to gain" in text
    alike = table_of([[9, 9, 9, 9], [8, 8, 8, 8], [1, 1, 2, 2], [2, 2, 1, 1]])
    assert 0.6 < alike.agreement < 0.9
    text = verdict(alike, budget, 2)
    assert "similar at all timesteps" in text and "experts have little to gain over one mask" in text
    text = verdict(crossed, budget, 2)
    assert f"{(3 + 7) / 2 / 3:.2f} times as far (squared) as 2 experts" in text
