"""One artefact, one dial: rungs of a ladder, chosen for a pipeline, a request, a thread."""

import asyncio
import copy
import dataclasses
import json
import pickle
import threading

import numpy as np
import pytest
import torch
from conftest import make_dit, make_inputs, make_unet, save_stable_diffusion
from helpers import TARGETS, chain, draw
from helpers import load_quietly as load

from alter import InputError, TemporalExperts, load_pipeline
from alter.experts.ladder import Rung
from alter.method.measured import Measured


def call(model, timestep, kind="dit", batch=1):
    (sample, _), conditioning = make_inputs(kind, batch)
    with torch.no_grad():
        return model(sample, timestep=torch.full((batch,), timestep), **conditioning).sample


def alone(model, experts, keep_ratio, timestep, kind="dit"):
    """What one rung gives by itself, applied to a model without experts."""
    with experts.only(keep_ratio).apply(model):
        return call(model, timestep, kind)


def test_the_rung_is_the_highest_that_is_not_above_what_is_asked():
    experts = chain(make_dit(layers=6))
    for asked in np.arange(0.3455, 1, 0.001).tolist():
        assert experts.pick(asked).keep_ratio_target == max(t for t in TARGETS if t <= asked + 0.005)
    near = dataclasses.replace(experts.ladder[-1], keep_ratio_target=0.648)
    assert dataclasses.replace(experts, ladder=(*experts.ladder[:-1], near, experts.ladder[-1])).pick(0.648) == near
    assert experts.pick(None) is experts.rung is experts.ladder[1]
    for asked, message in ((0.34, "keep_ratio=0.34: is below the lowest rung of their ladder, which has 0.35, 0.5, "
                                  "0.65: ask for at least 0.35"), (65, "a share in"), (0, "a share in"),
                           (float("nan"), "a share in")):
        for refused in (experts.pick, experts.choose, experts.only, lambda asked: experts.apply(make_dit(6), asked),
                        lambda asked: experts.at(asked).__enter__()):
            with pytest.raises(InputError, match=message) as caught:
                refused(asked)
            assert "\n" not in str(caught.value)


def test_costs_are_those_of_the_chosen_rung():
    experts = chain(make_unet(), 16)
    for rung in experts.ladder:
        one = experts.choose(rung)
        kept = [sum(macs for macs, runs in zip(one.macs, one.mask_EL[e], strict=True) if runs) for e in rung.expert_T]
        assert one.keep_ratio == pytest.approx(1 - (sum(one.macs) - np.mean(kept)) / one.macs_total)
        assert one.used == sorted(set(rung.expert_T.tolist())) and len(one.mask_EL) == len(one.sites)
        few = one.only()
        assert few.ladder[0].keep_ratio_target == one.keep_ratio_target and few.keep_ratio == one.keep_ratio
        assert len(few.mask_EL) == 2 and np.array_equal(few.macs_T, one.macs_T)
    assert len(experts.used_by_any) > len(experts.used)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_at_and_apply_take_the_rung_that_is_asked(kind):
    model = (make_dit(layers=6) if kind == "dit" else make_unet()).eval()
    experts = chain(model, 8 if kind == "dit" else 16)
    expected = {target: alone(model, experts, target, 700, kind) for target in TARGETS}
    assert len({value.sum().item() for value in expected.values()}) == 3

    def serves(target):
        return torch.equal(call(model, 700, kind), expected[target])

    with experts.apply(model):
        assert serves(0.5)
        with experts.at(0.6) as rung:
            assert rung is experts.ladder[1]
        with experts.at(0.35):
            assert serves(0.35)
            with experts.at(0.9):
                assert serves(0.65)
            assert serves(0.35)
        with pytest.raises(ZeroDivisionError), experts.at(0.35):
            raise ZeroDivisionError
        assert serves(0.5)
        with experts.apply(model, 0.65):
            assert serves(0.65)
        assert serves(0.5)
        experts.apply(model, keep_ratio=0.4)
        assert serves(0.35)
        experts.apply(model)
        assert serves(0.5)
    assert not hasattr(model, "_alter_applied")
    with experts.apply(model, 0.65):
        assert serves(0.65)


