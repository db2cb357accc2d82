import copy

import numpy as np
import pytest
import torch
from conftest import make_dit, make_inputs, make_model
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)

from alter import InputError, TemporalExperts
from alter.backbones.cost import count_cost
from alter.backbones.gates import HardRows, Simulator


def make_experts(kind="dit"):
    model = make_model(kind)
    cost = count_cost(model, 8 if kind == "dit" else 16)
    mask_EL = np.random.default_rng(0).random((2, len(cost.sites))) < 0.5
    expert_T = (np.arange(1000) >= 400).astype(int)
    return TemporalExperts.build(mask_EL, expert_T, cost, 0.5, "total")


def test_it_is_saved_and_loaded(tmp_path):
    experts = make_experts()
    experts.save_pretrained(tmp_path)
    loaded = TemporalExperts.from_pretrained(tmp_path)
    assert np.array_equal(loaded.mask_EL, experts.mask_EL) and np.array_equal(loaded.expert_T, experts.expert_T)
    assert loaded.keep_ratio == experts.keep_ratio and loaded.sites == experts.sites and loaded.macs == experts.macs


def test_keep_ratio_by_hand():
    experts = make_experts()
    removed = sum((400 if expert == 0 else 600) * macs for expert in (0, 1)
                  for macs, kept in zip(experts.macs, experts.mask_EL[expert], strict=True) if not kept)
    assert experts.keep_ratio == pytest.approx(1 - removed / 1000 / experts.macs_total)


@pytest.mark.parametrize("kind", ["dit", "unet"])
@pytest.mark.parametrize("timestep", [399, 400, 400.4, 399.6, -0.3, 999.7])
def test_apply_uses_the_expert_of_the_nearest_training_timestep(kind, timestep):
    experts, model, gated = make_experts(kind), make_model(kind), make_model(kind)
    (sample, _), conditioning = make_inputs(kind)
    mask = torch.from_numpy(experts.mask_EL[0 if timestep < 399.5 else 1])
    simulator = Simulator(gated)
    value = torch.tensor([float(timestep)]).expand(len(sample)) if kind == "dit" else timestep
    with simulator.use(HardRows(mask[None])):
        expected = gated(sample, value, **conditioning).sample
    dense = model(sample, value, **conditioning).sample
    experts.apply(model)
    assert torch.equal(model(sample, timestep=value, **conditioning).sample, expected)
    experts.remove(model)
    assert torch.equal(model(sample, value, **conditioning).sample, dense)


def test_a_batch_of_different_timesteps():
    experts, model = make_experts(), make_model("dit")
    (sample, _), conditioning = make_inputs("dit")
    timesteps = torch.tensor([0, 999, 399, 400, 10])
    experts.apply(model)
    together = model(sample, timesteps, **conditioning).sample
    for i in range(5):
        alone = model(sample[i : i + 1], timesteps[i : i + 1], class_labels=conditioning["class_labels"][i : i + 1])
        assert torch.allclose(together[i : i + 1], alone.sample, atol=1e-5)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_gates_of_applied_experts_may_be_used_otherwise(kind):
    """Other rows, gradients and copies, between forwards that the timestep rules."""
    experts, model = make_experts(kind), make_model(kind)
    (sample, _), conditioning = make_inputs(kind)
    timesteps = [torch.full((len(sample),), value) for value in (100, 900)]
    dense = model(sample, timesteps[0], **conditioning).sample
    expected = []
    for expert, timestep in enumerate(timesteps):
        simulator = Simulator(model)
        with simulator.use(HardRows(torch.from_numpy(experts.mask_EL[expert])[None])):
            expected.append(model(sample, timestep, **conditioning).sample)
        simulator.remove()
    with experts.apply(model):
        with torch.no_grad():
            for timestep, result in zip(timesteps, expected, strict=True):
                assert torch.equal(model(sample, timestep, **conditioning).sample, result)
            copied = copy.deepcopy(model)
            assert torch.equal(copied(sample, timesteps[0], **conditioning).sample, expected[0])
            assert torch.equal(model(sample, timesteps[1], **conditioning).sample, expected[1])
        assert torch.equal(model(sample, timesteps[0], **conditioning).sample, expected[0])  # with gradients
    assert not any(hasattr(layer, "_alter_gate") for layer in model.modules())
    assert torch.equal(model(sample, timesteps[0], **conditioning).sample, dense)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_layers_that_others_patch_meanwhile_stay_patched(kind):
    """tomesd and others put a subclass of a layer's present class in its place."""
    experts, model, calls = make_experts(kind), make_model(kind), []
    (sample, _), conditioning = make_inputs(kind)

    def draw(value):
        return model(sample, torch.full((len(sample),), value), **conditioning).sample

    with torch.no_grad(), experts.apply(model):
        expected = [draw(100), draw(900)]
        site = next(site for site, kept in enumerate(experts.mask_EL.T) if kept.tolist() == [True, False])
        layer = model.get_submodule(experts.sites[site])
        for value in (100, 900):  # while it runs, and while it is skipped
            draw(value)
            cls = type(layer)
            layer.__class__ = type("Patched", (cls,), {"forward": lambda self, *args, cls=cls, **kwargs: (
                calls.append(1), cls.forward(self, *args, **kwargs))[1]})
            calls.clear()
            assert all(torch.equal(draw(t), result) for _ in range(2)
                       for t, result in zip((100, 900), expected, strict=True))
            assert len(calls) == (2 if value == 100 else 4)


