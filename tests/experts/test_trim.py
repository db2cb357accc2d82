"""Pipelines without the layers that no expert runs: saved, loaded, never dense; and `load_pipeline`."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_dit, save_stable_diffusion
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from test_pipelines import draw, experts_for, load

from alter import InputError, load_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("sd") / "pipe")


@pytest.fixture
def trimmed(folder, tmp_path):
    """A trimmed pipeline in a folder, its experts, and what the untrimmed one draws."""
    pipe = load(folder)
    experts = experts_for(pipe.unet, 16, count=2, seed=1)
    unused = ~experts.mask_EL.any(axis=0)
    assert unused.any()
    experts.apply(pipe)
    expected = draw(pipe)
    lost = sum(p.numel() * 4 for name, out in zip(experts.sites, unused, strict=True) if out
               for p in pipe.unet.get_submodule(name).parameters())
    assert experts.trim(pipe) == lost > 0
    assert np.array_equal(draw(pipe), expected)
    pipe.save_pretrained(tmp_path / "trimmed")
    experts.save_pretrained(tmp_path / "trimmed")
    return tmp_path / "trimmed", experts, expected


def test_a_trimmed_pipeline_is_saved_and_loaded(trimmed):
    folder, experts, expected = trimmed
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is StableDiffusionPipeline and np.array_equal(draw(pipe), expected)
    half = load_pipeline(folder, dtype=torch.bfloat16)
    assert half.unet.dtype == half.vae.dtype == torch.bfloat16
    again = folder.parent / "again"
    pipe.save_pretrained(again)
    experts.save_pretrained(again)
    assert np.array_equal(draw(load_pipeline(again)), expected)


def test_a_trimmed_pipeline_is_never_loaded_or_run_as_a_dense_one(trimmed):
    folder, experts, _ = trimmed
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        StableDiffusionPipeline.from_pretrained(folder)
    pipe = load_pipeline(folder)
    experts.remove(pipe)
    with pytest.raises(InputError, match="trimmed and has no dense form"):
        draw(pipe)
    with pytest.raises(InputError, match="which this backbone was trimmed of: load it untrimmed"):
        dataclasses.replace(experts, mask_EL=np.ones_like(experts.mask_EL)).apply(pipe)


def test_stale_trimmed_weights_and_a_refused_trim(folder, trimmed):
    """Weights of both kinds in one folder are ambiguous; experts that do not fit change nothing."""
    place, experts, expected = trimmed
    load(folder).unet.save_pretrained(place / "unet")
    with pytest.raises(InputError, match="holds trimmed and untrimmed weights"):
        load_pipeline(place)
    pipe = load(folder)
    experts.apply(pipe)
    with pytest.raises(InputError, match="are not the 26"):
        experts_for(make_dit(), 8).trim(pipe)
    assert np.array_equal(draw(pipe), expected)


def test_a_trimmed_dit_keeps_the_embedder_of_its_head(tmp_path):
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
    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "alter_trimmed.safetensors")
    assert {name.split(".")[2] for name in kept if name.startswith("transformer_blocks.0.")} == {"norm1"}


def test_an_untrimmed_folder_loads_with_its_experts_applied(folder, tmp_path):
    pipe = load(folder)
    experts = experts_for(pipe.unet, 16)
    experts.apply(pipe)
    expected = draw(pipe)
    experts.remove(pipe)
    pipe.save_pretrained(tmp_path / "whole")
    experts.save_pretrained(tmp_path / "whole")
    assert np.array_equal(draw(load_pipeline(tmp_path / "whole")), expected)
    with pytest.raises(InputError, match="holds no experts.json"):
        load_pipeline(folder)
