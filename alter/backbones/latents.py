"""Images to latents, by the VAE of a pipeline, in the layout that its scheduler steps."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..common.errors import InputError
from .stepping import restored

_OVERFLOW = "StableDiffusionXL"


@torch.no_grad()
def encode(pipe: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the latents of images, from which a sample is mean + std · noise.

    Args:
        pipe: with the VAE, in any precision.
        images: [B, 3, H, W] in [-1, 1]; of a video's pipeline [B, 3, F, H, W], or images for videos of one frame.

    Returns: float32, as the pipeline's scheduler steps them: normalised, and packed where the pipeline packs. Standard
        deviations are 0 where the autoencoder has no posterior.

    Raises:
        InputError: if the VAE takes no such sizes.
    """
    vae, dtype = pipe.vae, pipe.vae.dtype
    # SDXL's overflows in float16; all others say force_upcast too, by default.
    upcast = dtype == torch.float16 and vae.config.get("force_upcast") and type(pipe).__name__.startswith(_OVERFLOW)
    if upcast:
        vae.to(torch.float32)
    images = images.to(vae.device, vae.dtype)
    if images.dim() == 4 and _encodes_videos(vae):
        images = images.unsqueeze(2)
    try:
        encoded = vae.encode(images, return_dict=False)[0]
    except RuntimeError as error:
        raise InputError(f"data: the {type(vae).__name__} refuses images of {tuple(images.shape)} "
                         f"({' '.join(str(error).split())[:200]}): use the sizes that the pipeline takes") from None
    if upcast:
        vae.to(dtype)
    if isinstance(encoded, Tensor):
        mean, std = encoded.float(), torch.zeros_like(encoded, dtype=torch.float32)
    else:
        mean, std = encoded.mean.float(), encoded.std.float()
    if hasattr(pipe, "_patchify_latents"):  # FLUX.2 normalises patches
        mean, std = pipe._patchify_latents(mean), pipe._patchify_latents(std)
    shift, scale = _statistics(vae)
    if not isinstance(shift, float | int):  # of each channel
        shift, scale = (torch.as_tensor(value, dtype=torch.float32).to(mean.device).view(-1, *[1] * (mean.dim() - 2))
                        for value in (shift, scale))
    return _laid_out(pipe, (mean - shift) / scale), _laid_out(pipe, std / scale)


def _encodes_videos(vae: Any) -> bool:
    return any(isinstance(module, torch.nn.Conv3d) for module in vae.modules())


def _statistics(vae: Any) -> tuple[Any, Any]:
    """Mean and standard deviation, of all latents or of each channel, that the pipeline normalises by."""
    config = vae.config
    factor = config.get("scaling_factor") or 1.0
    if hasattr(vae, "bn"):  # FLUX.2
        return vae.bn.running_mean, torch.sqrt(vae.bn.running_var.float() + config.batch_norm_eps)
    if "latents_mean" in vae._buffers:  # LTX-Video
        return vae.latents_mean, vae.latents_std / factor
    if config.get("latents_mean") is not None:
        return config.latents_mean, torch.tensor(config.latents_std) / factor
    return config.get("shift_factor") or 0.0, 1 / factor


def _laid_out(pipe: Any, latents: Tensor) -> Tensor:
    """As the scheduler steps them."""
    if hasattr(pipe, "_pack_latents_no_patch"):  # BRIA FIBO
        return pipe._pack_latents_no_patch(latents.squeeze(2), len(latents), latents.shape[1], *latents.shape[-2:])
    pack = getattr(pipe, "_pack_latents", None)
    if pack is None:
        return latents.transpose(1, 2) if type(pipe).__name__.startswith("CogVideoX") else latents
    names = inspect.signature(pack).parameters
    if "patch_size" in names:  # LTX-Video
        return pack(latents, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size)
    if len(names) == 1:  # FLUX.2
        return pack(latents)
    return pack(latents, len(latents), latents.shape[1], *latents.shape[-2:])


@contextmanager
def decoded(vae: Any) -> Iterator[list[Tensor]]:
    """The latents that `vae.decode` is given inside the block, float32 on the CPU, a row a sample; of None nothing."""
    seen: list[Tensor] = []
    if vae is None:
        yield seen
        return
    decode = vae.decode

    def listening(latents: Tensor, *arguments: Any, **options: Any) -> Any:
        seen.extend(latents.detach().float().cpu())
        return decode(latents, *arguments, **options)

    vae.decode = listening
    try:
        yield seen
    finally:
        del vae.decode


@contextmanager
def final_latents(scheduler: Any) -> Iterator[list[Tensor]]:
    """What the last step of a scheduler gives in each call of its pipeline inside the block, [B, ...]."""
    prepare, step = scheduler.set_timesteps, scheduler.step
    seen: list[Tensor] = []
    begun = 0

    @wraps(prepare)
    def preparing(*arguments: Any, **options: Any) -> Any:
        nonlocal begun
        begun = len(seen)
        return prepare(*arguments, **options)

    @wraps(step)
    def stepping(*arguments: Any, **options: Any) -> Any:
        output = step(*arguments, **options)
        seen[begun:] = [output[0].detach().clone()]
        return output

    with restored(scheduler, "set_timesteps", "step"):
        scheduler.set_timesteps, scheduler.step = preparing, stepping
        yield seen
