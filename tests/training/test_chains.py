"""Chains of nested masks, against loops over samples and masks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_trainer

import alter.training.search.elastic as elastic
from alter.backbones.draws import draw
from alter.method.allocation import likely
from alter.training.search.chains import Chains
from alter.training.setup.parts import build

EDGES = np.array([0, 300, 1000])
ORDERS = (0, 1, 2, 3), (1, 0, 2, 3), (3, 0, 1)  # in which layers leave: at all timesteps, in each interval
COST_L = np.array([0.1, 0.2, 0.3, 0.4])


def nested(order):
    mask_ML = np.ones((len(order), 4), dtype=bool)
    for depth, layer in enumerate(order[:-1]):
        mask_ML[depth + 1 :, layer] = False
    return mask_ML


@pytest.fixture
def chains():
    return Chains.of([nested(order) for order in ORDERS], EDGES)


def test_every_mask_is_there_once_and_known_to_its_chains(chains):
    rows = [tuple(mask_L) for mask_L in chains.mask_ML]
    assert len(set(rows)) == len(rows) and all(rows[0])
    for order, member_M in zip(ORDERS, chains.member_CM, strict=True):
        assert {rows[m] for m in np.flatnonzero(member_M)} == set(map(tuple, nested(order)))
    assert set(rows) == {tuple(mask_L) for order in ORDERS for mask_L in nested(order)}


def test_spans_and_intervals(chains):
    assert Chains.spans(EDGES) == [(0, 1000), (0, 300), (300, 1000)]
    assert Chains.spans(np.array([0, 1000])) == [(0, 1000)]
    assert chains.interval_of(np.array([0, 299, 300, 999])).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.72, 1.0])
@pytest.mark.parametrize("skipping", [False, True])
def test_the_nearest_mask_is_of_the_intervals_own_chain(chains, budget, skipping):
    cost_M = chains.mask_ML @ COST_L
    mask_T = chains.nearest(cost_M, budget, skipping)
    for timestep in (0, 299, 300, 999):
        own = nested(ORDERS[1 if timestep < 300 else 2])[skipping:]
        assert abs(cost_M[mask_T[timestep]] - budget) == pytest.approx(np.abs(own @ COST_L - budget).min())
        assert tuple(chains.mask_ML[mask_T[timestep]]) in set(map(tuple, own))


def test_where_nothing_can_be_skipped_every_layer_is_nearest():
    alone = Chains.of([np.ones((1, 4), dtype=bool)], np.array([0, 1000]))
    assert (alone.nearest(np.ones(1), 0.5, skipping=True) == 0).all()
    assert alone.likely(np.ones(1), 0.5, 0.5).tolist() == [[1.0]]


def test_how_often_masks_are_trained(chains):
    """The whole one is a third of what is drawn in both intervals, and each mask as likely as in its chain alone."""
    cost_M = chains.mask_ML @ COST_L
    found_IM, rows = chains.likely(cost_M, 0.5, 0.6), [tuple(mask_L) for mask_L in chains.mask_ML]
    assert found_IM.sum(axis=1) == pytest.approx(1)
    for interval, order in enumerate(ORDERS[1:]):
        expected_M = np.zeros(len(rows))
        for share, own in ((1 / 3, ORDERS[0]), (2 / 3, order)):
            masks = nested(own)
            for mask_L, odds in zip(masks, likely(masks @ COST_L, 0.5, 0.6), strict=True):
                expected_M[rows.index(tuple(mask_L))] += share * odds
        assert found_IM[interval] == pytest.approx(expected_M)


def test_samples_draw_masks_of_the_chains_for_their_timestep(small_config, tmp_path):
    config = small_config("dit", search={"method": "elastic"}, budget={"keep_ratio": 0.6})
    trainer = make_trainer(config, tmp_path)
    search = trainer.search
    search.chains = Chains.of([nested(order) for order in ORDERS], EDGES)
    own = [set(map(tuple, np.concatenate([nested(ORDERS[0]), nested(order)]))) for order in ORDERS[1:]]
    seen = [set(), set()]
    for step in range(60):
        drawn = draw(trainer.parts.noising, 8, 0.0, 0, step)
        (mask_BL,) = search.drawn([SimpleNamespace(drawn=drawn)])
        for row, mask_L in zip(drawn.rows, mask_BL, strict=True):
            seen[int(row >= 300)].add(tuple(mask_L.tolist()))
    assert seen == own
    (tmp_path / "again").mkdir()
    loaded = make_trainer(config, tmp_path / "again").search
    loaded.load_tensors(search.tensors())
    assert all(np.array_equal(value, getattr(loaded.chains, name)) for name, value in vars(search.chains).items())
    assert torch.equal(loaded.drawn([SimpleNamespace(drawn=drawn)])[0], mask_BL)
    loaded.load_tensors({"masks_ML": torch.from_numpy(nested(ORDERS[0]))})  # of a former version
    assert len(loaded.chains.member_CM) == 1 and np.array_equal(loaded.chains.mask_ML, nested(ORDERS[0]))


@pytest.mark.parametrize("count, borders", [(1, []), (2, [500]), (6, [250, 500, 750])])
def test_layers_are_ordered_in_as_many_intervals_as_experts_up_to_four(small_config, monkeypatch, count, borders):
    config = small_config("dit", search={"method": "elastic", "samples": 2}, experts={"count": count})
    asked = []

    def order(probe, budget, least, weight_T, low, high):
        asked.append((low, high))
        return nested(ORDERS[low % 3])

    monkeypatch.setattr(elastic, "order_layers", order)
    chains = elastic.ordered(config, build(config))
    assert chains.edges.tolist() == [0, *borders, 1000] and asked == Chains.spans(chains.edges)
    assert len(chains.member_CM) == (1 if count == 1 else len(borders) + 2)
