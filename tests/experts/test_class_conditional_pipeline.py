"""Our pipeline for DiTs of any number of classes, with a VAE or without: the same images as a loop by hand draws."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_dit, make_vae
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from diffusers.utils import logging

from alter import ClassConditionalPipeline, InputError, TemporalExperts, load_pipeline
from alter.backbones.cost import count_cost
from alter.backbones.pretrained import export
from alter.common.load import CONFIGS
from alter.experts.load import load_dense

LABELS = [3, 9, 0]


def make_pipe(scheduler=None, **options):
    vae = options.pop("vae", None)
    with torch.no_grad():
        transformer = make_dit(**options).eval()
        for parameter in transformer.parameters():
            parameter.mul_(2)  # so that labels and layers show in the images
    pipe = ClassConditionalPipeline(transformer, scheduler or DDIMScheduler(clip_sample=False), vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(seeds=(1, 2, 3)):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def experts_of(transformer, seed=0):
    cost = count_cost(transformer, transformer.config.sample_size)
    mask_EL = np.array([[True, False, True, True], [True, True, False, False]])
    return TemporalExperts.build(mask_EL, (np.arange(1000) >= 500).astype(int), cost, 0.5, "total")


@torch.no_grad()
def by_hand(pipe, labels, scale, steps, seeds=(1, 2, 3)):
    model, solver, channels = pipe.transformer, pipe.scheduler, pipe.transformer.config.in_channels
    solver.set_timesteps(steps)
    latents = torch.cat([torch.randn(1, channels, 8, 8, generator=g) for g in generators(seeds)])
    labels, null = torch.tensor(labels), torch.full((len(labels),), 10)
    for t in solver.timesteps:
        pred = model(latents, t.expand(len(latents)), labels).sample[:, :channels]
        if scale != 1:
            base = model(latents, t.expand(len(latents)), null).sample[:, :channels]
            pred = base + scale * (pred - base)
        latents = solver.step(pred, t, latents).prev_sample
    return latents


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("options", [{}, {"channels": 4, "learned_sigma": True}, {"channels": 3}], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_images_are_those_of_a_loop_by_hand(scheduler, options, scale):
    pipe = make_pipe(scheduler(prediction_type="v_prediction"), **options)
    latents = pipe(LABELS, guidance_scale=scale, generator=generators(), num_inference_steps=4,
                   output_type="latent").images
    expected = by_hand(pipe, LABELS, scale, 4)
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)
    pixels = pipe(LABELS, scale, generators(), 4, "pt").images
    torch.testing.assert_close(pixels, (expected.clamp(-1, 1) + 1) / 2, atol=1e-4, rtol=1e-4)
    arrays = pipe(torch.tensor(LABELS), scale, generators(), 4, "np", return_dict=False)[0]
    assert np.array_equal(arrays, pixels.permute(0, 2, 3, 1).numpy())


def test_each_image_depends_on_its_generator_and_label_alone():
    pipe = make_pipe()
    together = pipe(LABELS, 3.0, generators(), 4, "pt").images
    for i, label in enumerate(LABELS):
        alone = pipe(label, 3.0, generators()[i : i + 1], 4, "pt").images
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-4, rtol=1e-4)
    stochastic = make_pipe(DDPMScheduler(clip_sample=False))
    together = stochastic(LABELS, 1.0, generators(), 4, "pt").images
    alone = stochastic(LABELS[1:2], 1.0, generators()[1], 4, "pt").images
    torch.testing.assert_close(alone, together[1:2], atol=1e-4, rtol=1e-4)


def test_pictures_are_grey_or_coloured_and_pass_the_vae():
    assert [picture.mode for picture in make_pipe()(LABELS, num_inference_steps=2).images] == ["L"] * 3
    assert make_pipe(channels=3)(2, num_inference_steps=2).images[0].mode == "RGB"
    pipe = make_pipe(channels=4, vae=make_vae())
    latents = pipe(LABELS, 2.0, generators(), 3, "latent").images
    with torch.no_grad():
        expected = pipe.vae.decode(latents / 0.5).sample
    torch.testing.assert_close(pipe(LABELS, 2.0, generators(), 3, "pt").images, (expected.clamp(-1, 1) + 1) / 2)


def test_it_draws_as_diffusers_pipeline_where_that_serves():
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000).eval()
    images = []
    for cls, scheduler in ((DiTPipeline, DDIMScheduler()), (ClassConditionalPipeline, DDIMScheduler())):
        pipe = cls(transformer=transformer, scheduler=scheduler, vae=make_vae())
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe([7, 999], guidance_scale=4.0, generator=generators((1, 2)), num_inference_steps=5,
                           output_type="np").images)
    np.testing.assert_allclose(*images, atol=1e-4)


def test_a_learned_variance_reaches_ddpm():
    kept = []
    pipe = make_pipe(DDPMScheduler(variance_type="learned_range", clip_sample=False), channels=4, learned_sigma=True)
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda pred, *arguments, generator=None: (
        kept.append(pred.shape[1]), step(pred, *arguments, generator=generator))[1]
    assert torch.isfinite(pipe(LABELS, 2.0, generators(), 3, "pt").images).all() and kept == [8] * 3


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_experts_skip_layers(scale):
    pipe, calls, seen = make_pipe(DPMSolverMultistepScheduler()), [], []
    dense = pipe(LABELS, scale, generators(), 6, "pt").images
    experts = experts_of(pipe.transformer)
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.register_forward_pre_hook(lambda module, arguments, index=index: calls.append(index))
    pipe.transformer.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(float(named["timestep"].reshape(-1)[0])), with_kwargs=True)
    with experts.apply(pipe):
        images = pipe(LABELS, scale, generators(), 6, "pt").images
    assert len(seen) == 6 and {t >= 500 for t in seen} == {True, False}
    assert calls == [i for t in seen for i in np.flatnonzero(experts.mask_EL[int(t >= 500)])]
    assert not torch.equal(images, dense) and torch.equal(pipe(LABELS, scale, generators(), 6, "pt").images, dense)


@pytest.mark.parametrize("arguments, message", [
    (dict(class_labels=[3, 10]), r"class_labels=\[3, 10\]: give at least one, each from 0 to 9"),
    (dict(class_labels=[-1]), "each from 0 to 9"), (dict(class_labels=[]), "give at least one"),
    (dict(class_labels=[0.5]), "each from 0 to 9"),
    (dict(class_labels=[1], generator=generators()), "generator: 3 for 1 images"),
    (dict(class_labels=[1], num_inference_steps=0), "num_inference_steps=0: give at least 1"),
    (dict(class_labels=[1], output_type="jpg"), "output_type='jpg': choose one of"),
], ids=["too large", "negative", "none", "no number", "generators", "steps", "output"])
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_pipe()(**arguments)


@pytest.mark.parametrize("name", ["dit-digits", "dit-glyphs", "dit-scenes"])
def test_what_a_demo_exports_is_loaded(tmp_path, name):
    template = CONFIGS / "models/demo" / name
    torch.manual_seed(0)
    model = DiTTransformer2DModel.from_config(DiTTransformer2DModel.load_config(template / "transformer"))
    size, count = model.config.sample_size, len(model.transformer_blocks)
    export(tmp_path / "final", template, model)
    cost = count_cost(model, size)
    TemporalExperts.build(np.arange(count)[None] % 2 == 0, np.zeros(1000, dtype=int), cost, 0.5, "total") \
        .save_pretrained(tmp_path / "final")
    pipe = load_pipeline(tmp_path / "final")
    assert isinstance(pipe, ClassConditionalPipeline) and hasattr(pipe.transformer, "_alter_applied")
    picture = pipe(1, num_inference_steps=2).images[0]
    assert picture.size == (size, size) and picture.mode == ("L" if model.config.in_channels == 1 else "RGB")
    dense = load_dense(tmp_path / "final", torch_dtype=torch.bfloat16)
    assert not hasattr(dense.transformer, "_alter_applied") and dense.transformer.dtype == torch.bfloat16
    assert dense(1, num_inference_steps=2, output_type="np").images.shape == (1, size, size, model.config.in_channels)


@pytest.mark.parametrize("classes, vae, wanted", [(10, True, ClassConditionalPipeline), (1000, True, DiTPipeline),
                                                  (1000, False, ClassConditionalPipeline)])
def test_the_class_is_chosen_by_what_diffusers_pipeline_can_draw(tmp_path, classes, vae, wanted):
    """Folders of runs before this class name DiTPipeline."""
    transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
                                        num_layers=4, sample_size=8, patch_size=2, num_embeds_ada_norm=classes)
    ClassConditionalPipeline(transformer, DDIMScheduler(), make_vae() if vae else None).save_pretrained(tmp_path)
    experts_of(transformer).save_pretrained(tmp_path)
    assert type(load_dense(tmp_path)) is ClassConditionalPipeline  # the name is ours
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "DiTPipeline"}))
    assert type(load_pipeline(tmp_path)) is wanted


def test_what_is_no_pipeline_is_refused_in_one_line(tmp_path):
    logging.set_verbosity_error()
    experts_of(make_dit()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no pipeline can be loaded") as caught:
        load_pipeline(tmp_path)
    assert "\n" not in str(caught.value)


def test_it_is_imported_on_first_use():
    code = "import alter, sys; assert 'torch' not in sys.modules; alter.ClassConditionalPipeline"
    subprocess.run([sys.executable, "-c", code], check=True)
