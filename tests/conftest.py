"""Tiny real diffusers models, and pipeline folders and data made of them."""

import functools
import gc
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from helpers import known_cost
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

import alter.training.demo_images
import alter.training.journal
import alter.training.search.hypernetwork
import alter.training.setup.plan
import alter.training.summary
from alter.common.load import CONFIGS, load_config
from alter.data.shapes import write_shapes
from alter.evaluation.classifier import errors_by_timestep, train_classifier
from alter.evaluation.report.figures import plot_experts, plot_samples
from alter.training.demo import make_tokenizer
from alter.training.measure import measure_sensitivity

torch.set_num_threads(1)  # tiny models: threads cost more than they give


_PICTURES = (
    (alter.training.journal, "plot_experts", plot_experts), (alter.training.summary, "plot_experts", plot_experts),
    (alter.training.summary, "plot_samples", plot_samples),
)


@pytest.fixture(autouse=True, scope="session")
def brief_runs():
    """Whole runs count costs, measure layers and samples and draw pictures; in most tests that they do is enough."""
    gc.collect()
    gc.freeze()  # what is imported by now is never garbage; looking through it takes a third of a second
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # no test pulls the plug
        patch.setattr(alter.training.setup.plan, "count_cost", known_cost)
        patch.setattr(alter.training.demo_images, "train_classifier", functools.partial(train_classifier, steps=2))
        patch.setattr(alter.training.summary, "errors_by_timestep", functools.partial(errors_by_timestep, bins=4))
        patch.setattr(alter.training.search.hypernetwork, "measure_sensitivity",
                      functools.partial(measure_sensitivity, samples=4, trials=2))
        for module, name, _ in _PICTURES:
            patch.setattr(module, name, lambda *arguments: Image.new("RGB", (1, 1)).save(arguments[-1]))
        yield


@pytest.fixture
def real_pictures(monkeypatch):
    """Runs draw their pictures in full, for a test that looks at them."""
    for module, name, function in _PICTURES:
        monkeypatch.setattr(module, name, function)


def make_dit(layers=4, size=8, channels=1, learned_sigma=False) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=channels,
        out_channels=channels * (2 if learned_sigma else 1), num_layers=layers, sample_size=size, patch_size=2,
        num_embeds_ada_norm=10, attention_bias=True,
    )
    for block in model.transformer_blocks:  # equal copies, as in every trained DiT
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def make_unet(size=16) -> UNet2DConditionModel:
    """Three levels, so that every kind of site and of unprunable resnet occurs."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=size, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
    )


def make_model(kind: str):
    model = make_dit() if kind == "dit" else make_unet()
    return model.train() if kind == "unet" else _without_label_dropout(model.train())


def _without_label_dropout(model):
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model


def make_inputs(kind: str, batch: int = 5, seed: int = 1):
    source = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(1000, (batch,), generator=source)
    if kind == "dit":
        labels = torch.randint(10, (batch,), generator=source)
        return (torch.randn(batch, 1, 8, 8, generator=source), timesteps), {"class_labels": labels}
    text = torch.randn(batch, 7, 12, generator=source)
    return (torch.randn(batch, 4, 16, 16, generator=source), timesteps), {"encoder_hidden_states": text}


def save_pipeline(folder: Path, model, prediction_type="epsilon") -> Path:
    component = "transformer" if isinstance(model, DiTTransformer2DModel) else "unet"
    model.save_pretrained(folder / component)
    DDPMScheduler(prediction_type=prediction_type, clip_sample=False).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline"}))
    return folder


def make_vae(latent_channels=4) -> AutoencoderKL:
    """Halves the sides of an image."""
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                         up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=latent_channels, scaling_factor=0.5)


def save_stable_diffusion(folder: Path, prediction_type="v_prediction") -> Path:
    """A tiny but complete Stable Diffusion for images of 32 x 32 pixels and the words of `alter.data.shapes`."""
    save_pipeline(folder, make_unet(), prediction_type)
    template = CONFIGS / "models/demo/sd-shapes"
    make_vae().save_pretrained(folder / "vae")
    make_tokenizer(template / "text_encoder").save_pretrained(folder / "tokenizer")
    text = CLIPTextConfig.from_pretrained(template / "text_encoder")
    text.hidden_size, text.intermediate_size, text.num_attention_heads = 12, 24, 2
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text((template / "model_index.json").read_text())
    return folder


def save_latents(folder: Path, shape, count=24, text=None) -> Path:
    rng = np.random.default_rng(0)
    conditions = folder / ("train_text" if text else "train_labels")
    (folder / "train_features").mkdir(parents=True)
    conditions.mkdir()
    for i in range(count):
        np.save(folder / "train_features" / f"{i}.npy", rng.standard_normal((1, *shape), dtype=np.float32))
        condition = rng.standard_normal(text, dtype=np.float32) if text else np.array([i % 10])
        np.save(conditions / f"{i}.npy", condition)
    if text:
        np.save(folder / "empty_text.npy", np.zeros(text, dtype=np.float32))
    return folder


SMALL = {
    "data": {"holdout": 8, "workers": 0},
    "experts": {"count": 3},
    "train": {"steps": 6, "search_steps": 3, "batch_size": 8, "mixed_precision": "no"},
    "optim": {"warmup_steps": 0, "backbone_lr": 1e-3, "hypernetwork_lr": 1e-2},
    "checkpoint": {"every": 100},
    "log": {"every": 1, "tracker": "none"},
    "evaluate": {"sampling_steps": 2, "samples": 100, "dense": False},
}


def merge(base: dict, changes: dict) -> dict:
    merged = dict(base)
    for name, value in changes.items():
        merged[name] = merge(merged.get(name, {}), value) if isinstance(value, dict) else value
    return merged


def config_factory(folder: Path):
    """Makes configurations, with what they need in `folder`: a small run on a tiny DiT with digits ("dit"), a tiny UNet
    with text states ("unet") or a tiny Stable Diffusion with captioned images ("sd")."""
    def make(kind="dit", **changes):
        pretrained = folder / f"{kind}-pretrained"
        if not pretrained.exists() and kind == "sd":
            save_stable_diffusion(pretrained)
        elif not pretrained.exists():
            save_pipeline(pretrained, make_dit() if kind == "dit" else make_unet())
        content = merge(SMALL, {"backbone": {"pretrained": str(pretrained)}, "output_dir": str(folder / "run")})
        if kind == "dit":
            content = merge(content, {"data": {"source": "digits", "resolution": 8}})
        elif kind == "sd":
            shapes = folder / "shapes"
            if not shapes.exists():
                write_shapes(shapes, 24, 0)
            content = merge(content, {"data": {"path": str(shapes), "resolution": 32}})
        else:
            latents = folder / "latents"
            if not latents.exists():
                save_latents(latents, (4, 16, 16), text=(7, 12))
            content = merge(content, {"data": {"source": "latents", "path": str(latents), "resolution": 16}})
        file = folder / "small.yaml"
        file.write_text(yaml.safe_dump(merge(content, changes)))
        return load_config(file)

    return make


@pytest.fixture
def small_config(tmp_path):
    """A `config_factory` for this test."""
    return config_factory(tmp_path)
