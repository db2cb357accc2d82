"""How a pipeline sets its timesteps, as it tells without weights, against what it does and against its formulas."""

import inspect
import json
import math

import diffusers
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from pipelines import draw, make_pipeline, unguided
from zoo import ZOO, of_the_newest

from alter.backbones.asking import asked_timesteps
from alter.backbones.schedules import load_scheduler

TOKENS = 64  # of 128 x 128 pixels, by a VAE's 8 and patches of 2


def with_steps(scheduler, given):
    scheduler.set_timesteps(**given)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("name", ["flux2", "flux", "qwen", pytest.param("z_image", marks=of_the_newest), "sd3", "ltx",
                                  "sana", "wan", "wan22"])
def test_a_pipeline_tells_what_it_does(name, tmp_path):
    pipe = make_pipeline(name, tmp_path)
    draw(pipe, num_inference_steps=5, **unguided(name))
    size = (5, 32, 32) if name in ("ltx", "wan", "wan22") else (32, 32)
    scheduler = load_scheduler(tmp_path)
    told = asked_timesteps(tmp_path, scheduler, 5, size)
    assert with_steps(scheduler, told) == pipe.scheduler.timesteps.tolist()


def save(folder, pipeline, backbone, vae="AutoencoderKL", vae_config=None, **settings):
    """A pipeline's folder with configurations alone."""
    cls = getattr(diffusers, pipeline)
    getattr(diffusers, backbone)(**ZOO[backbone].config).save_config(folder / "transformer")
    stages = {"block_out_channels": (32,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4,
              "up_block_types": ("UpDecoderBlock2D",) * 4}
    getattr(diffusers, vae)(**(stages if vae_config is None else vae_config)).save_config(folder / "vae")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75).save_pretrained(
        folder / "scheduler")
    parts = {name: ["transformers", "Any"] for name, one in inspect.signature(cls.__init__).parameters.items()
             if name != "self" and one.default is one.empty}
    parts |= {"transformer": ["diffusers", backbone], "vae": ["diffusers", vae]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **parts, **settings}))
    return folder


ROOT = math.sqrt(TOKENS / 256) * 0.75 + 0.25  # CogView4's and GLM-Image's
LINE = 0.25 + (TOKENS - 256) * (0.75 - 0.25) / (4096 - 256)
HIDREAM = 0.5 + (4 - 256) * (1.15 - 0.5) / (4096 - 256)  # by the 4 tokens of its largest image, whatever the size
EVEN = [1, 0.8, 0.6, 0.4, 0.2]


@pytest.mark.parametrize("pipeline, backbone, options, mu, sigmas", [
    ("CogView4Pipeline", "CogView4Transformer2DModel", {}, ROOT, [1, 0.75, 0.5, 0.25, 0.001]),
    ("GlmImagePipeline", "GlmImageTransformer2DModel", {}, ROOT, EVEN),
    ("HiDreamImagePipeline", "HiDreamImageTransformer2DModel", {}, HIDREAM, None),
    ("EasyAnimatePipeline", "EasyAnimateTransformer3DModel",
     {"vae": "AutoencoderKLMagvit", "vae_config": {}}, 1.0, None),
    ("Krea2Pipeline", "Krea2Transformer2DModel",
     {"vae": "AutoencoderKLQwenImage", "vae_config": {}, "is_distilled": False, "patch_size": 2}, LINE, EVEN),
    ("Krea2Pipeline", "Krea2Transformer2DModel",
     {"vae": "AutoencoderKLQwenImage", "vae_config": {}, "is_distilled": True, "patch_size": 2}, 1.15, EVEN)])
def test_formulas_of_their_own(tmp_path, pipeline, backbone, options, mu, sigmas):
    if not hasattr(diffusers, pipeline) or backbone not in ZOO:
        pytest.skip(f"this diffusers has no {pipeline}")
    folder = save(tmp_path, pipeline, backbone, **options)
    size = (5, 128, 128) if "EasyAnimate" in pipeline else (128, 128)
    told = asked_timesteps(folder, load_scheduler(folder), 5, size)
    assert told["mu"] == pytest.approx(mu)
    assert (told.get("sigmas") is None) if sigmas is None else np.allclose(told["sigmas"], sigmas)
