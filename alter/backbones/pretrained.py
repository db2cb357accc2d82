"""Pretrained diffusers folders: their backbone, VAE and training schedule, read and written."""

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from torch import nn

from ..common.errors import InputError
from ..common.files import publish
from ..method.diffusion import PREDICTION_TYPES
from .lora import plain_state
from .sites import PIPELINE_COMPONENT, Backbone

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def local_folder(pretrained: str, revision: str | None = None, field: str = "backbone.pretrained") -> Path:
    """The folder of a pretrained pipeline; a hub id is downloaded into the hub's cache first.

    Raises:
        InputError: naming `field`, if there is neither such a folder nor such a hub id.
    """
    if Path(pretrained).is_dir():
        return Path(pretrained)
    try:
        return Path(DiffusionPipeline.download(pretrained, revision=revision))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{field}={pretrained!r}: no such folder, and the hub gave nothing "
                         f"({reason}): give a diffusers folder or a hub id") from None


def component_of(folder: Path) -> tuple[type[Backbone], str]:
    """The class and the sub-folder of a pipeline folder's backbone; reads JSON only.

    Raises:
        InputError: if there is none, or it is of another class.
    """
    for cls, component in PIPELINE_COMPONENT.items():
        file = folder / component / "config.json"
        if file.is_file():
            found = cls.load_config(folder / component).get("_class_name", cls.__name__)
            if found == cls.__name__:
                return cls, component
            known = " and ".join(known.__name__ for known in PIPELINE_COMPONENT)
            raise InputError(f"backbone.pretrained={str(folder)!r}: a {found} has no sites known to alter, "
                             f"which prunes {known}")
    raise InputError(f"backbone.pretrained={str(folder)!r} has neither unet/ nor transformer/: "
                     "give a diffusers pipeline folder")


def condition_of(folder: Path) -> str:
    """What a pipeline folder's backbone is conditioned on: "class" or "text"; raises as `component_of`."""
    return "class" if component_of(folder)[0].__name__ == "DiTTransformer2DModel" else "text"


def load_backbone(folder: Path) -> Backbone:
    """The pipeline's UNet or DiT in fp32, from safetensors (or, with `weights_only`, older weight files).

    Raises:
        InputError: if it cannot be loaded, or weights are missing.
    """
    cls, component = component_of(folder)
    return _load(cls, folder / component, torch.float32)


def load_scheduler(folder: Path) -> DDPMScheduler:
    """The training schedule, with the betas and the prediction type of the pipeline's scheduler.

    Raises:
        InputError: if there is no scheduler, or one of another prediction type.
    """
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise InputError(f"backbone.pretrained={str(folder)!r} has no scheduler/scheduler_config.json")
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    kind = scheduler.config.prediction_type
    if kind not in PREDICTION_TYPES:
        raise InputError(f"{folder / 'scheduler'}: prediction_type={kind!r}: use one of {', '.join(PREDICTION_TYPES)}")
    return scheduler


def load_vae(folder: Path, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKL:
    """The pipeline's VAE, frozen.

    Raises:
        InputError: if it cannot be loaded.
    """
    return _load(AutoencoderKL, folder / "vae", dtype).requires_grad_(False).eval().to(device)


def shift_of(vae: AutoencoderKL) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0


def latent_size(folder: Path, resolution: int) -> int:
    """Side of the latents: `resolution` in pixels, divided by the VAE's factor if the pipeline has a VAE.

    Raises:
        InputError: if the factor does not divide `resolution`.
    """
    if not (folder / "vae" / "config.json").is_file():
        return resolution
    levels = len(AutoencoderKL.load_config(folder / "vae")["block_out_channels"])
    factor = 2 ** (levels - 1)
    if resolution % factor:
        raise InputError(f"data.resolution={resolution}: choose a multiple of the VAE's {factor}")
    return resolution // factor


def _load(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A diffusers model, with all of its weights; diffusers would fill missing ones at random."""
    try:
        model, info = cls.from_pretrained(folder, torch_dtype=dtype, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"backbone.pretrained: {folder} cannot be loaded "
                         f"({' '.join(str(error).split())[:300]})") from None
    if info["missing_keys"]:
        raise InputError(f"backbone.pretrained: {folder} lacks {len(info['missing_keys'])} weights, such as "
                         f"{sorted(info['missing_keys'])[0]}: fetch or convert it again")
    return model


def export(folder: Path, pretrained: Path, backbone: Backbone, left_out: tuple[str, ...] = ()) -> None:
    """Write a diffusers pipeline folder: `pretrained` with the backbone's weights replaced.

    Args:
        folder: replaced if it exists. pretrained: the pipeline folder to copy.
        backbone: shared modules are written as equal copies; adapters must have been merged.
        left_out: files of `pretrained` that are not copied.
    """
    component = PIPELINE_COMPONENT[type(backbone)]
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(pretrained, partial, ignore=lambda _, names: {component, *left_out}.intersection(names))
    plain = type(backbone).from_config(backbone.config)
    plain.load_state_dict(plain_state(backbone))
    plain.save_pretrained(partial / component)
    shutil.rmtree(folder, ignore_errors=True)
    publish(partial, folder)


def trained_parameters(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter that is trained, shared ones once."""
    return {name: value for name, value in backbone.named_parameters() if value.requires_grad}


def set_tf32(allow: bool) -> None:
    """Whether float32 matrix products and convolutions may use TensorFloat-32 on GPUs."""
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow
