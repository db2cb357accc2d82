"""What people do with the pipelines of each family, beside experts: against copies without layers."""

import zlib

import diffusers
import numpy as np
import pytest
import torch
from by_hand import compare, make_experts
from PIL import Image
from pipelines import PROMPTS, SIZE, backbones, draw, make_pipeline, randomise
from torch import nn

from alter import InputError
from alter.backbones.conditioning import Conditioner
from alter.backbones.draws import generator
from alter.backbones.gates import Simulator

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_the_expert_of_the_timestep_before_it_was_rounded(name):
    """In bfloat16, with another expert at every timestep."""
    expert_T = np.arange(1000) % 4
    pipe = compare(name, lambda pipe: pipe.to(torch.bfloat16), expert_T=expert_T, num_inference_steps=8)
    exact = pipe.scheduler.timesteps
    rounded = (exact.to(torch.bfloat16) / 1000).float() * 1000
    changed = [expert_T[min(round(float(one)), 999)] != expert_T[min(round(float(two)), 999)]
               for one, two in zip(exact, rounded, strict=True)]
    assert any(changed)


def test_another_pipelines_timestep_is_not_taken_for_the_schedulers():
    """Of two that share a backbone: near in bfloat16, and not equal."""
    pipe = make_pipeline("flux").to(torch.bfloat16)
    experts = make_experts(pipe.transformer, expert_T=np.arange(1000) % 4)
    pipe.scheduler.set_timesteps(sigmas=[0.951, 0.5], mu=0.0)
    mine = pipe.scheduler.timesteps[0]
    with experts.apply(pipe):
        chooser = pipe.transformer._alter_applied.chooser
        for exact in (mine, mine - 6.0):
            told = (exact.to(torch.bfloat16) / 1000).float() * 1000
            expected = mine if exact is mine else told
            (found,) = chooser._unrounded([chooser._training(float(told / 1000))], torch.bfloat16)
            assert found == pytest.approx(float(expected), abs=1e-2)


def test_images_of_a_conditioner_are_those_of_a_pipeline_with_experts(tmp_path):
    """In bfloat16, with another expert at every timestep: validation images have the expert that users will have."""
    pipe = make_pipeline("flux", tmp_path).to(torch.bfloat16)
    experts = make_experts(pipe.transformer, expert_T=np.arange(1000) % 4)
    conditioner = Conditioner(tmp_path, "cpu", torch.bfloat16, (32, 32), guidance=3.5)
    with experts.apply(pipe):
        expected = pipe(prompt=PROMPTS, **SIZE, num_inference_steps=8, guidance_scale=3.5, output_type="pt",
                        generator=[generator(0, i, 7) for i in range(2)]).images
    with experts.serving(Simulator(pipe.transformer)):
        found = conditioner.draw(pipe.transformer, PROMPTS, 8, 3.5, 0)
    assert torch.equal(found, expected.float() * 2 - 1)
    assert not hasattr(pipe.transformer, "_alter_drawn_by")


IMAGE_TO_IMAGE = {"sd": "StableDiffusionImg2ImgPipeline", "sdxl": "StableDiffusionXLImg2ImgPipeline",
                  "sd3": "StableDiffusion3Img2ImgPipeline", "flux": "FluxImg2ImgPipeline"}


@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_image_to_image(name):
    def change(pipe):
        given = {"requires_safety_checker": False} if name == "sd" else {}
        return _quiet(getattr(diffusers, IMAGE_TO_IMAGE[name])(**pipe.components, **given))

    compare(name, change, image=PICTURE, strength=0.8, num_inference_steps=6)


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _controlnet(name, pipe):
    if name in ("sd", "sdxl"):
        return diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))
    config = {**pipe.transformer.config, "num_layers": 1}
    if name == "sd3":
        return diffusers.SD3ControlNetModel.from_config({**config, "dual_attention_layers": ()})
    return diffusers.FluxControlNetModel.from_config({**config, "num_single_layers": 1})


CONTROLNETS = {"sd": "StableDiffusionControlNetPipeline", "sdxl": "StableDiffusionXLControlNetPipeline",
               "sd3": "StableDiffusion3ControlNetPipeline", "flux": "FluxControlNetPipeline"}


