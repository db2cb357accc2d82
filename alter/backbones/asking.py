"""How a pipeline sets its scheduler's timesteps, asked of the pipeline itself, without weights or text encoders."""

import copy
import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..common.errors import InputError
from .family import COMPONENTS
from .pretrained import component_of, hollow, read_config

_LENGTH = 8  # of a text, and of its states' width: any that is not one


class Stopped(BaseException):
    """Ends a pipeline's call. Not an Exception, which the pipeline might catch."""


def asked_timesteps(folder: Path, scheduler: Any, steps: int, size: tuple[int, ...]) -> dict[str, Any]:
    """The arguments with which the pipeline in `folder` calls `set_timesteps` of its scheduler, but for the device.

    It is called with zeros for the states of a text, and stopped there.

    Args:
        scheduler: the pipeline's. steps: denoising steps.
        size: (height, width) of the images in pixels, or (frames, height, width) of videos.

    Raises:
        InputError: if it cannot be called so.
    """
    index = read_config(folder / "model_index.json")
    name, told = str(index.get("_class_name")), {}
    listening, signature = copy.copy(scheduler), inspect.signature(scheduler.set_timesteps)

    def stop(*args: Any, **kwargs: Any) -> None:
        told.update(signature.bind(*args, **kwargs).arguments)
        raise Stopped

    stop.__signature__ = signature  # type: ignore[attr-defined]  # pipelines ask what it takes
    listening.set_timesteps = stop
    try:
        parts = {part: _part(folder, part, value) for part, value in index.items() if not part.startswith("_")}
        pipe: Any = getattr(diffusers, name)(**{**parts, "scheduler": listening})
        pipe(**_arguments(pipe, steps, size))
    except Stopped:
        return {key: value for key, value in told.items() if value is not None and key != "device"}
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: its {name} does not tell how it sets timesteps "
                         f"({' '.join(str(error).split())[:200]})") from None
    raise InputError(f"{folder}: its {name} does not set timesteps")


def _part(folder: Path, name: str, value: Any) -> Any:
    """Of the pipeline: a setting, a model without weights, or nothing in place of what reads text."""
    if not isinstance(value, list):
        return value
    if not (folder / name / "config.json").is_file() or name not in (*COMPONENTS, "vae"):
        return None
    cls = component_of(folder, wanted=name)[0] if name in COMPONENTS else getattr(diffusers, value[1])
    return hollow(cls, folder / name, "cpu", torch.float32)


def _arguments(pipe: Any, steps: int, size: tuple[int, ...]) -> dict[str, Any]:
    """Of the pipeline's call, for one text, without guidance."""
    accepted = inspect.signature(pipe.__call__).parameters
    layers = len(pipe.config.get("text_encoder_select_layers") or ())  # of each token, in Krea 2
    wanted: dict[str, Any] = {"height": size[-2], "width": size[-1], "num_inference_steps": steps,
                              "guidance_scale": 0.0, "true_cfg_scale": 1.0, "output_type": "latent"}
    if len(size) == 3:
        wanted["num_frames"] = size[0]
    inner = (layers, _LENGTH) if layers else (_LENGTH,)
    for name in accepted:
        if "mask" in name and name.startswith("prompt_"):
            wanted[name] = torch.ones(1, _LENGTH, dtype=torch.long)
        elif "prompt_embeds" in name and not name.startswith("negative"):
            outer = (1, 1) if "llama3" in name else (1,)  # HiDream's layers
            wanted[name] = torch.zeros(*outer, _LENGTH, *(() if "pooled" in name else inner))
        elif name == "prior_token_ids":  # GLM-Image
            wanted[name] = torch.zeros(1, _LENGTH, dtype=torch.long)
    return {name: value for name, value in wanted.items() if name in accepted}