def test_a_storm_of_threads_each_at_its_own_rung():
    model = make_dit(layers=6).eval()
    experts = chain(model)
    asked = [(target, t) for target in TARGETS for t in (100, 900)]
    expected = {(target, t): alone(model, experts, target, t) for target, t in asked}
    experts.apply(model)
    default, wrong, start = call(model, 100), [], threading.Barrier(6)

    def storm(first):
        start.wait(60)
        for k in range(30):
            target, t = asked[(first + 5 * k) % len(asked)]
            with experts.at(target):
                if not torch.equal(call(model, t), expected[target, t]):
                    wrong.append((target, t))
            if not torch.equal(call(model, 100), default):
                wrong.append("default")

    threads = [threading.Thread(target=storm, args=(n,)) for n in range(6)]
    with experts.at(0.65):  # of this thread alone
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_tasks_of_one_loop():
    model = make_dit(layers=6).eval()
    experts = chain(model)
    expected = {target: alone(model, experts, target, 700) for target in TARGETS}
    experts.apply(model)

    async def request(target):
        with experts.at(target):
            for _ in range(5):
                await asyncio.sleep(0)
                assert torch.equal(call(model, 700), expected[target])
                assert torch.equal(await asyncio.to_thread(call, model, 700), expected[target])

    async def serve():
        await asyncio.gather(*map(request, 3 * TARGETS))

    asyncio.run(serve())


