"""Plain sampling from a backbone, batched; users sample through diffusers' pipelines."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .family import predict
from .schedules import image_tokens, make_solver, set_timesteps
from .stepping import only_steps


@torch.no_grad()
def sample_latents(backbone, scheduler, shape: tuple[int, ...], conditioning: Mapping[str, Tensor],
                   unconditional: Mapping[str, Tensor], steps: int, seed: int, guidance_scale: float = 1.0,
                   batch_size: int = 250, chosen: Sequence[int] | None = None) -> Tensor:
    """Draw one sample for each row of `conditioning` with `make_solver`.

    Args:
        scheduler: any diffusers scheduler with the training betas and prediction type, or of a flow with its shift.
        shape: of one sample, [C, h, w].
        conditioning, unconditional: the backbone's arguments, [N, ...], on its device.
        steps: denoising steps. guidance_scale: >= 1; at 1 the unconditional arguments are not used.
        seed: sample i depends on it, on i and on its row alone. batch_size: samples per forward.
        chosen: those of the steps that are taken; None: all.

    Returns: float32 [N, C, h, w].
    """
    count, channels = len(next(iter(conditioning.values()))), shape[0]
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    done, tokens = [], image_tokens(shape, backbone.config.get("patch_size"))
    for first in range(0, count, batch_size):
        rows = slice(first, first + batch_size)
        given, nothing = ({name: value[rows] for name, value in arguments.items()}
                          for arguments in (conditioning, unconditional))
        latents = noise[rows].to(next(iter(given.values())).device)
        solver = make_solver(scheduler, tokens)
        with only_steps(solver, chosen, steps):
            set_timesteps(solver, steps, tokens)
        for timestep in solver.timesteps:
            timesteps = timestep.expand(len(latents)).to(latents.device)
            pred = predict(backbone, latents, timesteps, given)[:, :channels].float()
            if guidance_scale != 1:
                base = predict(backbone, latents, timesteps, nothing)[:, :channels].float()
                pred = base + guidance_scale * (pred - base)
            latents = solver.step(pred, timestep, latents).prev_sample
        done.append(latents)
    return torch.cat(done)