@pytest.mark.parametrize("name", CONTROLNETS)
def test_controlnet(name):
    def change(pipe):
        torch.manual_seed(1)
        controlnet = _controlnet(name, pipe).eval().requires_grad_(False)
        randomise(controlnet)  # its last layers begin at zero
        given = {"requires_safety_checker": False} if name == "sd" else {}
        return _quiet(getattr(diffusers, CONTROLNETS[name])(**pipe.components, controlnet=controlnet, **given))

    image = {"image": PICTURE} if name in ("sd", "sdxl") else {"control_image": PICTURE}
    compare(name, change, num_inference_steps=4, **image)


def lora(backbone):
    """Adapters whose weights depend on their names alone."""
    from peft import LoraConfig

    backbone.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    for name, parameter in backbone.named_parameters():
        if ".lora_" in name:
            torch.manual_seed(zlib.crc32(name.encode()))
            nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["flux", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("sd3", "sdxl", "qwen", "wan", "z_image"))])
def test_adapters_loaded_before_or_after(name, when):
    pytest.importorskip("peft")
    compare(name, **{when: lora})


@pytest.mark.parametrize("name", ["flux", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "wan"))])
def test_a_lora_file_loads_and_unloads_while_experts_are_on(name, tmp_path):
    pytest.importorskip("peft")
    from peft.utils import get_peft_model_state_dict

    pipe, (component, backbone) = make_pipeline(name), [*backbones(make_pipeline(name)).items()][0]
    lora(backbone)
    pipe.save_lora_weights(tmp_path, **{f"{component}_lora_layers": get_peft_model_state_dict(backbone)})
    setattr(pipe, component, backbone)
    experts = make_experts(backbone)
    experts.apply(pipe)
    expected = draw(pipe)
    pipe = make_pipeline(name)
    experts.apply(pipe)
    plain = draw(pipe)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")  # diffusers 0.37 asks for it
    assert np.abs(draw(pipe) - expected).max() < 1e-5 < 1e-3 < np.abs(plain - expected).max()
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe), plain)


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen", "wan", "pixart", "sana", "z_image", "sdxl"])
def test_trim(name):
    """Every fourth layer is left out by all experts."""
    pipe, whole = make_pipeline(name), make_pipeline(name)
    backbone = [*backbones(pipe).values()][0]
    experts = make_experts(backbone)
    experts.mask_EL[:, ::4] = False
    experts.apply(whole)
    expected = draw(whole)
    before = sum(value.numel() * value.element_size() for value in backbone.parameters())
    freed = experts.trim(pipe)
    left = sum(value.numel() * value.element_size() for value in backbone.parameters())
    assert freed == before - left > 0
    assert np.array_equal(draw(pipe), expected)
    experts.remove(pipe)
    with pytest.raises(InputError, match="trimmed and has no dense form"):
        draw(pipe)


def test_experts_of_another_class():
    experts = make_experts(make_pipeline("flux").transformer)
    with pytest.raises(InputError) as caught:
        experts.apply(make_pipeline("sd3"))
    assert str(caught.value) == ("experts: they were trained on a FluxTransformer2DModel, and this is a "
                                 "SD3Transformer2DModel: use the backbone that they were trained on")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux", "qwen", "wan", "pixart", "sana", "z_image", "sdxl", "ltx"])
def test_compiled_layers(name):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        pipe = make_pipeline(name)
        backbone = [*backbones(pipe).values()][0]
        experts = make_experts(backbone)
        experts.apply(pipe)
        expected = draw(pipe, num_inference_steps=9)
        experts.compile(pipe, backend="eager")
        assert np.abs(draw(pipe, num_inference_steps=9) - expected).max() < 1e-5
        compiled = counters["stats"]["unique_graphs"]
        assert 0 < compiled <= len(experts.sites)
        draw(pipe, num_inference_steps=20)
        assert counters["stats"]["unique_graphs"] == compiled and not counters["graph_break"]
        experts.remove(pipe)