def test_rungs_of_a_planner():
    """They are on no ladder, and use rows that no rung of it uses."""
    model = make_dit(layers=6).eval()
    experts = chain(model)
    planned = Rung(0.8, np.arange(1000) // 500, steps=10)
    assert set(planned.used) - set(experts.used_by_any)
    expected = [alone(model, experts, planned, t) for t in (100, 900)]
    experts.apply(model)
    with experts.at(planned) as rung:
        assert rung is planned and all(map(torch.equal, (call(model, t) for t in (100, 900)), expected))
    with experts.apply(model, planned):
        assert torch.equal(call(model, 900), expected[1])
    with pytest.raises(InputError, match="not on their ladder"):
        experts.choose(planned)
    for wrong, message in ((Rung(0.5, np.zeros(50, int)), r"of shape \[50\], expected \[1000\]"),
                           (Rung(0.5, np.full(1000, 6)), "one of the experts 0 to 5"),
                           (dataclasses.replace(planned, steps=0), "steps=0"),
                           (dataclasses.replace(planned, error=-1.0), "error=-1.0"),
                           (dataclasses.replace(planned, keep_ratio_target=1.5), "expected a share")):
        with pytest.raises(InputError, match=message):
            experts.at(wrong).__enter__()
    with pytest.raises(InputError, match="expert_T: float64, expected whole numbers"):
        Rung(0.5, np.zeros(1000))
    other = chain(model, seed=1)
    with other.at(other.ladder[0]), pytest.raises(InputError, match="other experts than those that are applied"):
        call(model, 100)
    copied = pickle.loads(pickle.dumps(model))
    for twin in (copied, copy.deepcopy(model)):
        with experts.at(planned):
            assert torch.equal(call(twin, 900), expected[1])


def test_other_ladders_are_others():
    model = make_dit(layers=6)
    experts = chain(model)
    experts.apply(model)
    experts.choose(0.65).apply(model)
    with pytest.raises(InputError, match="others are applied"):
        dataclasses.replace(experts, ladder=experts.ladder[:2]).apply(model)
    chain(model).remove(model)


def test_a_change_of_rung_compiles_nothing():
    torch._dynamo.reset()
    model, twin = make_dit(layers=6).eval(), make_dit(layers=6).eval()
    twin.load_state_dict(model.state_dict())
    experts = chain(model)
    experts.apply(twin)
    experts.compile(model, backend="eager")

    def run(keep_ratio, t):
        with experts.at(keep_ratio):
            return call(model, t), call(twin, t)

    def graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    run(1, 100)
    compiled = graphs()
    assert compiled > 0
    for target in (*TARGETS, Rung(0.8, np.arange(1000) // 500)):
        for t in (100, 900):
            torch.testing.assert_close(*run(target, t))
    experts.apply(model, 0.35)
    call(model, 100)
    assert graphs() == compiled


def test_trimming():
    dense, model, small = (make_dit(layers=6).eval() for _ in range(3))
    for other in (model, small):
        other.load_state_dict(dense.state_dict())
    experts = chain(dense)
    expected = {target: alone(dense, experts, target, 100) for target in TARGETS}
    low = experts.only(0.35)
    for one, backbone in ((experts, model), (low, small)):
        never = ~one.mask_EL[one.used_by_any].any(axis=0)
        lost = sum(p.numel() * 4 for name, out in zip(one.sites, never, strict=True) if out
                   for p in backbone.get_submodule(name).parameters())
        assert 0 <= one.trim(backbone) <= lost  # what the DiT's head reads stays
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    for target in TARGETS:
        with experts.at(target):
            assert torch.equal(call(model, 100), expected[target])
    assert torch.equal(call(small, 100), expected[0.35])
    with experts.at(Rung(1.0, np.zeros(1000, int))), pytest.raises(InputError, match="which this backbone was trimmed"):
        call(model, 100)
    low.remove(small)
    with pytest.raises(InputError, match="which this backbone was trimmed of"):
        experts.apply(small)
    experts.apply(model, 0.65)
    experts.trim(model)
    assert torch.equal(call(model, 100), expected[0.65])  # the rung that was applied


def test_the_table():
    experts = chain(make_dit(layers=6))
    lines = [line.split() for line in experts.table().splitlines()]
    assert lines[0] == ["keep", "ratio", "MACs", "GMACs", "a", "forward", "predicted", "error", "tuned"]
    for line, rung in zip(lines[1:], experts.ladder, strict=True):
        one = experts.choose(rung)
        assert line[:5] == [f"{rung.keep_ratio_target:g}", f"{one.keep_ratio:.1%}", f"{one.macs_mean / 1e9:.4g}",
                            f"{rung.error:.3g}", "yes" if rung.tuned else "no"]
        assert line[5:] == (["chosen"] if rung is experts.rung else [])
    summary = repr(experts)
    some = {int(expert) for rung in experts.ladder for expert in rung.expert_T}
    assert f"2 experts over 6 sites ({len(some) - 2} more in other rungs" in summary
    assert "ladder of 3 rungs:\n" in summary
    more = dataclasses.replace(experts, mask_EL=np.concatenate([experts.mask_EL, experts.mask_EL[:2]]))
    assert f"in other rungs, {8 - len(some)} unused)" in repr(more)
    assert "ladder" not in repr(experts.only()) and "unused" not in repr(experts.only())


def test_the_interval_of_a_prediction_is_stored_and_told(tmp_path):
    experts = chain(make_dit(layers=6))
    known = dataclasses.replace(experts.ladder[0], interval=(0.25, 0.5))
    experts = dataclasses.replace(experts, ladder=(known, *experts.ladder[1:]))
    experts.save_pretrained(tmp_path)
    again = TemporalExperts.from_pretrained(tmp_path)
    assert again.ladder == experts.ladder and again.ladder[0].interval == (0.25, 0.5)
    assert "0.25 to 0.5" in again.table().splitlines()[1] and " to " not in again.table().splitlines()[2]
    with pytest.raises(InputError, match="interval="):
        dataclasses.replace(experts, ladder=(dataclasses.replace(known, interval=(0.5, 0.25)),))
    content = json.loads((tmp_path / "experts.json").read_text())
    for rung in content["ladder"]:  # as before intervals were known
        del rung["interval"]
    (tmp_path / "experts.json").write_text(json.dumps(content))
    assert all(rung.interval is None for rung in TemporalExperts.from_pretrained(tmp_path).ladder)


def measured(rows, edges=(0, 300, 1000)):
    error_MB = np.arange(rows * 2.0).reshape(rows, 2)
    return Measured(edges, error_MB, {"latents": np.array([1.0, 2.0])}, "DDIM", 20, 1.0, samples=8)


def test_building():
    model = make_dit(layers=6)
    experts = chain(model, measured=measured(6))
    assert [rung.keep_ratio_target for rung in experts.ladder] == list(TARGETS) and experts.chosen == 1
    assert not experts.ladder[0].tuned and experts.rung.error == 0.05
    further = chain(model, ladder=(experts.ladder[2], experts.ladder[0]))
    assert further.ladder[1] == Rung(0.5, experts.expert_T) and further.chosen == 1
    few = experts.only(0.35)
    assert np.array_equal(few.measured.error_MB, experts.measured.error_MB[experts.ladder[0].used])
    for changes, message in (
            ({"ladder": (Rung(0.5, np.zeros(1000, int)),)}, "has other routes than expert_T"),
            ({"ladder": (experts.ladder[0], dataclasses.replace(experts.ladder[0], steps=3))}, "ascending keep ratio"),
            ({"ladder": (Rung(0.6, np.zeros(10, int)),)}, r"of shape \[10\]|of shape \[1000\]"),
            ({"measured": measured(5)}, "measured.error: has 5 rows, and there are 6 masks"),
            ({"measured": measured(6, (0, 300, 900))}, "measured.edges: expected to ascend from 0 to 1000"),
            ({"measured": measured(6, (0, 0, 1000))}, "measured.edges: expected to ascend")):
        with pytest.raises(InputError, match=message):
            chain(model, **changes)


def test_a_pipeline_loads_at_a_rung(tmp_path):
    folder = save_stable_diffusion(tmp_path / "pipe")
    pipe = load(folder)
    experts = chain(pipe.unet, 16)
    expected = {}
    for target in TARGETS:
        with experts.only(target).apply(pipe):
            expected[target] = draw(pipe)
    experts.save_pretrained(folder)
    for asked, target in ((None, 0.5), (0.65, 0.65), (0.45, 0.35)):
        assert np.array_equal(draw(load_pipeline(folder, keep_ratio=asked)), expected[target])
    with experts.apply(pipe), experts.at(0.9):
        assert np.array_equal(draw(pipe), expected[0.65])
    with pytest.raises(InputError, match="below the lowest rung"):
        load_pipeline(folder, keep_ratio=0.2)
