"""Sensitivities as they are measured, against models without the layer; and a search that starts near their masks."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import make_dit
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from helpers import run_script

import alter.training.search.hypernetwork
from alter import InputError, TemporalExperts, train
from alter.common.load import save_config
from alter.evaluation.report.records import read_sensitivity
from alter.method.sensitivity import start_near
from alter.training.measure import measure_sensitivity
from alter.training.probe import Probe
from alter.training.setup.parts import build


@pytest.mark.parametrize("kind", ["dit", pytest.param("unet", marks=pytest.mark.slow)])
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
    found = probe.amplification(mask_L[None], edges)
    (_, _, noise, conditioning, _), = probe._batches
    layer = parts.backbone.get_submodule(parts.simulator.sites[1].name)
    parts.simulator.remove()

    @torch.no_grad()
    def draw(where):
        solver = DPMSolverMultistepScheduler.from_config(parts.scheduler.config)
        solver.set_timesteps(timesteps=[875, 625, 375, 125])  # two in each bin
        latents, changes = noise, []
        for timestep in solver.timesteps:
            output = dense = parts.backbone(latents, timestep.expand(3), **conditioning).sample
            if int(timestep) in where:
                layer.forward = lambda hidden, *rest, **named: hidden
                output = parts.backbone(latents, timestep.expand(3), **conditioning).sample
                layer.__dict__.pop("forward", None)
                changes.append((output - dense).square().mean().item())
            latents = solver.step(output[:, : latents.shape[1]], timestep, latents).prev_sample
        return latents, changes

    dense, _ = draw(range(0))
    for b, bin_ in enumerate((range(500), range(500, 1000))):
        samples, changes = draw(bin_)
        expected = (samples - dense).square().mean().item() / np.mean(changes)
        assert len(changes) == 2 and found[b] == pytest.approx(expected, rel=1e-3), b


def test_errors_are_weighted_by_their_timestep(small_config):
    config = small_config("dit")
    parts = build(config)
    probe, masks = Probe(config, parts, 4, batch_size=2), np.ones((1, 4), dtype=bool)
    masks[0, 2] = False
    parts_of_range = [probe.errors(masks, low, high)[0][0] for low, high in ((0, 250), (0, 500))]
    weight_T = np.where(np.arange(1000) < 250, 3.0, 1.0)
    assert probe.errors(masks, 0, 250, weight_T)[0][0] == pytest.approx(3 * parts_of_range[0])
    assert parts_of_range[1] < probe.errors(masks, 0, 500, weight_T)[0][0] < 3 * parts_of_range[1]


def test_a_learned_variance_is_left_out(small_config):
    """The output's further channels neither count as error nor disturb the solver."""
    config = small_config("dit")
    parts = build(config)
    wide = make_dit(learned_sigma=True)
    scheduler = DDPMScheduler.from_config(parts.scheduler.config, variance_type="learned_range")
    parts = dataclasses.replace(parts, backbone=wide, teacher=None, scheduler=scheduler)
    probe, masks = Probe(config, parts, 2), np.arange(4)[None] != 1
    before = probe.errors(masks, 0, 1000)[0], probe.amplification(masks, np.array([0, 500, 1000]))
    channels = wide.config.in_channels
    with torch.no_grad():  # of each patch's output values, those of the further channels
        wide.proj_out_2.weight.view(-1, 2 * channels, wide.proj_out_2.in_features)[:, channels:] += 1
    after = probe.errors(masks, 0, 1000)[0], probe.amplification(masks, np.array([0, 500, 1000]))
    assert np.array_equal(before[0], after[0]) and np.array_equal(before[1], after[1])


def test_a_mask_that_changes_nothing_has_response_one(small_config):
    config = small_config("dit")
    parts = build(config)
    everything = np.ones((1, len(parts.simulator.sites)), dtype=bool)
    assert Probe(config, parts, 2).amplification(everything, [0, 500, 1000]).tolist() == [1, 1]


def test_the_script_writes_a_table_that_loads(small_config, tmp_path):
    save_config(small_config("dit"), tmp_path / "c.yaml")
    done = run_script("sensitivity", "--config", tmp_path / "c.yaml", "--out", tmp_path / "out", "--bins", "4",
                      "--samples", "2")
    assert done.returncode == 0, done.stderr
    said = done.stdout
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


def test_a_search_starts_at_the_masks_of_the_table(small_config, monkeypatch):
    """Whatever the codes say, a large offset makes them the most probable masks of every expert, at the budget."""
    config = small_config("dit", experts={"count": 3, "start": "greedy", "offset": 20.0},
                          budget={"keep_ratio": 0.5, "over": "prunable"})
    parts = build(config)
    worth_L = np.array([1.0, 4.0, 2.0, 3.0])

    def errors(self, masks, low, high, weight_T=None):  # in place of forwards: what the absent layers are worth
        return np.array([worth_L[~mask].sum() for mask in masks]), 1.0

    monkeypatch.setattr(Probe, "errors", errors)
    start_near(measure_sensitivity(config, parts, samples=4), parts.budget, parts.hypernetwork)
    logits = parts.hypernetwork()
    assert logits.mask_EL.gt(0).tolist() == [[False, True, False, True]] * 3
    assert parts.budget.expected(logits).item() == pytest.approx(0.5, abs=1e-4)


def test_a_run_that_starts_greedily_is_resumed_without_measuring_again(small_config, tmp_path, monkeypatch):
    changes = {"experts": {"count": 2, "start": "greedy", "offset": 20.0}, "output_dir": str(tmp_path / "run"),
               "optim": {"hypernetwork_lr": 1e-9}, "budget": {"keep_ratio": 0.5, "over": "prunable"}}
    run = train(small_config("dit", checkpoint={"every": 1, "keep": 10}, **changes)).run_dir
    first = TemporalExperts.from_pretrained(run / "final").mask_EL
    monkeypatch.setattr(alter.training.search.hypernetwork, "measure_sensitivity", None)
    train(small_config("dit", resume=str(run / "checkpoints/step-000001"), **changes))
    assert np.array_equal(TemporalExperts.from_pretrained(run / "final").mask_EL, first)
    assert first.sum(1).tolist() == [2, 2] and (first == first[0]).all()
    assert read_sensitivity(run / "sensitivity.json").samples == 4  # as conftest.py has it


@pytest.mark.parametrize("changes", [{"experts": {"start": "greedy", "offset": 0.0}},
                                     {"experts": {"start": "greedy"}, "budget": {"descent": 0.5}}])
def test_a_start_that_would_be_undone_is_refused(small_config, changes):
    with pytest.raises(InputError, match="experts.start=greedy with experts.offset"):
        small_config("dit", **changes)
