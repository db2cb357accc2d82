"""How pipelines are told their guidance, and what it means, against what they compute."""

import pytest
import torch
from pipelines import PROMPTS, SIZE, make_pipeline

from alter.backbones.guidance import guidance_of, guided, unguided


@pytest.mark.parametrize(("name", "scale"), [("sd3", 4.0), ("qwen", 4.0), ("z_image", 4.0), ("flux", 3.5)])
def test_a_pipelines_scale(name, scale):
    """The first step's output is uncond + s * (cond - uncond), of which s is `guidance_of` the scale."""
    pipe, stepped, outputs = make_pipeline(name), [], []
    step = pipe.scheduler.step

    def keep(output, *given, **named):
        stepped.append(output)
        return step(output, *given, **named)

    pipe.scheduler.step = keep
    hook = pipe.transformer.register_forward_hook(lambda module, given, output: outputs.append(output[0]))

    def first(arguments):
        stepped.clear(), outputs.clear()
        pipe(prompt=PROMPTS[:1], **SIZE, num_inference_steps=1, output_type="latent", **arguments,
             generator=[torch.Generator().manual_seed(0)])
        return stepped[0].float()

    guidance, with_scale = guidance_of(pipe.transformer, scale), first(guided(pipe, pipe.transformer, scale, 1))
    told = list(outputs)
    if guidance == 1:  # told to the backbone
        assert name == "flux" and len(told) == 1 and pipe.transformer.config.guidance_embeds
    else:
        cond = first(unguided(pipe, pipe.transformer, None))
        twice = first(guided(pipe, pipe.transformer, 2 * scale, 1))  # linear in s: two points give the line
        slope = (twice - with_scale) / (guidance_of(pipe.transformer, 2 * scale) - guidance)
        assert len(told) == (2 if name == "qwen" else 1)  # with and without the prompt, in one batch or two
        if name != "qwen":  # which rescales what guidance makes of it
            assert torch.allclose(with_scale - (guidance - 1) * slope, cond, atol=1e-4)
        assert not torch.allclose(with_scale, cond, atol=1e-4)
    hook.remove()
