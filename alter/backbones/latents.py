"""Images to latents, by the VAE of a pipeline, in the layout that its scheduler steps."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encode(pipe: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations float32 of the latents of `images` [B, 3, H, W] in [-1, 1]."""
    vae = pipe.vae
    posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return ((posterior.mean.float() - shift) * vae.config.scaling_factor,
            posterior.std.float() * vae.config.scaling_factor)
