"""Experts in diffusers' pipelines, against the same pipeline over copies whose layers were removed by hand."""

import copy
import inspect
import zlib

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from conftest import make_dit, make_vae, save_stable_diffusion
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    TorchAoConfig,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.hooks import apply_group_offloading
from diffusers.models.resnet import ResnetBlock2D
from helpers import draw, experts_for
from helpers import load_quietly as load
from PIL import Image
from torch import nn

from alter import InputError

PROMPTS = ["a red circle", "a small green triangle above a blue square"]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))


class Skip(nn.Module):
    """What is left of a layer that was taken out."""

    def __init__(self, layer):
        super().__init__()
        self.channels = layer.out_channels if isinstance(layer, ResnetBlock2D) else None
        if hasattr(layer, "norm1") and hasattr(layer.norm1, "emb"):  # a DiT's head reads it in block 0
            self.norm1 = layer.norm1

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states if self.channels is None else hidden_states[:, : self.channels]


def serve_by_hand(backbone, experts, option=lambda backbone: None):
    """Send each forward to a copy of the backbone, with the option, without what its timestep's expert skips."""
    copies = []
    for mask_L in experts.mask_EL:
        copies.append(copy.deepcopy(backbone))
        for name, runs in zip(experts.sites, mask_L, strict=True):
            if not runs:
                parent, _, child = name.rpartition(".")
                setattr(copies[-1].get_submodule(parent), child, Skip(copies[-1].get_submodule(name)))
        option(copies[-1])
    names = list(inspect.signature(type(backbone).forward).parameters)[1:]

    def forward(*args, **kwargs):
        timestep = {**dict(zip(names, args, strict=False)), **kwargs}["timestep"]
        nearest = min(max(round(float(torch.as_tensor(timestep).reshape(-1)[0])), 0), 999)
        return copies[experts.expert_T[nearest]](*args, **kwargs)

    backbone.forward = forward


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("sd") / "pipe")


def compare(make, before=lambda unet: None, after=lambda unet: None, **arguments):
    """`make()` with experts and over hand-made copies: the same images, others than the dense ones, which come back.

    before, after: options of the UNet, taken before or after the experts are applied.
    """
    pipe, other, dense = make(), make(), make()
    for each in (pipe, other, dense):
        before(each.unet)
    experts = experts_for(make().unet, 16)
    experts.apply(pipe)
    serve_by_hand(other.unet, experts, after)
    after(pipe.unet)
    after(dense.unet)
    drawn, plain = draw(pipe, **arguments), draw(dense, **arguments)
    assert np.array_equal(drawn, draw(other, **arguments))
    assert np.abs(drawn - plain).max() > 1e-3
    experts.remove(pipe)
    assert np.array_equal(draw(pipe, **arguments), plain)


@pytest.mark.parametrize("arguments", [
    {}, {"guidance_scale": 1.0}, {"prompts": PROMPTS}, {"num_images_per_prompt": 3}, {"num_inference_steps": 1},
    {"timesteps": [990, 700, 512, 333, 40]}, {"guidance_rescale": 0.7},
], ids=str)
def test_text_to_image(folder, arguments):
    def make():
        pipe = load(folder)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        if "timesteps" in arguments:
            pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        return pipe

    compare(make, **arguments)


@pytest.mark.parametrize("scheduler", [
    DDIMScheduler, EulerDiscreteScheduler, LMSDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler, LCMScheduler,
])
def test_any_scheduler(folder, scheduler):
    def make():
        pipe = load(folder)
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        return pipe

    compare(make)


def test_image_to_image(folder):
    compare(lambda: load(folder, StableDiffusionImg2ImgPipeline), image=PICTURE, strength=0.8)


def test_inpainting(folder):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    compare(lambda: load(folder, StableDiffusionInpaintPipeline), image=PICTURE, mask_image=mask, height=32, width=32)


def test_controlnet(folder):
    torch.manual_seed(1)
    controlnet = ControlNetModel.from_unet(load(folder).unet, conditioning_embedding_out_channels=(4, 8))
    for parameter in controlnet.parameters():  # its last layers begin at zero
        nn.init.normal_(parameter, std=0.1)
    compare(lambda: load(folder, StableDiffusionControlNetPipeline, controlnet=controlnet), image=PICTURE,
            height=32, width=32)


def test_dit(tmp_path):
    torch.manual_seed(0)
    transformer = make_dit(channels=4, learned_sigma=True)
    config = {**transformer.config, "num_embeds_ada_norm": 1000}
    folder = tmp_path / "dit"
    DiTPipeline(DiTTransformer2DModel.from_config(config), make_vae(), DDIMScheduler()).save_pretrained(folder)
    experts = experts_for(DiTPipeline.from_pretrained(folder).transformer, 8)
    images = []
    for way in ("experts", "by hand", "dense"):
        pipe = load(folder, DiTPipeline)
        if way == "experts":
            experts.apply(pipe)
        if way == "by hand":
            serve_by_hand(pipe.transformer, experts)
        images.append(draw(pipe, [3, 7], guidance_scale=2.0))
    assert np.array_equal(images[0], images[1]) and np.abs(images[0] - images[2]).max() > 1e-3


