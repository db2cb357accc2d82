"""Class-conditional sampling of a DiT without a VAE (the demo's pipeline); `DiTPipeline` serves the others."""

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from .sites import Backbone, null_class


@torch.no_grad()
def sample_classes(backbone: Backbone, scheduler, labels: Tensor, steps: int, seed: int,
                   guidance_scale: float = 1.0, batch_size: int = 250) -> Tensor:
    """Draw one image a label with DPM-Solver++ (arXiv 2211.01095).

    Args:
        scheduler: any diffusers scheduler with the training betas and prediction type.
        labels: long [N]. steps: denoising steps. guidance_scale: 1 runs without the null class.
        seed: image i depends on it, on i and on the label alone.

    Returns: float32 [N, C, S, S] in [-1, 1].
    """
    size, channels = backbone.config.sample_size, backbone.config.in_channels
    noise = torch.randn(len(labels), channels, size, size, generator=torch.Generator().manual_seed(seed))
    images = []
    for latents, classes in zip(noise.split(batch_size), labels.split(batch_size), strict=True):
        solver = DPMSolverMultistepScheduler.from_config(scheduler.config)
        solver.set_timesteps(steps)
        latents, classes = latents.to(backbone.device), classes.to(backbone.device)
        for timestep in solver.timesteps:
            pred = backbone(latents, timestep.expand(len(latents)), class_labels=classes).sample[:, :channels]
            if guidance_scale != 1:
                nothing = torch.full_like(classes, null_class(backbone))
                base = backbone(latents, timestep.expand(len(latents)), class_labels=nothing).sample[:, :channels]
                pred = base + guidance_scale * (pred - base)
            latents = solver.step(pred, timestep, latents).prev_sample
        images.append(latents.clamp(-1, 1).float().cpu())
    return torch.cat(images)
