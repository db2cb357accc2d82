"""Guidance: how a pipeline is told its scale, and what that scale means."""

import inspect
from typing import Any

from .family import Backbone, backbone_class

# How a pipeline is told to draw without guidance, in the order of preference; some count from 0.
_UNGUIDED = {"true_cfg_scale": 1.0, "guidance_scale": 1.0}
_UNGUIDED_AT_ZERO = ("Krea2", "ZImage")


def guided(pipe: Any, backbone: Backbone, scale: float, count: int) -> dict[str, Any]:
    """Arguments with which a pipeline draws `count` images at a guidance scale in units of its own; 1: without."""
    accepted, told = inspect.signature(pipe.__call__).parameters, backbone.config.get("guidance_embeds")
    if scale == 1 and not told:
        return unguided(pipe, backbone)
    if "true_cfg_scale" in accepted and not told:
        return {"true_cfg_scale": scale, "negative_prompt": [""] * count}
    return {"guidance_scale": scale}


def guidance_of(backbone: Backbone, scale: float) -> float:
    """The scale of classifier-free guidance, s in uncond + s·(cond - uncond), that a pipeline's scale means; 1,
    without, where the backbone is told its guidance instead."""
    if backbone.config.get("guidance_embeds"):
        return 1.0
    return scale + 1 if scale != 1 and backbone_class(backbone).__name__.startswith(_UNGUIDED_AT_ZERO) else scale


def unguided(pipe: Any, backbone: Backbone, told: float | None = None) -> dict[str, Any]:
    """Arguments with which a pipeline, if it accepts them, draws without classifier-free guidance.

    told: the guidance that a backbone which is told one is told; None: the pipeline's.
    """
    if backbone.config.get("guidance_embeds"):
        return ({} if told is None else {"guidance_scale": told}) | {"true_cfg_scale": 1.0}
    if type(pipe).__name__.startswith(_UNGUIDED_AT_ZERO):
        return {"guidance_scale": 0.0}
    accepted = inspect.signature(pipe.__call__).parameters
    name = next((name for name in _UNGUIDED if name in accepted), None)
    return {} if name is None else {name: _UNGUIDED[name]}
