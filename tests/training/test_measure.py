import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_dit
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from scipy.optimize import linprog

from alter import InputError
from alter.method.budget import Budget
from alter.training.probe import Probe
from alter.method.sensitivity import Sensitivity, allocate, verdict
from alter.training.measure import measure_sensitivity
from alter.evaluation.report.records import read_sensitivity
from alter.training.setup.parts import build

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import sensitivity  # noqa: E402


def table_of(error_LB, denoise=1.0, steps=1000):
    error_LB = np.array(error_LB, dtype=float)
    layers, bins = error_LB.shape
    edges = tuple(int(edge) for edge in np.linspace(0, steps, bins + 1))
    names = tuple(f"layer.{i}" for i in range(layers))
    return Sensitivity(names, edges, 4, error_LB, np.full(bins, denoise), np.ones(bins))


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_errors_are_those_of_models_without_the_layer(small_config, kind):
    """Reference: the gates removed, and the layer's forward replaced by one that returns its input."""
    config = small_config(kind)
    parts = build(config)
    samples, bins = 4, 3
    table = measure_sensitivity(config, parts, bins, samples, batch_size=2)
    again = measure_sensitivity(config, parts, bins, samples, batch_size=2)
    assert np.array_equal(table.error_LB, again.error_LB)
    assert table.edges[0] == 0 and table.edges[-1] == 1000 and table.error_LB.shape == (len(table.sites), bins)

    seen, model = {}, parts.backbone

    def note(module, arguments, keywords):
        seen.setdefault("calls", []).append((arguments, keywords))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    measure_sensitivity(config, parts, bins, samples, batch_size=2, trials=0)
    handle.remove()
    parts.simulator.remove()
    model.eval()
    calls = seen["calls"][: bins * 2 * (len(table.sites) + 1) : len(table.sites) + 1]  # the dense forwards
    assert len(calls) == 2 * bins
    for layer in (0, len(table.sites) - 1):
        expected = np.zeros(bins)
        for k, (arguments, keywords) in enumerate(calls):
            low, high = table.edges[k // 2], table.edges[k // 2 + 1]
            assert all(low <= int(t) < high for t in keywords["timestep"])
            with torch.no_grad():
                dense = model(*arguments, **keywords).sample
                module = model.get_submodule(table.sites[layer])
                module.forward = lambda hidden, *rest, **named: hidden
                without = model(*arguments, **keywords).sample
                del module.forward
            expected[k // 2] += (without - dense).pow(2).flatten(1).mean(1).sum().item()
        assert np.allclose(table.error_LB[layer], expected / samples, rtol=1e-4), table.sites[layer]


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_the_response_is_that_of_samples_drawn_without_the_layer(small_config, kind):
    """Reference: the gates removed, the layer's forward replaced in one bin, and every step of sampling run anew."""
    config = small_config(kind)
    parts = build(config)
    probe, sites, edges = Probe(config, parts, 3, batch_size=3), len(parts.simulator.sites), [0, 500, 1000]
    mask_L = np.arange(sites) != 1
    found = probe.response(mask_L[None], edges)
    (_, _, noise, conditioning), = probe._batches
    layer = parts.backbone.get_submodule(parts.simulator.sites[1].path)
    parts.simulator.remove()

    @torch.no_grad()
    def draw(where):
        solver = DPMSolverMultistepScheduler.from_config(parts.scheduler.config)
        solver.set_timesteps(timesteps=[875, 625, 375, 125])  # two in each bin
        latents, outputs = noise, []
        for timestep in solver.timesteps:
            if int(timestep) in where:
                layer.forward = lambda hidden, *rest, **named: hidden
            outputs.append((int(timestep), parts.backbone(latents, timestep.expand(3), **conditioning).sample))
            layer.__dict__.pop("forward", None)
            latents = solver.step(outputs[-1][1][:, : latents.shape[1]], timestep, latents).prev_sample
        return latents, dict(outputs)

    dense, known = draw(range(0))
    for b, bin_ in enumerate((range(500), range(500, 1000))):
        samples, outputs = draw(bin_)
        first = max(timestep for timestep in outputs if timestep in bin_)
        expected = (samples - dense).square().mean() / (outputs[first] - known[first]).square().mean()
        assert found[b] == pytest.approx(expected.item(), rel=1e-3), b


def test_errors_are_weighted_by_their_timestep(small_config):
    config = small_config("dit")
    parts = build(config)
    probe, masks = Probe(config, parts, 4, batch_size=2), np.ones((1, 4), dtype=bool)
    masks[0, 2] = False
    parts_of_range = [probe.errors(masks, low, high)[0][0] for low, high in ((0, 250), (0, 500))]
    weight_T = np.where(np.arange(1000) < 250, 3.0, 1.0)
    assert probe.errors(masks, 0, 250, weight_T)[0][0] == pytest.approx(3 * parts_of_range[0])
    assert parts_of_range[1] < probe.errors(masks, 0, 500, weight_T)[0][0] < 3 * parts_of_range[1]


def test_the_response_decides_which_timesteps_keep_layers():
    flat = table_of([[2, 1], [2, 1], [4, 2], [4, 2]])
    budget = Budget(np.full(4, 0.25), 0.5, "prunable")
    tilted = dataclasses.replace(flat, response_B=np.array([1.0, 10.0]))
    for table, more in ((flat, 0), (tilted, 1)):
        mask_EL, expert_T = allocate(table, budget, 2)
        kept_B = mask_EL[expert_T[[0, 999]]].sum(1)
        assert kept_B.sum() == 4 and kept_B[more] >= kept_B[1 - more]
        assert table.predicted_effect(mask_EL, expert_T) <= table.predicted_effect(np.array([[0, 0, 1, 1]], bool),
                                                                                  np.zeros(1000, int))
    assert tilted.gain(budget, 2) > flat.gain(budget, 2)


def test_a_learned_variance_is_left_out(small_config):
    """The output's further channels neither count as error nor disturb the solver."""
    config = small_config("dit")
    parts = build(config)
    wide = make_dit(learned_sigma=True)
    scheduler = DDPMScheduler.from_config(parts.scheduler.config, variance_type="learned_range")
    parts = dataclasses.replace(parts, backbone=wide, teacher=None, scheduler=scheduler)
    probe, masks = Probe(config, parts, 2), np.arange(4)[None] != 1
    before = probe.errors(masks, 0, 1000)[0], probe.response(masks, np.array([0, 500, 1000]))
    channels = wide.config.in_channels
    with torch.no_grad():  # of each patch's output values, those of the further channels
        wide.proj_out_2.weight.view(-1, 2 * channels, wide.proj_out_2.in_features)[:, channels:] += 1
    after = probe.errors(masks, 0, 1000)[0], probe.response(masks, np.array([0, 500, 1000]))
    assert np.array_equal(before[0], after[0]) and np.array_equal(before[1], after[1])


def test_a_mask_that_changes_nothing_has_response_one(small_config):
    config = small_config("dit")
    parts = build(config)
    everything = np.ones((1, len(parts.simulator.sites)), dtype=bool)
    assert Probe(config, parts, 2).response(everything, [0, 500, 1000]).tolist() == [1, 1]


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


def test_the_script_writes_a_table_that_loads(small_config, tmp_path, monkeypatch, capsys):
    from alter.common.config import save_config

    save_config(small_config("dit"), tmp_path / "c.yaml")
    monkeypatch.setattr(sys, "argv", ["sensitivity.py", "--config", str(tmp_path / "c.yaml"), "--out",
                                      str(tmp_path / "out"), "--bins", "4", "--samples", "2"])
    assert sensitivity.main() == 0
    said = capsys.readouterr().out
    assert "The ranking of the layers is" in said
    table = read_sensitivity(tmp_path / "out/sensitivity.json")
    assert table.error_LB.shape == (make_dit().config.num_layers, 4) and (table.error_LB > 0).all()
    (line,) = [line for line in said.splitlines() if line.startswith(table.sites[1])]
    cells = [f"{table.error_LB[1, b]:.2e} ({table.error_LB[1, b] / table.denoise_B[b]:.2g})" for b in range(4)]
    assert line.split() == [table.sites[1], *" ".join(cells).split()]
    assert (tmp_path / "out/sensitivity.png").stat().st_size > 5000
    content = json.loads((tmp_path / "out/sensitivity.json").read_text())
    (tmp_path / "bad.json").write_text(json.dumps({**content, "alter_sensitivity": 1}))
    with pytest.raises(InputError, match="no sensitivity table"):
        read_sensitivity(tmp_path / "bad.json")
