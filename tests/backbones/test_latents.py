"""Images to latents and back, by the code of each pipeline that decodes."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import AutoencoderTiny
from pipelines import PIPELINES, PROMPTS, VIDEOS, draw, make_pipeline, received, unguided

from alter import InputError
from alter.backbones.latents import encode


def pictures(name, count=2):
    size = (5, 32, 32) if name in VIDEOS else (32, 32)
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def decoded(pipe, name, latents):
    """What the pipeline makes of these latents of the scheduler's layout, [B, 3, (F,) H, W] in [0, 1]."""
    def step(*arguments, return_dict=True, **options):
        return SimpleNamespace(prev_sample=latents) if return_dict else (latents,)

    pipe.scheduler.step = step
    drawn = draw(pipe, PROMPTS, output_type="pt", num_inference_steps=2, **unguided(name))
    return drawn.transpose(1, 2) if name in VIDEOS else drawn


@pytest.mark.parametrize("name", PIPELINES)
def test_latents_are_those_that_the_pipeline_decodes(name):
    pipe, images = make_pipeline(name), pictures(name)
    mean, std = encode(pipe, images)
    assert mean.shape == std.shape == received(make_pipeline(name), name, PROMPTS)[1].shape
    assert mean.dtype == std.dtype == torch.float32
    with torch.no_grad():
        encoded = pipe.vae.encode(images.unsqueeze(2) if name == "qwen" else images)
        if name == "sana":
            parts = encoded.latent, torch.zeros_like(encoded.latent)
        else:
            parts = encoded.latent_dist.mean, encoded.latent_dist.std
        for ratio in (0, 1):
            expected = pipe.vae.decode(parts[0] + ratio * parts[1]).sample / 2 + 0.5
            expected = expected[:, :, 0] if name == "qwen" else expected
            found = decoded(pipe, name, mean + ratio * std)
            torch.testing.assert_close(found, expected.clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert (std == 0).all() if name == "sana" else (std > 0).all()


@pytest.mark.skipif(not hasattr(diffusers, "BriaFiboPipeline"), reason="this diffusers has no such pipeline")
def test_latents_that_are_tokens_without_packing():
    cls, vae = diffusers.BriaFiboPipeline, make_pipeline("wan").vae
    pipe = SimpleNamespace(vae=vae, _pack_latents=cls._pack_latents, _pack_latents_no_patch=cls._pack_latents_no_patch)
    mean, std = encode(pipe, pictures("flux"))
    assert mean.shape == std.shape == (2, (32 // 8) ** 2, 4)
    latents = cls._unpack_latents_no_patch(mean, 32, 32, 8).unsqueeze(2)
    shift, scale = (torch.tensor(values).view(1, -1, 1, 1, 1)
                    for values in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        expected = vae.encode(pictures("flux").unsqueeze(2)).latent_dist.mean
    torch.testing.assert_close(latents * scale + shift, expected, rtol=1e-4, atol=1e-5)


def test_the_tiny_autoencoder_has_no_posterior():
    pipe, images = make_pipeline("sd"), pictures("sd")
    pipe.vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                               num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval().requires_grad_(False)
    mean, std = encode(pipe, images)
    expected = pipe.vae.decode(pipe.vae.encode(images).latents).sample / 2 + 0.5
    torch.testing.assert_close(decoded(pipe, "sd", mean), expected.clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert (std == 0).all()


def test_sizes_that_the_autoencoder_refuses():
    with pytest.raises(InputError, match="the AutoencoderKL refuses images of"):
        encode(make_pipeline("sd"), torch.zeros(1, 4, 32, 32))
