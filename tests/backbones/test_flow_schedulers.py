"""Flow matching: what a pipeline's scheduler says of training, which timesteps it visits, and sampling by it."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import make_dit, save_pipeline
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn
from zoo import of_the_newest

from alter import InputError
from alter.backbones.noising import Betas, Flow
from alter.backbones.sampling import sample_latents
from alter.backbones.schedules import (
    hands_sigmas,
    image_tokens,
    load_scheduler,
    make_noising,
    make_sampler,
    mean_shift,
    set_timesteps,
    solver_at,
    visited_rows,
)
from alter.common.config import FlowConfig
from alter.training.setup.describe import describe_run
from alter.training.setup.plan import check

EULER = "FlowMatchEulerDiscreteScheduler"
FLUX = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
        "max_image_seq_len": 4096}
QWEN = {**FLUX, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
OTHERS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def written(folder, **config):
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": EULER, **config}))
    return folder


@pytest.fixture
def flow_config(small_config):
    """A factory: `small_config("dit")` on a pipeline of flow matching."""
    def make(**changes):
        config = small_config("dit", **changes)
        written(Path(config.backbone.pretrained), shift=3.0)
        return config

    return make


@pytest.mark.parametrize("name, settings", [
    (EULER, {"shift": 3.0}), (EULER, {}), ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchLCMScheduler", {"shift": 3.0}), ("UniPCMultistepScheduler", {"flow_shift": 5.0, **OTHERS}),
    ("DPMSolverMultistepScheduler", {"flow_shift": 3.0, **OTHERS}), ("DEISMultistepScheduler", OTHERS)])
def test_the_shift_is_that_of_the_pipelines_scheduler(tmp_path, name, settings):
    scheduler = load_scheduler(written(tmp_path, **{**settings, "_class_name": name, "num_train_timesteps": 500}))
    assert type(scheduler) is getattr(diffusers, name)
    noising = make_noising(scheduler, 256)
    assert noising == Flow(500, settings.get("shift", settings.get("flow_shift", 1.0)))
    scheduler.set_timesteps(50)
    between = scheduler.timesteps.double().unique() / 500
    spaces = (between / (noising.shift - (noising.shift - 1) * between)).diff()  # even but for rounding, without shift
    assert spaces.std() < 0.2 * spaces.mean()
    assert make_noising(scheduler, 256, FlowConfig(shift=7.0, density="mode")) == Flow(500, 7.0, "mode")


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("settings", [FLUX, QWEN], ids=["FLUX.1-dev", "Qwen-Image"])
@pytest.mark.parametrize("tokens", [64, 1024, 4096])
def test_a_dynamic_shift_is_that_of_diffusers_pipelines(tmp_path, settings, kind, tokens):
    scheduler = load_scheduler(written(tmp_path, **{**settings, "time_shift_type": kind}))
    mu = calculate_shift(tokens, settings["base_image_seq_len"], settings["max_image_seq_len"],
                         settings["base_shift"], settings["max_shift"])
    assert mean_shift(scheduler.config, tokens) == pytest.approx(mu)
    sigmas = torch.linspace(1, 0.05, 20, dtype=torch.float64)
    expected = scheduler.time_shift(mu, 1.0, sigmas)
    assert torch.allclose(make_noising(scheduler, tokens).shifted(sigmas), expected)
    scheduler.set_timesteps(sigmas=sigmas.numpy(), mu=mu)
    rows = scheduler.timesteps.round().clamp(0, 999).long().tolist()
    assert visited_rows(load_scheduler(tmp_path), 20, tokens, even=True).tolist() == rows


@pytest.mark.parametrize("cls, even", [("FluxPipeline", True), ("QwenImagePipeline", True),
                                       pytest.param("ZImagePipeline", True, marks=of_the_newest),
                                       ("HunyuanVideoPipeline", True), ("StableDiffusion3Pipeline", False),
                                       ("WanPipeline", False), ("NoSuchPipeline", False)])
def test_which_pipelines_give_their_scheduler_even_sigmas(tmp_path, cls, even):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": cls}))
    assert hands_sigmas(tmp_path) == even


def test_a_few_step_model_visits_what_its_pipeline_visits(tmp_path):
    schnell = load_scheduler(written(tmp_path, shift=1.0))
    assert visited_rows(schnell, 4, 4096, even=True).tolist() == [999, 750, 500, 250]
    assert visited_rows(schnell, 4, 4096).tolist() == [999, 667, 334, 1]


def test_tokens_of_images_videos_and_packed_latents():
    assert image_tokens((16, 128, 128), 2) == 4096 == image_tokens((4096, 64), 1)
    assert image_tokens((16, 5, 32, 64), (1, 2, 2)) == 5 * 16 * 32 and image_tokens((4, 8, 8), None) == 64


@pytest.mark.parametrize("config, message", [
    ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "prediction_type='epsilon'"),
    ({"invert_sigmas": True}, "invert_sigmas=True"),
    ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "no schedule of flow matching")])
def test_flows_that_alter_cannot_train_are_refused(tmp_path, config, message):
    with pytest.raises(InputError, match=message) as caught:
        load_scheduler(written(tmp_path, **config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler",
                                  "FlowMatchHeunDiscreteScheduler"])
def test_another_sampler_keeps_the_flow(tmp_path, name):
    scheduler = load_scheduler(written(tmp_path, **FLUX))
    solver = make_sampler(name, "", scheduler, 1024)
    set_timesteps(solver, 10, 1024)
    sigmas = solver.timesteps.double().unique() / 1000
    assert 0.98 < sigmas.max() <= 1 and sigmas.median() > 0.6  # shifted to more noise
    assert make_noising(solver, 1024).shift == pytest.approx(make_noising(scheduler, 1024).shift)


def test_samplers_of_the_other_noise_are_refused(flow_config, small_config):
    with pytest.raises(InputError, match="budget.sampler='DDIMScheduler': it is made for another noising than by flow"):
        check(flow_config(budget={"sampler": "DDIMScheduler"}), 1)
    check(flow_config(budget={"sampler": "UniPCMultistepScheduler"}), 1)


def test_settings_of_the_other_noise_are_refused(flow_config, small_config):
    given = {"loss": {"min_snr_gamma": 5.0}, "train": {"noise_offset": 0.1}}
    with pytest.raises(InputError) as caught:
        check(flow_config(**given), 1)
    said = str(caught.value).splitlines()
    assert len(said) == 2 and "loss.min_snr_gamma=5.0: weighs noise by betas" in said[0]
    assert "train.noise_offset=0.1" in said[1]
    written(Path(small_config("dit").backbone.pretrained), _class_name="DDPMScheduler")
    check(small_config("dit", **given), 1)
    with pytest.raises(InputError, match="flow.density='mode': is for flow matching, and the pipeline noises by betas"):
        check(small_config("dit", flow={"density": "mode"}), 1)


def test_the_plan_says_by_which_timesteps_the_budget_goes(flow_config):
    said = describe_run(flow_config())
    assert f"noise: flow matching ({EULER}), density uniform, shift 3, weighting none" in said
    assert f"averaged over the timesteps of 20 steps of the pipeline's {EULER}; 3 experts" in said
    assert "averaged" not in describe_run(flow_config(budget={"sampler": "uniform"}))
    assert "8 steps of UniPCMultistepScheduler" in describe_run(
        flow_config(budget={"sampler": "UniPCMultistepScheduler", "sampling_steps": 8}))


class Straight(nn.Module):
    """A backbone that knows its samples: the flow to each is straight. Guided ones are twice as far."""

    def __init__(self, samples):
        super().__init__()
        self.config, self.weight = {"patch_size": 2}, nn.Parameter(torch.ones(()))
        self.samples = samples

    def forward(self, latents, timestep, which):
        sigma = timestep.view(-1, 1, 1, 1) / 1000
        output = diffusers.models.modeling_outputs.Transformer2DModelOutput
        return output((latents - self.samples[which] * (which >= 0).view(-1, 1, 1, 1)) / sigma)


@pytest.mark.parametrize("settings", [{"shift": 3.0}, FLUX], ids=["static", "dynamic"])
def test_sampling_follows_the_flow_to_its_end(tmp_path, settings):
    samples = torch.randn(3, 4, 8, 8)
    which = {"which": torch.arange(3)}, {"which": torch.full((3,), -1)}
    scheduler = load_scheduler(written(tmp_path, **settings))
    for scale in (1.0, 2.5):
        found = sample_latents(Straight(samples), scheduler, (4, 8, 8), *which, steps=6, seed=0, guidance_scale=scale)
        if scale == 1:
            assert torch.allclose(found, samples, atol=1e-4)
        else:  # the guided flow ends at 0 + 2.5·(sample - 0)
            assert torch.allclose(found, 2.5 * samples, atol=1e-3)


def test_solvers_at_given_timesteps():
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), DDPMScheduler()):
        assert solver_at(scheduler, [875, 625, 375, 125]).timesteps.tolist() == [875, 625, 375, 125]
    assert isinstance(make_noising(DDPMScheduler(), 1), Betas)


def test_a_pipelines_samples_are_those_of_sample_latents(tmp_path):
    """Euler's method by hand on a DiT."""
    model = make_dit().eval()
    scheduler = load_scheduler(written(save_pipeline(tmp_path / "dit", model), shift=3.0))
    labels, nothing = torch.tensor([3, 7]), torch.tensor([10, 10])
    found = sample_latents(model, scheduler, (1, 8, 8), {"class_labels": labels}, {"class_labels": nothing}, 4, 0, 2.0)
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    raw = np.linspace(1, 3 * 0.001 / (1 + 2 * 0.001), 4)
    sigmas = [*(3 * raw / (1 + 2 * raw)), 0.0]
    for now, then in zip(sigmas, sigmas[1:], strict=False):
        with torch.no_grad():
            given, free = (model(latents, timestep=torch.full((2,), 1000 * now), class_labels=of).sample
                           for of in (labels, nothing))
        latents = latents + (then - now) * (free + 2 * (given - free))
    assert torch.allclose(found, latents.float(), atol=1e-4)
