import dataclasses

import numpy as np
import pytest

import alter.training.checkpoint
import alter.training.run
from alter import InputError, TemporalExperts, train
from alter.training.greedy import remove_greedily
from alter.training.probe import Probe
from alter.method.sensitivity import Sensitivity, start_near
from alter.training.measure import measure_sensitivity
from alter.evaluation.report.records import read_sensitivity
from alter.training.setup.parts import build


@pytest.fixture
def parts_of(small_config):
    def make(keep_ratio):
        config = small_config("dit", budget={"keep_ratio": keep_ratio, "over": "prunable"})
        return config, build(config)
    return make


def errors_of(function):
    """In place of forwards: the error as a function of the layers that are gone and of the range's middle."""
    def errors(self, masks, low, high, weight_T=None):
        return np.array([function(set(np.flatnonzero(~mask)), (low + high) / 2) for mask in masks], dtype=float), 1.0
    return errors


def table(layers, error_LB):
    error_LB = np.array(error_LB, dtype=float)
    edges = tuple(np.linspace(0, 1000, error_LB.shape[1] + 1).astype(int).tolist())
    return Sensitivity(tuple(map(str, range(layers))), edges, 4, error_LB, np.ones(error_LB.shape[1]),
                       np.ones(error_LB.shape[1]))


def test_a_layer_and_its_double_do_not_both_go(parts_of, monkeypatch):
    """Each of layers 0 and 1 is free to lose while the other is there; errors that add up would lose both."""
    config, parts = parts_of(0.5)
    single = [0.0, 0.0, 1.0, 2.0]
    monkeypatch.setattr(Probe, "errors", errors_of(
        lambda gone, _: sum(single[layer] for layer in gone) + (50 if {0, 1} <= gone else 0)))
    masks, _ = remove_greedily(config, parts, table(4, [[value] for value in single]), 1)
    assert masks.tolist() == [[False, True, False, True]] or masks.tolist() == [[True, False, False, True]]


def test_timesteps_that_suffer_keep_more_layers(parts_of, monkeypatch):
    config, parts = parts_of(0.5)
    worth = np.array([1.0, 2.0, 3.0, 4.0])
    scale = lambda middle: 10 if middle < 500 else 1  # noqa: E731
    monkeypatch.setattr(Probe, "errors", errors_of(
        lambda gone, middle: scale(middle) * sum(worth[list(gone)])))
    masks, expert_T = remove_greedily(config, parts, table(4, np.outer(worth, [10, 1])), 2)
    assert expert_T.tolist() == [0] * 500 + [1] * 500
    assert masks.sum(1).tolist() == [3, 1] and masks.tolist() == [[False, True, True, True], [False] * 3 + [True]]


