import pytest
import torch
from diffusers import DDPMScheduler

from alter.method.diffusion import draw, generator, min_snr_weight, training_target


def test_draws_repeat_and_differ_by_step_and_stream():
    def first(*key):
        return torch.rand(4, generator=generator(*key)).tolist()

    assert first(1, 2, 3) == first(1, 2, 3)
    assert len({tuple(first(*key)) for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}) == 4


@pytest.mark.parametrize("shape", [(1, 2, 2), (4, 3, 2, 2), (5, 16)], ids=["image", "video", "tokens"])
def test_a_samples_noise_does_not_depend_on_the_slice_that_it_is_drawn_in(shape):
    whole = draw(8, 1000, 0.5, seed=0, step=3)
    for part, again in ((whole, whole[2:6][1:3]), (whole[2:6], draw(8, 1000, 0.5, 0, 3)[2:6])):
        first = 3 if part is whole else 0
        for kind in ("noise", "posterior"):
            some, same = getattr(part, kind)(shape), getattr(again, kind)(shape)
            assert some.shape == (len(part.timesteps), *shape)
            assert torch.equal(some[first : first + len(same)], same)
    assert whole.timesteps.min() >= 0 and whole.timesteps.max() < 1000


def test_noise_is_unit_gaussian_and_differs_between_samples_steps_and_uses():
    drawn = [draw(4, 1000, 0.0, 0, step) for step in (0, 1)]
    several = torch.cat([getattr(one, kind)((3, 32, 32)) for one in drawn for kind in ("noise", "posterior")])
    alike = torch.corrcoef(several.flatten(1)) - torch.eye(16)
    assert alike.abs().max() < 0.1 and abs(several.std() - 1) < 0.01 and abs(several.mean()) < 0.01


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
    drawn = draw(64, 1000, 0.0, 0, 0)
    added = drawn.noise((3, 8, 8), 0.5) - drawn.noise((3, 8, 8))
    assert torch.allclose(added, added.mean((2, 3), keepdim=True).expand_as(added), atol=1e-5)
    assert 0.4 < float(added[:, :, 0, 0].std()) < 0.6
