"""The elastic search in real runs on tiny models: depths, rungs, resuming, ladders tuned further, refusals."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import config_factory
from helpers import assert_same_result, make_trainer, prepared, uneven_latency

from alter import InputError, TemporalExperts, load_config, train
from alter.backbones.draws import draw
from alter.common.load import without_effect
from alter.method.allocation import likely
from alter.training.run import tell_unused
from alter.training.search.chains import Chains
from alter.training.search.elastic import remeasure
from alter.training.setup.describe import describe_run
from alter.training.setup.parts import build
from alter.training.setup.plan import check
from alter.training.trial import measure_memory

SEARCH = {"method": "elastic", "samples": 4, "bins": 4}
RANGE = {"keep_ratio": [0.5, 0.8]}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def elastic(small_config, kind="dit", **changes):
    return small_config(kind, search={**SEARCH, **changes.pop("search", {})}, **changes)


def chain(trainer):
    """Masks of one chain, without measuring: the layers leave in their own order."""
    layers = len(trainer.parts.cost.sites)
    trainer.search.chains = Chains.of([np.arange(layers) >= np.arange(layers)[:, None]], np.array([0, 1000]))
    return trainer.search


def test_depths_are_drawn_as_often_as_they_are_likely(small_config, tmp_path):
    trainer = make_trainer(elastic(small_config, budget={"keep_ratio": 0.6}), tmp_path)
    search, parts = chain(trainer), trainer.parts
    cost_M = np.array([1 - parts.cost.share_L[:depth].sum() for depth in range(4)])
    expected_M = np.exp(-0.5 * ((cost_M - 0.6) / 0.2) ** 2)
    expected_M /= expected_M.sum()
    assert likely(cost_M, 0.6, 0.6) == pytest.approx(expected_M)
    steps, counts_M = 250, np.zeros(4)
    for step in range(steps):
        whole = draw(parts.noising, 8, 0.0, 0, step)
        (mask_BL,) = search.drawn([SimpleNamespace(drawn=whole)])
        halves = search.drawn([SimpleNamespace(drawn=whole[slice(0, 4)]), SimpleNamespace(drawn=whole[slice(4, 8)])])
        assert mask_BL.dtype == torch.bool and torch.equal(torch.cat(halves), mask_BL)
        counts_M += np.bincount(4 - mask_BL.sum(1).numpy(), minlength=4)
    spread_M = np.sqrt(expected_M * (1 - expected_M) / (8 * steps))
    assert (np.abs(counts_M / (8 * steps) - expected_M) < 4.5 * spread_M).all() and (counts_M > 0).all()


def test_budgets_of_a_range_are_alike():
    assert likely(np.array([1.0, 0.8, 0.6, 0.4]), 0.6, 0.8) == pytest.approx(
        np.array([np.exp(-0.5), 1, 1, np.exp(-0.5)]) / (2 + 2 * np.exp(-0.5)))


@pytest.mark.parametrize("budget", [{"keep_ratio": 0.6}, RANGE])
def test_the_tuned_rungs_of_a_range_are_drawn_for_each_sample(small_config, tmp_path, budget):
    trainer = make_trainer(elastic(small_config, budget=budget), tmp_path)
    chain(trainer)
    trainer.freeze()
    experts, (batch,) = trainer.experts, prepared(trainer)
    tuned = [rung for rung in experts.ladder if rung.tuned]
    if budget is not RANGE:
        assert [rung.keep_ratio_target for rung in tuned] == [0.6] and trainer._rungs([batch]) is None
        return
    assert [rung.keep_ratio_target for rung in tuned] == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8])
    rows = np.array([0, 400, 999, 0, 400, 999, 0, 400])
    kept, expected = np.zeros(8), np.zeros(8)
    for step in range(200):
        whole = dataclasses.replace(draw(trainer.parts.noising, 8, 0.0, 0, step), rows=torch.from_numpy(rows))
        (mask_BL,) = trainer._rungs([dataclasses.replace(batch, drawn=whole)])
        halves = trainer._rungs([dataclasses.replace(batch, drawn=whole[part]) for part in (slice(0, 3), slice(3, 8))])
        assert torch.equal(torch.cat(halves), mask_BL)
        kept += mask_BL.sum(1).numpy() / 200
    for b, row in enumerate(rows):
        depths = [experts.mask_EL[rung.expert_T[row]].sum() for rung in tuned]
        expected[b] = np.mean(depths)
        assert abs(kept[b] - expected[b]) <= 4.5 * np.std(depths) / 200**0.5 + 1e-9


def test_the_memory_is_tried_with_every_layer(small_config, tmp_path):
    trainer = make_trainer(elastic(small_config, budget={"keep_ratio": 0.6}), tmp_path)
    tried, update = [], trainer.update_backbone
    trainer.update_backbone = lambda batches, *masks: (tried.append(masks), update(batches, *masks))[1]
    for begun in (False, True):
        if begun:
            chain(trainer)
        peaks = measure_memory(trainer, searching=True)
        assert list(peaks) == ["search", "tuning"]
        mask_EL, expert_T = tried[-1]
        assert mask_EL[expert_T].all()
    assert trainer.search.tensors()["mask_ML"].sum() == 10


@pytest.mark.parametrize("budget", [{"keep_ratio": 0.6}, RANGE], ids=["one", "range"])
def test_an_interrupted_run_resumed_equals_the_uninterrupted_one(small_config, tmp_path, budget):
    """Stopped in the search, at T_end and in the tuning."""
    changes = {"budget": budget, "train": {"ema_decay": 0.9, "gradient_accumulation": 2},
               "checkpoint": {"every": 1, "keep": 10}}
    whole = train(elastic(small_config, output_dir="whole", **changes)).run_dir
    for stopped in (2, 3, 4):
        shutil.copytree(whole, "part")
        shutil.rmtree("part/final")
        train(elastic(small_config, output_dir=None, resume=f"part/checkpoints/step-{stopped:06d}", **changes))
        assert_same_result(whole, tmp_path / "part")
        shutil.rmtree("part")


def test_what_is_said_and_found(small_config, capsys):
    run = train(elastic(small_config, budget=RANGE, experts={"count": 2}))
    said, experts = capsys.readouterr().out, TemporalExperts.from_pretrained(run.run_dir / "final")
    assert "ordering 4 layers: about " in said
    before, after = (line for line in said.splitlines() if "2 experts over time would move samples" in line)
    assert before.startswith("before any training, which makes such gains smaller: at keep ratio 0.5, 2 experts")
    assert after.startswith("at keep ratio 0.5, 2 experts") and "90% of halves" in after
    assert run.experts.same(experts) and experts.keep_ratio_target == 0.5
    assert experts.measured.samples == 4 and len(experts.measured.edges) == 5
    assert all(len(np.unique(rung.expert_T)) <= 2 for rung in experts.ladder)
    loss_MB, edges = experts.measured.loss_MB, experts.measured.edges
    for rung in experts.ladder:
        lost = sum(loss_MB[rung.expert_T[low], b] for b, low in enumerate(edges[:-1]))
        low, high = rung.interval
        assert rung.error == pytest.approx(lost) and low <= lost <= high
        assert 0.3 * lost < low and high < 3 * lost or not lost
        assert experts.choose(rung).keep_ratio <= rung.keep_ratio_target + 0.005


def test_a_budget_of_time(small_config, tmp_path):
    latency = uneven_latency()
    latency.save(tmp_path / "latency.json")
    run = train(elastic(small_config, budget={"keep_ratio": 0.75, "cost": "latency", "latency_file": "latency.json"}))
    assert run.experts.latency.same(latency) if hasattr(latency, "same") else run.experts.latency == latency
    assert run.experts.time_ratio <= 0.755


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """A finished run for several budgets."""
    folder = tmp_path_factory.mktemp("ladder")
    return train(elastic(config_factory(folder), budget=RANGE, experts={"count": 2})).run_dir / "final"


@pytest.mark.parametrize("teacher", [False, True])
def test_a_ladder_is_tuned_further(small_config, tmp_path, ladder, teacher):
    """All of its tuned rungs, and with a teacher its errors are measured again; else they no longer hold."""
    before = TemporalExperts.from_pretrained(ladder)
    changes = {"backbone": {"pretrained": str(ladder)}, "experts": {"pretrained": str(ladder)}}
    if teacher:
        changes["teacher"] = {"pretrained": elastic(small_config).backbone.pretrained}
    else:
        changes["loss"] = {"denoise": 1.0, "output_kd": 0.0, "feature_kd": 0.0}
    changes["experts"]["count"] = 4  # of a search: the ladder's own was one of two
    config = elastic(small_config, output_dir="further", search={"samples": 6}, **changes)
    (tmp_path / "run").mkdir()
    trainer = make_trainer(config, tmp_path)
    tried, update = [], trainer.update_backbone
    trainer.update_backbone = lambda batches, *masks: (tried.append(masks), update(batches, *masks))[1]
    measure_memory(trainer, searching=False)
    assert np.array_equal(tried[0][1], before.pick(0.8).expert_T)
    after = train(config).experts
    assert after.same_masks(before) and [rung.tuned for rung in after.ladder] == [r.tuned for r in before.ladder]
    for one, other in zip(before.ladder, after.ladder, strict=True):
        assert not one.tuned or np.array_equal(one.expert_T, other.expert_T)
        assert (other.error is not None) == teacher and other.error != one.error
    assert (after.measured is not None) == teacher
    assert not teacher or not np.array_equal(after.measured.error_MB, before.measured.error_MB)
    assert not teacher or after.measured.samples == 6
    assert max(1 + np.count_nonzero(np.diff(rung.expert_T)) for rung in after.ladder) <= 2


def test_of_a_plan_alone_nothing_is_allocated_when_it_is_measured_again(small_config, ladder):
    config, experts = elastic(small_config), TemporalExperts.from_pretrained(ladder)
    planned = experts.only(dataclasses.replace(experts.rung, steps=4))
    again = remeasure(config, build(config), planned)
    assert again.same_masks(planned) and again.rung == dataclasses.replace(planned.rung, error=None, interval=None)
    assert again.measured.samples == config.search.samples


def test_of_a_ladder_that_was_not_tuned_the_chosen_rung_is(small_config, tmp_path, ladder):
    experts = TemporalExperts.from_pretrained(ladder)
    rungs = tuple(dataclasses.replace(rung, tuned=False) for rung in experts.ladder)
    dataclasses.replace(experts, ladder=rungs).choose(0.6).save_pretrained(tmp_path / "untuned")
    found = train(elastic(small_config, experts={"pretrained": "untuned"})).experts
    assert [rung.keep_ratio_target for rung in found.ladder if rung.tuned] == pytest.approx([0.6])


def test_a_chosen_rung_that_was_not_tuned_is_tuned_alone(small_config, tmp_path, ladder):
    """Of a ladder that has others which were."""
    experts = TemporalExperts.from_pretrained(ladder).choose(0.4)
    assert not experts.rung.tuned and any(rung.tuned for rung in experts.ladder)
    experts.save_pretrained(tmp_path / "chosen")
    found = train(elastic(small_config, experts={"pretrained": "chosen"})).experts
    assert [rung.keep_ratio_target for rung in found.ladder if rung.tuned] == pytest.approx([0.4])
    assert np.array_equal(found.rung.expert_T, experts.rung.expert_T)  # what was trained is what is exported


def test_a_finished_run_without_a_teacher_is_no_start(small_config, ladder):
    with pytest.raises(InputError, match="is a finished run, and search.method=elastic .*: set teacher.pretrained"):
        build(elastic(small_config, backbone={"pretrained": str(ladder)},
                      loss={"denoise": 1.0, "output_kd": 0.0, "feature_kd": 0.0}))


@pytest.mark.parametrize("changes, message", [
    ({"search": {"least": 0.7}, "budget": {"keep_ratio": 0.5}}, "budget.keep_ratio=0.5 is below 0.7.*search.least=0.7"),
    ({"search": {"method": "hypernetwork"}, "budget": RANGE}, "a range needs search.method=elastic"),
    ({"budget": {"keep_ratio": [0.8, 0.5]}}, "give the lower one first"),
    ({"experts": {"start": "greedy"}}, "experts.start=greedy has no effect with search.method=elastic"),
    ({"budget": {"descent": 0.5}}, "budget.descent=0.5 has no effect with search.method=elastic"),
    ({"train": {"schedule": "two_stage"}}, "train.schedule=two_stage has no effect with search.method=elastic"),
    ({"search": {"bins": 0}}, "search.bins"), ({"search": {"samples": 1}}, "search.samples"),
    ({"search": {"least": 1.0}}, "search.least")])
def test_what_does_not_fit_is_refused_in_one_line(small_config, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        check(elastic(small_config, **changes), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep, count", [(1.0, 2), (0.95, 1)])
def test_a_budget_that_leaves_no_choice(small_config, capsys, keep, count):
    """The dense model, whose masks move no sample, among them. Of one expert nothing over time is promised."""
    experts = train(elastic(small_config, budget={"keep_ratio": keep}, experts={"count": count})).experts
    assert experts.keep_ratio <= keep + 0.005 and np.isfinite(experts.measured.loss_MB).all()
    assert experts.measured.loss_MB.max() > 0
    assert ("over time would move samples" in capsys.readouterr().out) == (count > 1)


def test_the_dry_run_tells_what_is_measured_and_what_random_depths_cost():
    def text(method):
        return describe_run(load_config("sd15", [f"search.method={method}"]))

    def hours(said):
        return float(said.partition("time: about ")[2].split()[0])

    plain, said = text("hypernetwork"), text("elastic")
    assert "measured, in forwards" not in plain and "measured, in forwards of one sample: about " in said
    assert hours(said) < hours(plain)
    numbers = [int(word.replace(",", "")) for word in said.partition("measured, in")[2].splitlines()[0].split()
               if word[0].isdigit()]
    layers, chains = 34, 5
    removed = int(layers * 0.75)
    assert numbers[2] == 2 * 20 * 64 * (chains * removed + 2)  # every bin, sample and mask, and the teacher, twice
    assert json.dumps(numbers) and min(numbers) > 0


def test_keys_without_effect_are_named(small_config, capsys):
    """Where they have another value than their default; with given masks, none is."""
    set_here = {"experts": {"router": "ordered", "tau": 0.5}, "search": {"draws": "iteration"},
                "loss": {"balance": 0.5}, "optim": {"hypernetwork_lr": 1e-3}}
    config = elastic(small_config, **set_here)
    named = ["experts.router=ordered", "experts.tau=0.5", "search.draws=iteration"]
    assert set(without_effect(config)) >= set(named)  # beside what `elastic` itself sets
    assert not any(line.startswith(("loss.", "optim.")) for line in without_effect(config))  # are there for paper=true
    assert without_effect(small_config("dit", **set_here)) == []
    assert without_effect(small_config("dit", search={"bins": 5})) == ["search.bins=5"]
    assert without_effect(elastic(small_config, experts={"pretrained": "somewhere", "tau": 0.5})) == []
    assert "no effect with search.method=elastic: experts.router=ordered, " in describe_run(config)
    tell_unused(config)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert all(name in said for name in named) and said.endswith(": no effect with search.method=elastic")