def test_a_sampler_s_timesteps_decide_what_a_removal_saves(small_config, monkeypatch):
    """The later half is never visited: losing layers there saves nothing, however little it hurts."""
    config = small_config("dit", budget={"keep_ratio": 0.5, "over": "prunable"})
    parts = build(config)
    parts.budget = dataclasses.replace(parts.budget, timesteps=np.arange(0, 500, 25))
    worth = np.array([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(Probe, "errors", errors_of(
        lambda gone, middle: (10 if middle < 500 else 1) * sum(worth[list(gone)])))
    masks, _ = remove_greedily(config, parts, table(4, np.outer(worth, [10, 1])), 2)
    assert masks.astype(int).tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_removals_end_as_near_as_layers_of_unequal_cost_allow(small_config, monkeypatch):
    """What falls short of the budget is not taken while something else fits."""
    config = small_config("dit", budget={"keep_ratio": 0.6, "over": "prunable"})
    parts = build(config)
    parts.budget = dataclasses.replace(parts.budget, share_L=np.array([0.5, 0.3, 0.1, 0.1]))
    monkeypatch.setattr(Probe, "errors", errors_of(lambda gone, _: sum(np.array([1.0, 9.0, 9.0, 9.0])[list(gone)])))
    masks, _ = remove_greedily(config, parts, table(4, [[1.0], [9], [9], [9]]), 1)
    assert masks.astype(int).tolist() in ([[1, 0, 0, 1]], [[1, 0, 1, 0]])


def test_its_first_removal_is_the_least_sensitive_layer(parts_of):
    """With real forwards, one layer to lose: the layer of least error, by `measure_sensitivity`."""
    config, parts = parts_of(0.75)
    measured = measure_sensitivity(config, parts, bins=1, samples=8)
    masks, _ = remove_greedily(config, parts, measured, 1, samples=8)
    assert np.flatnonzero(~masks[0]).tolist() == [measured.error_LB[:, 0].argmin()]


def test_a_search_starts_at_the_masks_of_the_table(small_config, monkeypatch):
    """Whatever the codes say, a large offset makes them the most probable masks of every expert, at the budget."""
    config = small_config("dit", experts={"count": 3, "start": "greedy", "offset": 20.0},
                          budget={"keep_ratio": 0.5, "over": "prunable"})
    parts = build(config)
    monkeypatch.setattr(Probe, "errors", errors_of(lambda gone, _: sum(np.array([1.0, 4.0, 2.0, 3.0])[list(gone)])))
    start_near(measure_sensitivity(config, parts), parts.budget, parts.hypernetwork)
    logits = parts.hypernetwork()
    assert logits.mask_EL.gt(0).tolist() == [[False, True, False, True]] * 3
    assert parts.budget.expected(logits).item() == pytest.approx(0.5, abs=1e-4)


def test_a_run_that_starts_greedily_is_resumed_without_measuring_again(small_config, tmp_path, monkeypatch):
    changes = {"experts": {"count": 2, "start": "greedy", "offset": 20.0}, "output_dir": str(tmp_path / "run"),
               "optim": {"hypernetwork_lr": 1e-9}, "budget": {"keep_ratio": 0.5, "over": "prunable"}}
    run = train(small_config("dit", checkpoint={"every": 1, "keep": 10}, **changes))
    first = TemporalExperts.from_pretrained(run / "final").mask_EL
    monkeypatch.setattr(alter.training.run, "measure_sensitivity", None)
    train(small_config("dit", resume=str(run / "checkpoints/step-000001"), **changes))
    assert np.array_equal(TemporalExperts.from_pretrained(run / "final").mask_EL, first)
    assert first.sum(1).tolist() == [2, 2] and (first == first[0]).all()
    assert read_sensitivity(run / "sensitivity.json").samples == 32


@pytest.mark.parametrize("changes", [{"experts": {"start": "greedy", "offset": 0.0}},
                                     {"experts": {"start": "greedy"}, "budget": {"descent": 0.5}}])
def test_a_start_that_would_be_undone_is_refused(small_config, changes):
    with pytest.raises(InputError, match="experts.start=greedy with experts.offset"):
        small_config("dit", **changes)


def test_checkpoints_from_before_the_sites_had_offsets_of_their_own(small_config, tmp_path, monkeypatch):
    changes = {"output_dir": str(tmp_path / "run"), "checkpoint": {"every": 1, "keep": 10}}
    run = train(small_config("dit", **changes))
    whole = TemporalExperts.from_pretrained(run / "final")
    load = alter.checkpoint.load_checkpoint

    def load_older(folder):
        tensors, *others = load(folder)
        del tensors["hypernetwork"]["offset_L"]
        return tensors, *others

    monkeypatch.setattr(alter.training.checkpoint, "load_checkpoint", load_older)
    train(small_config("dit", resume=str(run / "checkpoints/step-000001"), **changes))
    resumed = TemporalExperts.from_pretrained(run / "final")
    assert np.array_equal(whole.mask_EL, resumed.mask_EL) and np.array_equal(whole.expert_T, resumed.expert_T)