def lora(unet):
    """Adapters whose weights depend on their names alone."""
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            torch.manual_seed(zlib.crc32(name.encode()))
            nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_loaded_before_or_after(folder, when):
    pytest.importorskip("peft")
    compare(lambda: load(folder), **{when: lora})


def test_a_lora_file_loads_and_unloads_while_experts_are_on(folder, tmp_path):
    pytest.importorskip("peft")
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    pipe = load(folder)
    lora(pipe.unet)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    expected_pipe, experts = pipe, experts_for(load(folder).unet, 16)
    experts.apply(expected_pipe)
    expected = draw(expected_pipe)
    pipe = load(folder)
    experts.apply(pipe)
    plain = draw(pipe)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")  # diffusers 0.37 asks for it
    assert np.abs(draw(pipe) - expected).max() < 1e-5 < np.abs(plain - expected).max()
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(folder, dtype):
    compare(lambda: load(folder, torch_dtype=dtype))


def slice_attention(unet):
    unet.set_attention_slice("max")


def offload_model(unet):
    """What `enable_model_cpu_offload` puts on each model, with the CPU as the device to run on."""
    cpu_offload_with_hook(unet, torch.device("cpu"))


def offload_groups(unet):
    apply_group_offloading(unet, torch.device("cpu"), offload_type="leaf_level")


def store_in_8_bits(unet):
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@pytest.mark.parametrize("option", [slice_attention, offload_model, offload_groups, store_in_8_bits])
def test_memory_options_after(folder, option):
    compare(lambda: load(folder), after=option)


@pytest.mark.parametrize("option", [slice_attention, offload_groups, store_in_8_bits])
def test_memory_options_before(folder, option):
    """Hooks cannot be copied, so the hand-made copies get the option first of all, too."""
    pipe, other = load(folder), load(folder)
    experts = experts_for(pipe.unet, 16)
    option(pipe.unet)
    experts.apply(pipe)
    serve_by_hand(other.unet, experts, option)
    assert np.array_equal(draw(pipe), draw(other))


def test_quantised_linear_layers(folder):
    torchao = pytest.importorskip("torchao.quantization")

    def make():
        quantised = TorchAoConfig(torchao.Int8WeightOnlyConfig())
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32,
                                                    quantization_config=quantised)
        weight = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight
        assert type(weight.data) is not torch.Tensor
        return load(folder, unet=unet)

    pipe, other = make(), make()
    plain, experts = draw(pipe), experts_for(load(folder).unet, 16)
    experts.apply(pipe)
    serve_by_hand(other.unet, experts)
    assert np.array_equal(draw(pipe), draw(other)) and np.abs(draw(pipe) - plain).max() > 1e-3


def test_two_pipelines_with_one_backbone_are_served_by_one_apply(folder):
    pipe = load(folder)
    second = StableDiffusionImg2ImgPipeline(**pipe.components)
    experts = experts_for(pipe.unet, 16)
    dense = draw(second, image=PICTURE)
    experts.apply(pipe)
    assert not np.array_equal(draw(second, image=PICTURE), dense)
    experts.apply(second)  # they are there already
    experts.remove(second)
    assert np.array_equal(draw(second, image=PICTURE), dense)
    with pytest.raises(InputError, match="none are applied"):
        experts.remove(pipe)


def test_a_with_block_removes_the_experts_also_after_an_error(folder):
    pipe = load(folder)
    experts, dense = experts_for(pipe.unet, 16), draw(pipe)
    with pytest.raises(RuntimeError), experts.apply(pipe) as served:
        assert served is pipe and not np.array_equal(draw(pipe), dense)
        raise RuntimeError
    assert np.array_equal(draw(pipe), dense)


def test_a_copy_of_a_served_backbone_chooses_for_itself(folder):
    pipe = load(folder)
    experts_for(pipe.unet, 16).apply(pipe)
    twin = copy.deepcopy(pipe.unet)
    inputs = {"sample": torch.randn(1, 4, 16, 16), "encoder_hidden_states": torch.randn(1, 16, 12)}
    with torch.no_grad():
        expected = pipe.unet(timestep=900, **inputs).sample
        pipe.unet(timestep=10, **inputs)
        assert torch.equal(twin(timestep=900, **inputs).sample, expected)


def test_models_without_the_sites(folder):
    experts = experts_for(load(folder).unet, 16)
    with pytest.raises(InputError, match="trained on a UNet2DConditionModel, and this is a DiTTransformer2DModel"):
        experts.apply(make_dit())
    with pytest.raises(InputError, match="this is a AutoencoderKL"):
        experts.apply(make_vae())
    with pytest.raises(InputError, match="a int has no unet or transformer"):
        experts.apply(3)


def test_push_to_hub_uploads_the_file_alone(folder, monkeypatch):
    calls = []
    monkeypatch.setattr("alter.experts.artefact.HfApi.create_repo", lambda self, *args, **kwargs: calls.append(args))
    monkeypatch.setattr("alter.experts.artefact.HfApi.upload_file",
                        lambda self, **kwargs: calls.append(kwargs) or "address")
    experts = experts_for(load(folder).unet, 16)
    assert experts.push_to_hub("me/mine") == "address"
    assert calls[0] == ("me/mine",) and calls[1]["path_in_repo"] == "experts.json"
    assert b'"masks"' in calls[1]["path_or_fileobj"]
