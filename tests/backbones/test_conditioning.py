"""What conditions a backbone, against what the pipeline itself makes of its answer."""

import warnings

import pytest
import torch
from pipelines import PIPELINES, PROMPTS, VIDEOS, backbones, make_pipeline, received

from alter.backbones.conditioning import Conditioner, join
from alter.backbones.family import predict
from alter.backbones.inputs import timestep_features
from alter.backbones.pretrained import load_backbone
from alter.experts.load import load_dense

TO_ROUNDING = ("sdxl", "z_image")


def make_conditioner(name, folder):
    size = (5, 32, 32) if name in VIDEOS else (32, 32)
    return Conditioner(folder, "cpu", torch.float32, size, guidance=3.5)


@pytest.mark.parametrize("name", PIPELINES)
def test_what_the_scheduler_receives(name, tmp_path):
    pipe = make_pipeline(name, tmp_path)
    conditioning = make_conditioner(name, tmp_path)(PROMPTS)
    answer, latents, timestep = received(pipe, name, PROMPTS, steps=2)
    backbone = [*backbones(pipe).values()][-1]  # Wan 2.2's second step is that of its second transformer
    with torch.no_grad():
        found = predict(backbone, latents, timestep.expand(2), conditioning.arguments())[:, : answer.shape[1]]
    if name in TO_ROUNDING:
        torch.testing.assert_close(found, answer, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, answer)


@pytest.mark.parametrize("name", PIPELINES)
def test_rows_are_those_of_each_prompt_alone(name, tmp_path):
    make_pipeline(name, tmp_path)
    conditioner = make_conditioner(name, tmp_path)
    together, alone = conditioner(PROMPTS), [conditioner([prompt]) for prompt in PROMPTS]
    joined = join([each.rows for each in alone], conditioner.backbone)
    assert joined.keys() == together.rows.keys() and joined
    for key, value in together.rows.items():
        torch.testing.assert_close(joined[key], value, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert together.shared.keys() == alone[0].shared.keys()
    for key, value in together.shared.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, alone[0].shared[key]), key
        else:
            assert value == alone[0].shared[key], key


@pytest.mark.parametrize("name", ["sd", "sdxl", "qwen", "z_image"])
def test_a_dropped_prompt_is_the_empty_one(name, tmp_path):
    make_pipeline(name, tmp_path)
    conditioner = make_conditioner(name, tmp_path)
    rows = conditioner(PROMPTS, torch.tensor([False, True])).rows
    expected = conditioner([PROMPTS[0], ""]).rows
    if name == "sdxl":
        expected["encoder_hidden_states"][1] = 0  # as it guides away from an empty prompt
        expected["added_cond_kwargs.text_embeds"][1] = 0
    torch.testing.assert_close(rows, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["wan22", "flux", "sd"])
def test_the_pipeline_has_no_weights_of_a_backbone(name, tmp_path):
    make_pipeline(name, tmp_path)
    conditioner = make_conditioner(name, tmp_path)
    there = backbones(conditioner.pipe)
    assert len(there) == (2 if name == "wan22" else 1) and conditioner.backbone in there.values()
    assert sum(parameter.numel() for each in there.values() for parameter in each.parameters()) == 0


def test_images_without_guidance_cost_one_forward_a_step(tmp_path):
    pipe = make_pipeline("z_image", tmp_path)  # whose pipeline guides at a scale of 1 too
    batches = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    conditioner = make_conditioner("z_image", tmp_path)
    conditioner.draw(pipe.transformer, PROMPTS, 2, 1.0, 0)
    assert set(batches) == {len(PROMPTS)}
    assert conditioner.pipe.transformer is conditioner.backbone


@pytest.mark.parametrize("name", ["qwen", "flux", "sd"])
def test_neighbouring_timesteps_have_like_features(name, tmp_path):
    (backbone,) = backbones(make_pipeline(name, tmp_path)).values()
    features = timestep_features(backbone, 1000)
    alike = torch.cosine_similarity(features[1:], features[:-1], dim=1)
    assert features.shape[0] == 1000 and alike.mean() > 0.8


def test_parts_are_loaded_without_a_warning_about_their_precision(tmp_path):
    make_pipeline("flux", tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dtype.*")
        conditioner = make_conditioner("flux", tmp_path)
        backbone = load_backbone(tmp_path, dtype=torch.bfloat16)
        pipes = [load_dense(tmp_path, **{name: torch.bfloat16}) for name in ("dtype", "torch_dtype")]
    assert conditioner.pipe.vae.dtype == torch.float32 and backbone.dtype == torch.bfloat16
    assert [pipe.transformer.dtype for pipe in pipes] == [torch.bfloat16] * 2
