"""Loading what alter saved."""

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from .experts import TemporalExperts
from .sites import PIPELINE_COMPONENT
from .trimming import WEIGHTS, load_trimmed, trim_layers


def load_pipeline(folder: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """A pipeline folder with an `experts.json`, trimmed or not, with its experts applied.

    Args:
        kwargs: passed to `DiffusionPipeline.from_pretrained`, for example `torch_dtype`.

    Raises:
        InputError: if the folder has no `experts.json`, or a trimmed backbone's weights do not fit it.
    """
    experts, folder = TemporalExperts.from_pretrained(folder), Path(folder)
    components = {}
    for cls, component in PIPELINE_COMPONENT.items():
        if (folder / component / WEIGHTS).is_file():
            backbone = load_trimmed(folder / component, cls,
                                    lambda model: trim_layers(model, experts.mask_EL, experts.used))
            components[component] = backbone.to(kwargs.get("torch_dtype"))
    pipe = DiffusionPipeline.from_pretrained(folder, **components, **kwargs)
    experts.apply(pipe)
    return pipe
