"""Loading what alter saved."""

import contextlib
import inspect
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from torch import nn

from ..backbones.family import COMPONENTS
from ..backbones.lora import BASE, Base, put_adapters
from ..backbones.lora import FILE_NAME as ADAPTERS
from ..backbones.pretrained import absent_parts, meta_backbone, precision
from ..common.errors import InputError
from .artefact import NoExperts, TemporalExperts, fetch
from .pipeline import ClassConditionalPipeline

_FROM_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_DIT = "DiTPipeline"  # diffusers'
_IMAGENET = 1000  # its null class


def load_pipeline(source: str | Path, base: str | Path | None = None, keep_ratio: float | None = None,
                  **kwargs: Any) -> Any:
    """A pipeline with an `experts.json`, with its experts applied; those of its second backbone too, if it has some.

    Args:
        source: a folder or a hub id; where it holds the adapters of a run alone, they are added to their base pipeline.
        base: of such adapters, if it is not where base.json beside them says: a folder or a hub id.
        keep_ratio: as of `TemporalExperts.apply`.
        kwargs: passed to diffusers' `from_pretrained`, for example `dtype` (or `torch_dtype`, its
            former name; this diffusers is given the one that it knows).

    Raises:
        InputError: if there is no `experts.json`, it does not fit the backbone, it has no rung that low, or there is no
            base pipeline.
    """
    hub = _hub(kwargs)
    found = [TemporalExperts.from_pretrained(source, **hub)]
    found[0].pick(keep_ratio)  # to be refused before the weights are read
    pipe = load_dense(source, base, **kwargs)
    backbones = [name for name in COMPONENTS if isinstance(getattr(pipe, name, None), nn.Module)]
    for component in backbones[1:]:
        if component != found[0].component:
            with contextlib.suppress(NoExperts):
                found.append(TemporalExperts.from_pretrained(source, component=component, **hub))
    for experts in found:
        experts.apply(pipe, keep_ratio)
    return pipe


def load_dense(source: str | Path, base: str | Path | None = None, **kwargs: Any) -> Any:
    """A pipeline as `load_pipeline` makes it, without experts.

    It is of the class that its model_index.json names; a `ClassConditionalPipeline` for a DiT without a VAE or of
    another number of classes than 1000, which diffusers' DiTPipeline cannot draw with.

    Raises:
        InputError: if there is no pipeline.
    """
    file = _base_file(source, _hub(kwargs))
    if file is None:
        if base is not None:
            raise InputError(f"base={str(base)!r}: {source} is a whole pipeline: leave base out")
        return _load(source, kwargs)
    record = Base.read(file)
    place = record.place(source) if base is None else str(base)
    given = {**record.arguments, **kwargs}
    given.pop("revision", None)
    if base is None and record.revision is not None:
        given["revision"] = record.revision
    pipe = _load(place, given)
    adapters = fetch(source, ADAPTERS, _hub(kwargs))
    try:
        if hasattr(pipe, "load_lora_weights"):
            second = {"load_into_transformer_2": True} if record.component == COMPONENTS[-1] else {}
            pipe.load_lora_weights(str(adapters.parent), weight_name=ADAPTERS, **second)
        else:
            put_adapters(getattr(pipe, record.component), load_file(adapters), record.component)
    except (ImportError, KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"{source}: its adapters cannot be added to {place} ({' '.join(str(error).split())[:200]}): "
                         "pip install peft, and name the base pipeline that they were trained on") from None
    return pipe


def _base_file(source: str | Path, hub: dict[str, Any]) -> Path | None:
    """Of a source that holds adapters alone."""
    try:
        return fetch(source, BASE, hub)
    except (EntryNotFoundError, OSError, ValueError):  # diffusers says it better if there is nothing at all
        return None


def _load(source: str | Path, kwargs: dict[str, Any]) -> Any:
    try:
        ours = pipeline_class(source, **_hub(kwargs)) == ClassConditionalPipeline.__name__
        cls: Any = ClassConditionalPipeline if ours else DiffusionPipeline
        index = DiffusionPipeline.load_config(str(source), **_hub(kwargs))
        return cls.from_pretrained(str(source), **absent_parts(index) | precision(kwargs))
    except (AttributeError, KeyError, OSError, ValueError) as error:
        raise InputError(f"{source}: no pipeline can be loaded ({' '.join(str(error).split())[:200]}): give a finished "
                         "run's final/, or a diffusers pipeline") from None


def _hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _FROM_THE_HUB if name in kwargs}


def pipeline_class(source: str | Path, **hub: Any) -> str:
    """The name of the class that `load_dense` makes of a pipeline; `hub`: of its arguments, those of the hub."""
    index = DiffusionPipeline.load_config(str(source), **hub)
    name = index["_class_name"]
    if name == _DIT and not _for_dit_pipeline(str(source), index, hub):
        return ClassConditionalPipeline.__name__
    return name


def usual_guidance(folder: Path) -> float:
    """The guidance scale that a pipeline's class draws with unless told otherwise; 1 where it has none."""
    name = pipeline_class(folder)
    cls: Any = ClassConditionalPipeline if name == ClassConditionalPipeline.__name__ else getattr(diffusers, name, None)
    known = inspect.signature(cls.__call__).parameters if cls is not None else {}
    told = bool(meta_backbone(folder).config.get("guidance_embeds"))
    names = ("guidance_scale",) if told else ("true_cfg_scale", "guidance_scale")
    default = next((known[name].default for name in names if name in known), None)
    return max(1.0, float(default)) if isinstance(default, int | float) else 1.0


def _for_dit_pipeline(source: str, index: dict[str, Any], hub: dict[str, Any]) -> bool:
    if index.get("vae", [None])[0] is None:
        return False
    config: Any = DiTTransformer2DModel.load_config(source, subfolder="transformer", **hub)
    return config.get("num_embeds_ada_norm", _IMAGENET) == _IMAGENET
