"""What is drawn to measure a sampler where nobody says what."""

import inspect
from typing import Any

from ..backbones.guidance import guided
from ..common.errors import InputError
from .apply import backbone_of

_COUNT = 24
_PROMPTS = (
    "a photograph of a dog running through grass", "a bowl of fruit on a wooden table", "a city street in the rain",
    "a portrait of an old fisherman", "a red bicycle against a white wall", "mountains behind a lake at sunrise",
    "a watercolour of a sailing boat", "a child's drawing of a house and a tree",
)


def usual_call(pipe: Any) -> dict[str, Any]:
    """Conditions of two dozen images, as arguments of `pipe`: plain prompts, or classes spread over all that it has; at
    its own size and guidance.

    Raises:
        InputError: if it takes other ones.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    if "class_labels" in accepted:
        classes = pipe.transformer.config.num_embeds_ada_norm
        return {"class_labels": [i * classes // _COUNT for i in range(_COUNT)]}
    if "prompt" not in accepted:
        raise InputError(f"plan: {type(pipe).__name__} takes no prompts: give `call`, its arguments")
    scale = getattr(accepted.get("true_cfg_scale"), "default", 1.0)
    return {"prompt": [_PROMPTS[i % len(_PROMPTS)] for i in range(_COUNT)],
            **({} if scale == 1 else guided(pipe, backbone_of(pipe), scale, _COUNT))}
