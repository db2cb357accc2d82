"""What is drawn to measure a sampler where nobody says what."""

import inspect
from typing import Any

from ..common.errors import InputError

_COUNT = 24
_PROMPTS = (
    "a photograph of a dog running through grass", "a bowl of fruit on a wooden table", "a city street in the rain",
    "a portrait of an old fisherman", "a red bicycle against a white wall", "mountains behind a lake at sunrise",
    "a watercolour of a sailing boat", "a child's drawing of a house and a tree",
)


def usual_call(pipe: Any) -> dict[str, Any]:
    """Conditions of two dozen images, as arguments of `pipe`: plain prompts, or classes spread over all that it has.

    Raises:
        InputError: if it takes other ones.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    if "class_labels" in accepted:
        classes = pipe.transformer.config.num_embeds_ada_norm
        return {"class_labels": [i * classes // _COUNT for i in range(_COUNT)]}
    if "prompt" not in accepted:
        raise InputError(f"plan: a {type(pipe).__name__} takes no prompts: give `call`, its arguments")
    return {"prompt": [_PROMPTS[i % len(_PROMPTS)] for i in range(_COUNT)]}
