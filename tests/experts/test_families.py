"""Experts in the pipelines of each family, against copies whose layers were removed by hand."""

import numpy as np
import pytest
from by_hand import compare, make_experts
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from pipelines import PIPELINES, PROMPTS, draw, make_pipeline

from alter import load_pipeline


@pytest.mark.parametrize("name", PIPELINES)
def test_text_to_image_or_video(name):
    compare(name, num_inference_steps=4)


@pytest.mark.parametrize("name", ["sd3", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("flux", "qwen", "z_image"))])
def test_a_saved_pipeline_loads_with_its_experts(name, tmp_path):
    """Also Stable Diffusion 3 without its third text encoder, which diffusers itself does not load so."""
    pipe = make_pipeline(name, tmp_path)
    experts = make_experts(pipe.transformer)
    experts.save_pretrained(tmp_path)
    experts.apply(pipe)
    loaded = load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    assert np.abs(draw(loaded) - draw(pipe)).max() < 1e-6  # some CPUs round by where weights lie in memory


@pytest.mark.parametrize("name", ["qwen", "wan", "sdxl", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("sd3", "z_image"))])
def test_batches_and_guidance(name):
    guidance = {"true_cfg_scale": 3.0, "negative_prompt": "a"} if name == "qwen" else {"guidance_scale": 3.0}
    compare(name, prompts=PROMPTS, num_inference_steps=4, **guidance)


def _with(scheduler, **options):
    def change(pipe):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
        return pipe
    return change


BETAS = [DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler,
         UniPCMultistepScheduler]


@pytest.mark.parametrize("scheduler", BETAS)
@pytest.mark.parametrize("name", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_schedulers_of_betas(name, scheduler):
    compare(name, _with(scheduler), num_inference_steps=4)


_STATIC = FlowMatchEulerDiscreteScheduler, {"shift": 2.0, "use_dynamic_shifting": False, "shift_terminal": None}
_DYNAMIC = FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}
_SOLVERS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
FLOWS = {
    "sd3": [_STATIC, _DYNAMIC, (FlowMatchHeunDiscreteScheduler, {}), (UniPCMultistepScheduler, _SOLVERS),
            (DPMSolverMultistepScheduler, _SOLVERS)],
    "flux": [_STATIC, _DYNAMIC, (UniPCMultistepScheduler, _SOLVERS), (DPMSolverMultistepScheduler, _SOLVERS)],
    "qwen": [_STATIC, _DYNAMIC],
    "wan": [_STATIC, (DPMSolverMultistepScheduler, _SOLVERS)],
    "z_image": [_STATIC, _DYNAMIC],
    "sana": [_STATIC, (UniPCMultistepScheduler, _SOLVERS)],
}


@pytest.mark.parametrize("name, scheduler, options", [
    pytest.param(name, *each, marks=[] if name == "sd3" else pytest.mark.slow)
    for name, many in FLOWS.items() for each in many])
def test_schedulers_of_flows(name, scheduler, options):
    compare(name, _with(scheduler, **options), num_inference_steps=4)
