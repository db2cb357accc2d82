"""Backbones without the layers that no expert runs: smaller, never dense, never saved; and `load_pipeline`."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_dit, save_stable_diffusion
from diffusers import StableDiffusionPipeline
from helpers import draw, experts_for
from helpers import load_quietly as load

from alter import InputError, load_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("sd") / "pipe")


@pytest.fixture
def trimmed(folder):
    """A trimmed pipeline, its experts, and what the untrimmed one draws."""
    pipe = load(folder)
    experts = experts_for(pipe.unet, 16, count=2, seed=1)
    unused = ~experts.mask_EL.any(axis=0)
    assert unused.any()
    experts.apply(pipe)
    expected = draw(pipe)
    lost = sum(p.numel() * 4 for name, out in zip(experts.sites, unused, strict=True) if out
               for p in pipe.unet.get_submodule(name).parameters())
    assert experts.trim(pipe) == lost > 0
    return pipe, experts, expected


def test_a_trimmed_pipeline_draws_the_same_with_less(trimmed):
    pipe, experts, expected = trimmed
    assert np.array_equal(draw(pipe), expected)
    assert experts.trim(pipe) == 0 and np.array_equal(draw(pipe), expected)  # a second time takes nothing more


def test_a_trimmed_pipeline_is_never_run_as_a_dense_one(trimmed):
    pipe, experts, expected = trimmed
    experts.remove(pipe)
    with pytest.raises(InputError, match="trimmed and has no dense form"):
        draw(pipe)
    with pytest.raises(InputError, match="which this backbone was trimmed of: load it untrimmed"):
        dataclasses.replace(experts, mask_EL=np.ones_like(experts.mask_EL)).apply(pipe)
    experts.apply(pipe)
    assert np.array_equal(draw(pipe), expected)


def test_a_trimmed_backbone_is_not_saved(trimmed, tmp_path):
    """diffusers would load it with random weights in the gaps."""
    pipe, _, _ = trimmed
    for saved in (pipe, pipe.unet):
        with pytest.raises(InputError, match="a trimmed backbone is not saved: keep the folder"):
            saved.save_pretrained(tmp_path / "trimmed")
    assert not list(tmp_path.rglob("unet/*.safetensors"))


def test_a_trim_that_is_refused_changes_nothing(folder):
    pipe = load(folder)
    experts = experts_for(pipe.unet, 16)
    experts.apply(pipe)
    expected = draw(pipe)
    with pytest.raises(InputError, match="trained on a DiTTransformer2DModel"):
        experts_for(make_dit(), 8).trim(pipe)
    assert np.array_equal(draw(pipe), expected)


def test_a_trimmed_dit_keeps_the_embedder_of_its_head():
    model, twin = make_dit(), make_dit()
    experts = experts_for(model, 8)
    experts.mask_EL[:, 0] = False
    experts.mask_EL[:, 1] = True
    experts.apply(twin)
    experts.trim(model)
    inputs = {"hidden_states": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([5, 5]),
              "class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).sample, twin.eval()(**inputs).sample)
    left = {name.split(".")[2] for name, _ in model.named_parameters() if name.startswith("transformer_blocks.0.")}
    assert left == {"norm1"}


def test_a_saved_folder_loads_with_its_experts_applied(folder, tmp_path):
    pipe = load(folder)
    experts = experts_for(pipe.unet, 16)
    experts.apply(pipe)
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path / "whole")  # with gates on: these are plain diffusers weights
    experts.save_pretrained(tmp_path / "whole")
    loaded = load_pipeline(tmp_path / "whole")
    assert type(loaded) is StableDiffusionPipeline and np.array_equal(draw(loaded), expected)
    half = load_pipeline(tmp_path / "whole", torch_dtype=torch.bfloat16)
    assert half.unet.dtype == half.vae.dtype == torch.bfloat16
    with pytest.raises(InputError, match="holds no experts.json"):
        load_pipeline(folder)
