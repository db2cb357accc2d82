"""Loading what alter saved."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..backbones.sites import PIPELINE_COMPONENT, named_sites
from ..common.errors import InputError
from .artefact import TemporalExperts
from .trim import WEIGHTS, load_trimmed, trim_layers


def load_pipeline(source: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """A pipeline with an `experts.json`, with its experts applied.

    Args:
        source: a folder, trimmed or not, or the hub id of an untrimmed pipeline.
        kwargs: passed to `DiffusionPipeline.from_pretrained`, for example `dtype`.

    Raises:
        InputError: if there is no `experts.json`, or a trimmed backbone's weights do not fit it.
    """
    experts = TemporalExperts.from_pretrained(source)
    components = {}
    for cls, component in PIPELINE_COMPONENT.items():
        folder = Path(source) / component
        if (folder / WEIGHTS).is_file():
            if list(folder.glob("diffusion_pytorch_model*")):
                raise InputError(f"{folder}: holds trimmed and untrimmed weights: remove those that are not meant")
            backbone = load_trimmed(folder, cls, lambda model: trim_layers(
                model, named_sites(model, experts.sites), experts.mask_EL, experts.used))
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            if isinstance(dtype, dict):
                dtype = dtype.get(component, dtype.get("default"))
            components[component] = backbone.to(dtype) if isinstance(dtype, torch.dtype) else backbone
    pipe = DiffusionPipeline.from_pretrained(str(source), **components, **kwargs)
    experts.apply(pipe)
    return pipe
