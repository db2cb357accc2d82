import pytest
import torch
from diffusers import DDPMScheduler

from alter.diffusion import draw, generator, training_target
from alter.errors import InputError


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


def test_an_unknown_prediction_type_is_refused():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(InputError, match="prediction_type='score'"):
        training_target(scheduler, None, None, None)
