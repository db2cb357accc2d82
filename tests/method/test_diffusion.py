import pytest
import torch
from diffusers import DDPMScheduler

from alter.method.diffusion import draw, generator, min_snr_weight, training_target


def test_draws_repeat_and_differ_by_step_and_stream():
    def first(*key):
        return torch.rand(4, generator=generator(*key)).tolist()

    assert first(1, 2, 3) == first(1, 2, 3)
    assert len({tuple(first(*key)) for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}) == 4


def test_a_slice_of_the_global_draw_does_not_depend_on_how_it_is_sliced():
    whole = draw(8, (1, 2, 2), 1000, 0.5, generator(0, 0))
    assert torch.equal(whole[slice(2, 6)].noise[1:3], whole[slice(3, 5)].noise)
    assert whole.timesteps.min() >= 0 and whole.timesteps.max() < 1000


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_targets_agree_with_the_forward_process(kind):
    """From x_t and the target alone, the clean latents come back (closed forms of each parametrisation)."""
    scheduler = DDPMScheduler(prediction_type=kind)
    latents, noise = torch.randn(3, 1, 4, 4).double(), torch.randn(3, 1, 4, 4).double()
    timesteps = torch.tensor([10, 400, 900])
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = training_target(scheduler, latents, noise, timesteps)
    alpha = scheduler.alphas_cumprod[timesteps].double().sqrt().view(3, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    clean = {"epsilon": (noisy - sigma * target) / alpha, "v_prediction": alpha * noisy - sigma * target,
             "sample": target}[kind]
    assert torch.allclose(clean, latents, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_the_error_of_the_clean_latents(kind):
    """The weighted error in any prediction type is min(SNR, gamma) times the error of the clean latents it implies."""
    gamma, timesteps = 5.0, torch.tensor([0, 10, 200, 400, 700, 999])
    scheduler = DDPMScheduler(prediction_type=kind)
    alpha = scheduler.alphas_cumprod[timesteps].double()
    snr = alpha / (1 - alpha)
    latents, noise, mistake = torch.randn(3, 6, 1, 4, 4).double()
    target = training_target(scheduler, latents, noise, timesteps)
    root = {"epsilon": ((1 - alpha) / alpha).sqrt(), "v_prediction": (1 - alpha).sqrt(), "sample": torch.ones(6)}[kind]
    # x0 is (x_t - sigma·eps) / alpha, or alpha·x_t - sigma·v
    clean_error = (root.view(6, 1, 1, 1) * mistake).square().mean((1, 2, 3))
    wanted = torch.minimum(snr, torch.tensor(gamma)) * clean_error
    weighted = min_snr_weight(scheduler, timesteps, gamma) * (target + mistake - target).square().mean((1, 2, 3))
    assert torch.allclose(weighted.double(), wanted, rtol=1e-5)


def test_min_snr_agrees_with_diffusers_snr_and_is_finite_at_zero_terminal_snr():
    from diffusers.training_utils import compute_snr

    scheduler, timesteps = DDPMScheduler(), torch.arange(1000)
    snr = compute_snr(scheduler, timesteps)
    expected = snr.clamp(max=5.0) / snr
    assert torch.allclose(min_snr_weight(scheduler, timesteps, 5.0), expected, rtol=1e-3)
    for kind in ("epsilon", "v_prediction"):
        zero = DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
        assert min_snr_weight(zero, timesteps, 5.0).isfinite().all()


def test_noise_offset_adds_one_number_to_every_channel():
    plain, offset = (draw(64, (3, 8, 8), 1000, 0.0, generator(0, 0), amount) for amount in (0.0, 0.5))
    added = offset.noise - plain.noise
    assert torch.allclose(added, added.mean((2, 3), keepdim=True).expand_as(added), atol=1e-5)
    assert 0.4 < float(added[:, :, 0, 0].std()) < 0.6
    assert torch.equal(plain.timesteps, offset.timesteps) and torch.equal(plain.dropped, offset.dropped)
