"""Both forward processes, against diffusers' schedulers and training functions."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)

from alter.backbones.draws import generator
from alter.backbones.noising import PREDICTION_TYPES, Betas, Flow, edges_of
from alter.method.budget import timestep_weights

SHAPES = pytest.mark.parametrize("shape", [(1, 4, 4), (2, 3, 4, 4), (5, 8)], ids=["image", "video", "tokens"])


def betas(gamma=None, **settings):
    scheduler = DDPMScheduler(**settings)
    return scheduler, Betas(scheduler.alphas_cumprod, scheduler.config.prediction_type, gamma)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"beta_schedule": "scaled_linear"}, {"rescale_betas_zero_snr": True}],
                         ids=str)
def test_betas_give_the_bits_of_ddpm(settings, dtype, shape):
    scheduler, noising = betas(prediction_type="v_prediction", **settings)
    latents, noise = torch.randn(2, 6, *shape).to(dtype)
    timesteps = torch.tensor([0, 1, 10, 400, 900, 999])
    assert torch.equal(noising.noised(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps))
    assert torch.equal(noising.target(latents, noise, timesteps), scheduler.get_velocity(latents, noise, timesteps))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_targets_agree_with_the_forward_process(kind):
    """From x_t and the target alone, the clean latents come back (closed forms of each parametrisation)."""
    scheduler, noising = betas(prediction_type=kind)
    latents, noise = torch.randn(2, 3, 1, 4, 4).double()
    timesteps = torch.tensor([10, 400, 900])
    noisy, target = (function(latents, noise, timesteps) for function in (noising.noised, noising.target))
    alpha = scheduler.alphas_cumprod[timesteps].double().sqrt().view(3, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    clean = {"epsilon": (noisy - sigma * target) / alpha, "v_prediction": alpha * noisy - sigma * target,
             "sample": target}[kind]
    assert torch.allclose(clean, latents, atol=1e-4)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_min_snr_weights_the_error_of_the_clean_latents(kind):
    """The weighted error in any prediction type is min(SNR, gamma) times the error of the clean latents it implies."""
    gamma, timesteps = 5.0, torch.tensor([0, 10, 200, 400, 700, 999])
    scheduler, noising = betas(gamma, prediction_type=kind)
    alpha = scheduler.alphas_cumprod[timesteps].double()
    mistake = torch.randn(6, 1, 4, 4).double()
    root = {"epsilon": ((1 - alpha) / alpha).sqrt(), "v_prediction": (1 - alpha).sqrt(), "sample": torch.ones(6)}[kind]
    # x0 is (x_t - sigma·eps) / alpha, or alpha·x_t - sigma·v
    clean_error = (root.view(6, 1, 1, 1) * mistake).square().mean((1, 2, 3))
    wanted = torch.minimum(alpha / (1 - alpha), torch.tensor(gamma)) * clean_error
    weighted = noising.weight(timesteps) * mistake.square().mean((1, 2, 3))
    assert torch.allclose(weighted.double(), wanted, rtol=1e-5)


def test_min_snr_agrees_with_diffusers_snr_and_is_finite_at_zero_terminal_snr():
    timesteps = torch.arange(1000)
    scheduler, noising = betas(5.0)
    snr = compute_snr(scheduler, timesteps)
    assert torch.allclose(noising.weight(timesteps), snr.clamp(max=5.0) / snr, rtol=1e-3)
    for kind in ("epsilon", "v_prediction"):
        assert betas(5.0, prediction_type=kind, rescale_betas_zero_snr=True)[1].weight(timesteps).isfinite().all()
    assert betas()[1].weight(timesteps) is None


@SHAPES
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_noises_as_flow_match_schedulers(shift, shape):
    scheduler, noising = FlowMatchEulerDiscreteScheduler(shift=shift), Flow(1000, shift)
    latents, noise = torch.randn(2, 4, *shape)
    timesteps = scheduler.timesteps[torch.tensor([0, 10, 500, 999])]
    noisy = noising.noised(latents, noise, timesteps)
    assert torch.allclose(noisy, scheduler.scale_noise(latents, timesteps, noise), atol=1e-6)
    assert torch.equal(noisy[0], noise[0])
    sigma = (timesteps / 1000).view(4, *[1] * len(shape))  # the clean latents come back along the velocity
    assert torch.allclose(noisy - sigma * noising.target(latents, noise, timesteps), latents, atol=1e-5)


@pytest.mark.parametrize("settings", [
    {"density": "uniform"}, {"density": "mode"}, {"density": "mode", "mode_scale": -0.9},
    {"density": "logit_normal"}, {"density": "logit_normal", "logit_mean": 0.7, "logit_std": 0.5}], ids=str)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_densities_are_those_of_diffusers_training_scripts(settings, shift):
    noising = Flow(1000, shift, **settings)
    timesteps = noising.timesteps(5000, generator(0, 0))
    assert timesteps.dtype == torch.float32 and 0 < timesteps.min() and timesteps.max() <= 1000
    unshifted = compute_density_for_timestep_sampling(
        noising.density, 200_000, noising.logit_mean, noising.logit_std, noising.mode_scale, generator=generator(0, 1))
    shifted = shift * unshifted / (1 + (shift - 1) * unshifted)
    levels = torch.linspace(0.02, 0.98, 25)
    found, expected = torch.quantile(timesteps / 1000, levels), torch.quantile(shifted, levels)
    assert (found - expected).abs().max() < 0.03  # of 5,000 draws


def test_the_shift_is_that_of_the_schedulers():
    for shift in (0.5, 1.0, 3.0, 12.0):
        sigmas = torch.arange(1000, 0, -1) / 1000
        assert torch.allclose(Flow(1000, shift).shifted(sigmas), FlowMatchEulerDiscreteScheduler(shift=shift).sigmas)


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_are_those_of_diffusers(weighting):
    timesteps = torch.tensor([1.0, 250.5, 500.0, 1000.0])
    expected = compute_loss_weighting_for_sd3(weighting, timesteps / 1000)
    found = Flow(1000, weighting=weighting).weight(timesteps)
    assert torch.allclose(expected, torch.ones(4)) if found is None else torch.allclose(found, expected)


def test_log_snr_is_that_of_the_noised_latents():
    """From the coefficients with which each process noises a one and a zero; finite where one of them vanishes."""
    ones, zeros = torch.ones(3, 1).double(), torch.zeros(3, 1).double()
    for noising, timesteps in ((betas(rescale_betas_zero_snr=True)[1], torch.tensor([0, 400, 990])),
                               (Flow(1000), torch.tensor([2.5, 500.0, 990.0]))):
        signal, noise = noising.noised(ones, zeros, timesteps), noising.noised(zeros, ones, timesteps)
        expected = 2 * (signal / noise).log().flatten()
        assert torch.allclose(noising.log_snr(timesteps).double(), expected, rtol=1e-3)
        everywhere = noising.log_snr(noising.at(torch.arange(1000)))
        assert everywhere.isfinite().all() and (everywhere.diff() <= 0).all()
    assert betas(rescale_betas_zero_snr=True)[1].log_snr(torch.tensor([999])).item() == -20
    assert Flow(1000).log_snr(torch.tensor([0.0, 1000.0])).tolist() == [20, -20]


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
@pytest.mark.parametrize("within", [(875.0, float("inf")), (0.0, 875.0)], ids=["noisier", "rest"])
def test_a_share_of_the_timesteps_is_drawn_as_often_as_before(density, within):
    settings = {"num_timesteps": 1000, "shift": 3.0, "density": density}
    every = Flow(**settings).timesteps(40_000, generator(0, 0))
    expected = every[(every >= within[0]) & (every < within[1])]
    found = Flow(**settings, within=within).timesteps(40_000, generator(0, 1))
    assert within[0] <= found.min() and found.max() < within[1]
    levels = torch.linspace(0.05, 0.95, 19)
    width = min(within[1], 1000) - within[0]
    assert (found.quantile(levels) - expected.quantile(levels)).abs().max() < 0.03 * width


def test_bins_share_the_trained_timesteps():
    whole = Betas(torch.linspace(1, 0, 1000))
    for bins in (1, 7, 10, 20):
        assert edges_of(whole, bins).tolist() == np.ceil(np.linspace(0, 1000, bins + 1)).astype(int).tolist()
    visited = (999.0, 750.0, 500.0, 250.0)
    for few in (Flow(1000, visited=visited), Betas(torch.linspace(1, 0, 1000), visited=tuple(map(int, visited)))):
        assert few.trained.tolist() == sorted(visited)
        edges = edges_of(few, 10)
        nearest = np.abs(np.arange(1000)[:, None] - sorted(visited)).argmin(1)  # of two the lower
        assert np.array_equal(np.digitize(np.arange(1000), edges[1:-1]), nearest)
    part = Flow(1000, within=(875.0, float("inf")))
    assert part.trained.tolist() == list(range(875, 1000))
    assert edges_of(part, 5).tolist() == [0, 900, 925, 950, 975, 1000]
    weight_T = np.arange(1000.0)
    edges = edges_of(whole, 4, weight_T)
    shares = np.add.reduceat(weight_T, edges[:-1]) / weight_T.sum()
    assert len(shares) == 4 and np.abs(shares - 0.25).max() < 0.002


def test_bins_of_few_trained_timesteps_have_equal_shares():
    """Each of four visited timesteps counts as often, however many others are nearest to it."""
    noising = Flow(1000, visited=(1000.0, 750.0, 500.0, 250.0))
    weight_T = timestep_weights(1000, np.array([999, 750, 500, 250]))
    for bins, expected in ((4, [0, 376, 626, 875, 1000]), (2, [0, 626, 1000]), (20, [0, 376, 626, 875, 1000])):
        edges = edges_of(noising, bins, weight_T)
        assert edges.tolist() == expected
        assert np.add.reduceat(weight_T, edges[:-1]) == pytest.approx(1 / (len(edges) - 1))
