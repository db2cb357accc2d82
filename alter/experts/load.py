"""Loading what alter saved."""

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from .artefact import TemporalExperts


def load_pipeline(source: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """A pipeline with an `experts.json`, with its experts applied.

    Args:
        source: a folder or a hub id.
        kwargs: passed to `DiffusionPipeline.from_pretrained`, for example `torch_dtype`.

    Raises:
        InputError: if there is no `experts.json`, or it does not fit the backbone.
    """
    experts = TemporalExperts.from_pretrained(source)
    pipe = DiffusionPipeline.from_pretrained(str(source), **kwargs)
    experts.apply(pipe)
    return pipe
