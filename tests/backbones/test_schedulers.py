"""What a pipeline's scheduler says of the training schedule, and which samplers may weigh a budget."""

import json

import diffusers
import pytest
import torch
from conftest import make_dit, save_pipeline
from diffusers import DDPMScheduler

from alter import InputError
from alter.backbones.schedules import load_scheduler, make_noising, make_sampler, make_solver, scheduler_class
from alter.training.setup.plan import check

KINDS = ("epsilon", "v_prediction")


def written(folder, config):
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler",
                                  "EulerDiscreteScheduler", "HeunDiscreteScheduler", "LCMScheduler"])
@pytest.mark.parametrize("changes", [{}, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
                                     {"trained_betas": [0.01, 0.02, 0.03], "num_train_timesteps": 3}], ids=str)
def test_the_betas_are_those_of_the_pipelines_scheduler(tmp_path, name, changes):
    scheduler = getattr(diffusers, name)(**changes)
    scheduler.save_pretrained(tmp_path / "scheduler")
    assert torch.equal(load_scheduler(tmp_path).betas, scheduler.betas)
    written(tmp_path, {"_class_name": name, **changes})  # as a person may write it: the rest is that class's default
    assert torch.equal(load_scheduler(tmp_path).betas, scheduler.betas)


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
@pytest.mark.parametrize("settings", [
    {}, {"snr_shift_scale": 1.0}, {"snr_shift_scale": 3.0, "beta_schedule": "linear"},
    {"snr_shift_scale": 1.0, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"snr_shift_scale": 2.0, "rescale_betas_zero_snr": True}], ids=str)
def test_the_shifted_noise_of_cogvideox(tmp_path, name, settings):
    config = {"_class_name": name, "prediction_type": "v_prediction", **settings}
    own = getattr(diffusers, name)(**{key: value for key, value in config.items() if key != "_class_name"})
    found = load_scheduler(written(tmp_path, config))
    noising = make_noising(found, 1)
    assert noising.prediction_type == "v_prediction" and noising.num_timesteps == 1000
    torch.testing.assert_close(noising.alphas_cumprod.double(), own.alphas_cumprod.double(), rtol=1e-3, atol=1e-7)
    latents, noise, timesteps = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.tensor([0, 500, 999])
    torch.testing.assert_close(noising.noised(latents, noise, timesteps), own.add_noise(latents, noise, timesteps),
                               rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(noising.target(latents, noise, timesteps), own.get_velocity(latents, noise, timesteps),
                               rtol=1e-4, atol=1e-5)
    for other in (make_sampler(name, "", found, 1), make_solver(found, 1)):  # shifted once, not twice
        torch.testing.assert_close(other.alphas_cumprod[:-1].double(), own.alphas_cumprod[:-1].double(), rtol=1e-3,
                                   atol=1e-7)


def test_its_samples_follow_the_shifted_noise(tmp_path):
    """A backbone that knows its sample is led there; by other noise it would not be."""
    found = load_scheduler(written(tmp_path, {"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0}))
    own = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0, clip_sample=False)
    solver, wanted = make_solver(found, 1), torch.randn(1, 4, 8)
    solver.set_timesteps(20)
    latents = torch.randn(1, 4, 8)
    for timestep in solver.timesteps:
        alpha = own.alphas_cumprod[int(timestep)].float()
        latents = solver.step((latents - alpha**0.5 * wanted) / (1 - alpha) ** 0.5, timestep, latents).prev_sample
    torch.testing.assert_close(latents, wanted, rtol=0.02, atol=0.05)


def test_the_shift_is_of_cogvideox_alone(tmp_path):
    config = {"_class_name": "DDIMScheduler", "snr_shift_scale": 3.0}
    with pytest.raises(InputError, match="snr_shift_scale=3.0 is of CogVideoX's schedulers, and not of a DDIM"):
        load_scheduler(written(tmp_path, config))


def test_prediction_types_are_kept_and_unknown_ones_refused(tmp_path):
    for kind in KINDS:
        assert load_scheduler(written(tmp_path, {"_class_name": "DDIMScheduler", "prediction_type": kind})
                              ).config.prediction_type == kind
    with pytest.raises(InputError, match="prediction_type='flow_prediction': use one of epsilon"):
        load_scheduler(written(tmp_path, {"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"}))
    with pytest.raises(InputError, match="no schedule of betas"):
        load_scheduler(written(tmp_path, {"_class_name": "DDPMScheduler", "beta_schedule": "of mine"}))
    (tmp_path / "scheduler/scheduler_config.json").write_text("{")
    with pytest.raises(InputError, match="scheduler_config.json cannot be read"):
        load_scheduler(tmp_path)


@pytest.mark.parametrize("config", [
    {"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"},
    {"_class_name": "EDMDPMSolverMultistepScheduler"},
    {"_class_name": "SCMScheduler"}, {"_class_name": "IPNDMScheduler"}, {"_class_name": "SomebodysScheduler"},
    {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "prediction_type": "v_prediction",
     "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    {"_class_name": "HeliosScheduler", "use_flow_sigmas": True},
    {"_class_name": "DDIMScheduler", "use_flow_sigmas": True},
], ids=lambda config: config["_class_name"])
def test_schedulers_of_other_noise_are_refused_by_name(small_config, tmp_path, config):
    small = small_config("dit")
    written(tmp_path / "dit-pretrained", config)
    with pytest.raises(InputError) as caught:
        check(small, 1)
    assert f"a {config['_class_name']} noises neither by the betas of DDPM nor by flow matching" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_class_that_names_its_betas_is_taken(tmp_path):
    wanted = DDPMScheduler(beta_start=0.001, beta_end=0.01, beta_schedule="linear", prediction_type="v_prediction")
    found = load_scheduler(written(tmp_path, {
        "_class_name": "SomebodysScheduler", "beta_start": 0.001, "beta_end": 0.01, "beta_schedule": "linear",
        "prediction_type": "v_prediction"}))
    assert torch.equal(found.betas, wanted.betas) and found.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "SchedulerMixin", "NoSuch",
                                  "UNet2DModel"])
def test_samplers_of_other_noise_are_refused(small_config, name):
    with pytest.raises(InputError, match="made for another noising|no such scheduler"):
        scheduler_class(name, "--scheduler ")
    with pytest.raises(InputError, match=f"budget.sampler='{name}'"):
        check(small_config("dit", budget={"sampler": name}), 1)


def test_a_sampler_that_cannot_take_so_many_steps(small_config):
    with pytest.raises(InputError, match="budget.sampler='LCMScheduler' with budget.sampling_steps=100"):
        check(small_config("dit", budget={"sampler": "LCMScheduler", "sampling_steps": 100}), 1)


def test_every_scheduler_of_diffusers_is_taken_or_refused_in_one_line(small_config, tmp_path):
    folder = save_pipeline(tmp_path / "pipe", make_dit())
    for name in dir(diffusers.schedulers):
        cls = getattr(diffusers.schedulers, name)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)) or cls is diffusers.SchedulerMixin:
            continue
        for function, value in ((load_scheduler, written(folder, {"_class_name": name})), (check, small_config(
                "dit", budget={"sampler": name, "sampling_steps": 4}))):
            try:
                function(value) if function is load_scheduler else function(value, 1)
            except InputError as error:
                assert name in str(error) and "\n" not in str(error)
