"""What the elastic search measures, against greedy removal tried in full and samplers and layers run by hand."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_dit
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import alter.training.probe
import alter.training.search.elastic as elastic
import alter.training.search.measuring as measuring
from alter.backbones.family import predict
from alter.backbones.gates import HardRows
from alter.backbones.noising import Flow, edges_of
from alter.method.budget import Budget, timestep_weights
from alter.method.measured import forwards
from alter.training.probe import Probe
from alter.training.search.measuring import (
    early_response,
    measure_response,
    order_layers,
    residuals,
    sampler_of,
    views_of,
)
from alter.training.setup.parts import build

LATENTS = {"latents": lambda latents, *_: latents}
ALWAYS = np.ones((1, 4), dtype=bool), np.zeros(1000, dtype=np.int64)


@pytest.mark.parametrize("kind, least, span", [("dit", 0.0, (0, 1000)), ("dit", 0.5, (0, 1000)),
                                               ("dit", 0.0, (250, 400)), ("unet", 0.95, (0, 1000))])
def test_the_order_is_that_of_trying_every_layer(small_config, monkeypatch, kind, least, span):
    """Of the DiT, of equal layers, and of the UNet, whose layers cost from 1% to 9%."""
    config = small_config(kind)
    parts = build(config)
    probe, share_L = Probe(config, parts, 2), parts.cost.share_L / parts.cost.share_L.sum()
    weight_T = np.linspace(2, 1, 1000)
    monkeypatch.setattr(measuring, "CANDIDATES", 100)
    found = order_layers(probe, parts.budget, least, weight_T, *span)
    mask_L, before = np.ones(len(share_L), dtype=bool), 0.0
    expected = [mask_L]
    while True:
        tried = {}
        for layer in np.flatnonzero(mask_L):
            without = mask_L & (np.arange(len(mask_L)) != layer)
            if without.any() and share_L[without].sum() >= least - 1e-9:
                error = probe.errors(without[None], *span, weight_T)[0][0]
                tried[(error - before) / share_L[layer]] = without, error
        if not tried:
            break
        mask_L, before = tried[min(tried)]
        expected.append(mask_L)
    assert found[0].all() and np.array_equal(found, expected)
    assert found[-1] @ share_L >= least - 1e-9 and found[-1].any()


def additive(worth_L, share_L, counts):
    """A probe and a budget of layers whose errors add up."""
    def errors(masks, low, high, weight_T):
        assert (low, high) == (0, len(weight_T))
        counts.append(len(masks))
        return (~masks) @ worth_L, 0.0

    return SimpleNamespace(errors=errors), Budget(share_L, 1.0, "total")


def test_the_order_goes_by_error_per_cost_and_measures_a_few_again():
    source, counts = np.random.default_rng(0), []
    worth_L, share_L = source.uniform(size=20), source.dirichlet(np.ones(20)) * 0.9
    found = order_layers(*additive(worth_L, share_L, counts), 0.0, np.ones(10))
    removed = [int(np.flatnonzero(a & ~b)[0]) for a, b in zip(found[:-1], found[1:], strict=True)]
    assert removed == np.argsort(worth_L / share_L)[:19].tolist()
    assert counts == [20] + [min(measuring.CANDIDATES, 20 - k) for k in range(1, 19)]
    assert forwards(20, 0.0, 1, 4, 4, False, 1).order == sum(counts) + len(counts)  # and the dense model each time


def test_a_layer_that_costs_too_much_to_go_lets_the_others():
    """Half of the cost has to stay: the first in line is too dear, and so is all that was measured again with it."""
    worth_L, share_L = np.array([0.1, *np.linspace(1, 2, 9)]), np.array([0.55, *[0.05] * 9])
    found = order_layers(*additive(worth_L, share_L, []), 0.5, np.ones(10))
    assert found[:, 0].all() and found[-1] @ share_L == pytest.approx(0.55) and len(found) == 10


def test_errors_against_the_teacher_are_those_of_models_without_the_layers(small_config):
    config = small_config("dit")
    parts = build(config)
    with torch.no_grad():  # tuned, so that no mask is free of error
        for parameter in parts.backbone.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    masks, edges = np.array([[True] * 4, [True, False, True, False]]), np.array([0, 300, 1000])
    probe = Probe(config, parts, 4, batch_size=3)
    found = probe.against_teacher(masks, edges)
    parts.simulator.remove()
    for b, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        first = 0
        for noisy, timesteps, conditioning, _ in probe.noised(int(low), int(high)):
            assert all(low <= int(t) < high for t in timesteps)
            with torch.no_grad():
                dense = parts.teacher(noisy, timesteps, **conditioning).sample
                for m, mask_L in enumerate(masks):
                    for layer in np.flatnonzero(~mask_L):
                        parts.backbone.transformer_blocks[layer].forward = lambda hidden, *rest, **named: hidden
                    change = (parts.backbone(noisy, timesteps, **conditioning).sample - dense).square()
                    expected = change.flatten(1).mean(1)
                    for block in parts.backbone.transformer_blocks:
                        block.__dict__.pop("forward", None)
                    assert np.allclose(found[m, b, first : first + len(noisy)], expected, rtol=1e-4)
            first += len(noisy)
    assert found.shape == (2, 2, 4) and (found > 0).all()


def test_processes_that_share_a_probe_try_each_a_part_and_have_the_whole(small_config, monkeypatch):
    config = small_config("dit", evaluate={"sampling_steps": 4})
    parts, edges = build(config), np.array([0, 300, 700, 1000])
    masks, steps = np.arange(4) != np.array([[1], [2]]), [range(0, 2), range(2, 4)]

    def measured(**shared):
        probe = Probe(config, parts, 2, **shared)
        moved, caused = probe.displacement(np.repeat(masks[:, None], 4, axis=1), steps, sampler_of(config, parts),
                                           others=[[0, 3]])
        return [probe.errors(masks, 0, 1000)[0], probe.against_teacher(masks, edges), moved["latents"], caused]

    whole, parts_of, summed = measured(), [], []
    monkeypatch.setattr(alter.training.probe, "summed", lambda values: (summed.append(values), values)[1])
    for place in range(2):
        monkeypatch.setattr(alter.training.probe, "PartialState", lambda place=place: SimpleNamespace(
            process_index=place, num_processes=2))
        parts_of.append(measured(shared=True))
    assert len(summed) == 2 * len(whole)
    for one, other, expected in zip(*parts_of, whole, strict=True):
        assert np.array_equal(one + other, expected) and not (one * other).any() and one.any() and other.any()


def test_the_teacher_of_adapters_is_the_backbone_without_them(small_config):
    pytest.importorskip("peft")
    config = small_config("dit", lora={"rank": 2})
    parts = build(config)
    for name, parameter in parts.backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(2))
    masks, edges = np.array([[True] * 4, [True, False, True, True]]), np.array([0, 1000])
    probe, dense = Probe(config, parts, 3), make_dit().eval()
    found = probe.against_teacher(masks, edges)
    (noisy, timesteps, conditioning, _), = probe.noised(0, 1000)
    for m, mask_L in enumerate(masks):
        with torch.no_grad(), parts.simulator.use(HardRows(torch.from_numpy(mask_L)[None], noisy.device)):
            adapted = parts.backbone(noisy, timesteps, **conditioning).sample
        with torch.no_grad():
            expected = (adapted - dense(noisy, timesteps, **conditioning).sample).square().flatten(1).mean(1)
        assert np.allclose(found[m, 0], expected, rtol=1e-4)
    assert (found > 0).all()
    clean, noise = torch.randn(2, *noisy.shape, generator=torch.Generator().manual_seed(3))
    row = torch.tensor(400)
    with torch.no_grad():
        output = dense(parts.noising.noised(clean, noise, row.expand(3)), row.expand(3), **conditioning).sample
    assert torch.allclose(residuals(parts, row, clean, noise, conditioning), output - noise, atol=1e-5)


@pytest.mark.parametrize("guidance, windows", [(1.0, [[0], [1], [2]]), (2.0, [[0], [1], [2]]), (2.0, [[0, 1], [1, 2]])])
def test_the_response_is_that_of_the_sampler_run_by_hand(small_config, monkeypatch, guidance, windows):
    monkeypatch.setattr(measuring, "WINDOWS", len(windows))
    config = small_config("dit", evaluate={"sampling_steps": 3, "guidance_scale": guidance})
    parts = build(config)
    probe, masks = Probe(config, parts, 2), (np.arange(4) != np.array([[1], [2]]), np.arange(1000) // 500)
    edges, error_B = np.array([0, 400, 700, 1000]), np.array([1.0, 2.0, 3.0])
    found, name, steps = measure_response(config, parts, probe, masks, edges, error_B,
                                          LATENTS)
    assert (name, steps) == ("DPMSolverMultistepScheduler", 3)
    (_, _, noise, given, nothing), = probe._batches
    parts.simulator.remove()
    blocks = parts.backbone.transformer_blocks

    @torch.no_grad()
    def sample(masked):
        solver = DPMSolverMultistepScheduler.from_config(parts.scheduler.config)
        solver.set_timesteps(3)
        latents, changes = noise, []
        for step, timestep in enumerate(solver.timesteps):
            there, block = timestep.expand(2), blocks[1 if timestep < 500 else 2]
            whole = parts.backbone(latents, there, **given).sample
            if step in masked:
                block.forward = lambda hidden, *rest, **named: hidden
            output = parts.backbone(latents, there, **given).sample
            base = parts.backbone(latents, there, **nothing).sample
            block.__dict__.pop("forward", None)
            if step in masked:
                changes.append((output - whole).square().mean().item())
            latents = solver.step(base + guidance * (output - base), timestep, latents).prev_sample
        return latents, np.mean(changes or 0), solver.timesteps.numpy()

    dense, _, visited = sample([])

    def moved(masked):
        return (sample(masked)[0] - dense).square().mean().item()

    everywhere = moved([0, 1, 2])
    each = [max(moved(window), everywhere - moved([step for step in range(3) if step not in window])) /
            sample(window)[1] for window in windows]
    middles = (edges[:-1] + edges[1:] - 1) / 2
    shape_B = np.interp(middles, [visited[window].mean() for window in windows][::-1], each[::-1])
    assert found["latents"] @ error_B == pytest.approx(everywhere, rel=1e-3)
    assert found["latents"] / found["latents"].sum() == pytest.approx(shape_B / shape_B.sum(), rel=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_residuals_are_what_a_scheduler_of_diffusers_would_still_remove(small_config, kind):
    config = small_config("dit")
    parts = build(config)
    (_, clean, noise, given, _), = Probe(config, parts, 2)._batches
    alpha_T, step_T = parts.scheduler.alphas_cumprod, torch.arange(1000)
    parts.noising = Flow(1000) if kind == "flow" else dataclasses.replace(parts.noising, prediction_type=kind)
    signal_T, spread_T = (1 - step_T / 1000, step_T / 1000) if kind == "flow" else (alpha_T**0.5, (1 - alpha_T) ** 0.5)
    row = (signal_T - spread_T).abs().argmin()  # half signal, half noise
    noisy = signal_T[row] * clean + spread_T[row] * noise
    with torch.no_grad():
        output = predict(parts.teacher, noisy, parts.noising.at(row.expand(2)), given)[:, : clean.shape[1]]
    if kind == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[row / 1000])
        denoised = scheduler.step(output, scheduler.timesteps[0], noisy).prev_sample
    else:
        scheduler = DDPMScheduler(trained_betas=parts.scheduler.betas.numpy(), prediction_type=kind, clip_sample=False)
        denoised = scheduler.step(output, int(row), noisy).pred_original_sample
    per_latent = signal_T[row] / spread_T[row] if kind == "epsilon" else 1 / spread_T[row]
    found = views_of(config, parts)["residuals"](clean, noise, given)
    assert torch.allclose(found, per_latent * (clean - denoised), atol=1e-4)


@pytest.mark.parametrize("changes, there", [({}, True), ({"within": (0.0, 600.0)}, True),
                                            ({"within": (500.0, 1001.0)}, False), ({"visited": (990.0,)}, False),
                                            ({"visited": (250.0, 1000.0)}, True)])
def test_residuals_need_samples_without_noise_and_a_backbone_that_knows_some(small_config, changes, there):
    config = small_config("dit")
    parts = build(config)
    parts.noising = Flow(1000, **changes)
    assert ("residuals" in views_of(config, parts)) == there


def test_bins_hold_as_many_steps_of_a_flows_sampler_whatever_the_budget_averages(small_config):
    config = small_config("dit", evaluate={"sampling_steps": 10})
    parts, config = build(config), dataclasses.replace(config, budget=dataclasses.replace(
        config.budget, sampler="uniform"))
    parts.noising, parts.scheduler = Flow(1000), FlowMatchEulerDiscreteScheduler(shift=3.0)
    solver = FlowMatchEulerDiscreteScheduler(shift=3.0)
    solver.set_timesteps(10)
    edges = edges_of(parts.noising, 5, elastic._sampled_T(config, parts))
    assert np.histogram(solver.timesteps.numpy().round().clip(0, 999), edges)[0].tolist() == [2] * 5
    assert edges.tolist() != edges_of(parts.noising, 5).tolist()
    as_budget = timestep_weights(1000, solver.timesteps.numpy().round().clip(0, 999).astype(int))
    assert np.add.reduceat(as_budget, edges[:-1]) == pytest.approx(np.full(5, 0.2 * as_budget.sum()))


def test_what_cancels_counts_as_what_it_moves_alone(small_config):
    """Windows without which the others move samples further."""
    config = small_config("dit", evaluate={"sampling_steps": 10})
    displaced = {"latents": np.array([4.0] * 10 + [9.0] + [1.0, 14.0] * 5)}, np.full(11, 2.0)
    found, _, _ = measure_response(config, build(config), SimpleNamespace(displacement=lambda *asked: displaced),
                                   ALWAYS, np.arange(0, 1001, 100), np.ones(10), LATENTS)
    shape_B = found["latents"] / found["latents"].max()
    assert found["latents"].sum() == pytest.approx(9)
    assert 0.5 - 1e-9 <= shape_B.min() < 0.6  # 4 of 8, not -5 of 8


def test_windows_of_steps_are_of_equal_length(small_config):
    """Else those of more steps would seem to answer more to an error."""
    config = small_config("dit", evaluate={"sampling_steps": 13})
    parts, seen, without = build(config), [], []

    def displacement(masks, ranges, prepare, guidance, views, others):
        seen.extend(ranges)
        without.extend(others)
        return {name: np.ones(len(ranges) + len(others)) for name in views}, np.ones(len(ranges))

    measure_response(config, parts, SimpleNamespace(displacement=displacement), ALWAYS,
                     np.array([0, 500, 1000]), np.ones(2), LATENTS)
    *windows, everything = seen
    assert everything == range(13) and {len(window) for window in windows} == {2} and len(windows) == 10
    assert set().union(*windows) == set(range(13))
    assert [sorted({*window, *rest}) for window, rest in zip(windows, without, strict=True)] == [[*range(13)]] * 10
    assert all(len(rest) == 11 for rest in without)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler",
                                  "DPMSolverMultistepScheduler"])
def test_samplers_of_other_scales_and_with_noise_of_their_own(small_config, name):
    config = small_config("dit", budget={"sampler": name, "sampling_steps": 4})
    parts = build(config)
    parts.scheduler = DDPMScheduler.from_config(parts.scheduler.config, variance_type="learned_range")
    probe, prepare = Probe(config, parts, 2), sampler_of(config, parts)
    everything, before = np.ones((1, 4, 4), dtype=bool), torch.get_rng_state()
    moved, caused = probe.displacement(everything, [range(4)], prepare, others=[[0, 3]])
    assert moved["latents"].tolist() == [0, 0] and caused.tolist() == [0]
    assert torch.equal(torch.get_rng_state(), before)
    if name != "EulerDiscreteScheduler":
        return
    latents, outputs, _ = probe._sample(None, (), probe._batches[0], [], prepare(), 1.0)
    (_, _, noise, given, _), = probe._batches
    solver = EulerDiscreteScheduler.from_config(parts.scheduler.config)
    solver.set_timesteps(4)
    expected = noise * solver.init_noise_sigma
    with torch.no_grad():
        for timestep in solver.timesteps:
            scaled = solver.scale_model_input(expected, timestep)
            expected = solver.step(parts.backbone(scaled, timestep.expand(2), **given).sample, timestep,
                                   expected).prev_sample
    assert torch.allclose(latents, expected, atol=1e-4)


def test_the_early_response_weighs_every_timestep(small_config):
    config = small_config("dit")
    weight_T = early_response(Probe(config, build(config), 2), 4)
    assert weight_T.shape == (1000,) and (weight_T > 0).all() and len(set(weight_T)) == 10


def test_a_backbone_that_is_told_its_guidance_has_no_other(small_config):
    config = small_config("dit", evaluate={"guidance_scale": 3.5})
    parts = build(config)
    assert parts.free_guidance == 3.5
    told = dataclasses.replace(parts, backbone=make_dit(), teacher=None)
    told.backbone.register_to_config(guidance_embeds=True)
    assert told.free_guidance == 1.0