def test_data_parallel_replicas_are_refused():
    experts, model = make_experts(), make_model("dit")
    (sample, _), conditioning = make_inputs("dit")
    with experts.apply(model):
        replica = model._replicate_for_data_parallel()
        with pytest.raises(InputError, match="use a process each GPU"):
            replica(sample, torch.full((len(sample),), 100), **conditioning)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_activations_are_recomputed_by_the_expert_of_their_forward(kind):
    experts, gradients = make_experts(kind), []
    (sample, _), conditioning = make_inputs(kind)
    for checkpointing in (False, True):
        model = make_model(kind).train().requires_grad_(True)
        with experts.apply(model):
            if checkpointing:
                model._alter_applied.simulator.enable_gradient_checkpointing()
            outputs = [model(sample, torch.full((len(sample),), value), **conditioning).sample for value in (100, 900)]
            with torch.no_grad():
                model(sample, torch.full((len(sample),), 900), **conditioning)
            sum(output.square().sum() for output in outputs).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        if plain is not None:
            torch.testing.assert_close(recomputed, plain)


def test_wrong_models_are_refused():
    experts = make_experts()
    with pytest.raises(InputError, match="4 sites are not the 3"):
        experts.apply(make_dit(layers=3))
    with pytest.raises(InputError, match="none are applied"):
        experts.remove(make_dit())
    with pytest.raises(InputError, match="no unet or transformer"):
        experts.apply(object())
    model = make_dit()
    Simulator(model)
    with pytest.raises(InputError, match="already has gates"):
        experts.apply(model)


def test_a_folder_without_experts_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no experts.json"):
        TemporalExperts.from_pretrained(tmp_path)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_dit_pipeline_runs_exactly_the_sites_of_each_steps_expert(scheduler, guidance_scale):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2)
    pipe = DiTPipeline(transformer, vae, scheduler())
    pipe.set_progress_bar_config(disable=True)
    experts = make_experts()
    experts.apply(pipe)
    calls = []
    for i, block in enumerate(transformer.transformer_blocks):
        block.register_forward_pre_hook(lambda module, args, i=i: calls.append(i))
    seen = []
    transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(kwargs["timestep"].reshape(-1)[0])), with_kwargs=True)
    pipe([1, 2], num_inference_steps=7, guidance_scale=guidance_scale, output_type="np")
    assert len(seen) == 7
    rows = [experts.mask_EL[experts.expert_T[round(t)]] for t in seen]
    assert calls == [i for row in rows for i in np.flatnonzero(row)]
    experts.remove(pipe)
