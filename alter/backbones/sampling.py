"""Plain sampling from a backbone, batched; users sample through diffusers' pipelines."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ..common.errors import InputError
from .family import predict


def scheduler_class(name: str, field: str) -> Any:
    """The diffusers scheduler class of that name; `field` stands before the name in the error.

    Raises:
        InputError: if there is none, or it does not count noise in training timesteps (flow matching, EDM).
    """
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise InputError(f"{field}{name!r}: diffusers has no such scheduler: use for example "
                         "DPMSolverMultistepScheduler")
    if not noise_defaults(name):
        raise InputError(f"{field}{name!r}: it is made for another noising than by betas (flow matching, EDM): use "
                         "for example DPMSolverMultistepScheduler")
    return found


def noise_defaults(name: str) -> dict[str, Any]:
    """What a diffusers scheduler noises by where its configuration is silent; nothing if it does not go by betas."""
    found = getattr(diffusers, name, None)
    parameters = inspect.signature(found).parameters if isinstance(found, type) else {}
    if "beta_start" not in parameters:
        return {}
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    return {"prediction_type": "epsilon", **{key: parameters[key].default for key in keys if key in parameters}}


def make_solver(scheduler: Any) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (arXiv 2211.01095) with the betas and prediction type of `scheduler`, without a learned variance."""
    return DPMSolverMultistepScheduler.from_config(scheduler.config, variance_type=None)


@torch.no_grad()
def sample_latents(backbone, scheduler, shape: tuple[int, ...], conditioning: Mapping[str, Tensor],
                   unconditional: Mapping[str, Tensor], steps: int, seed: int, guidance_scale: float = 1.0,
                   batch_size: int = 250) -> Tensor:
    """Draw one sample for each row of `conditioning` with DPM-Solver++ (arXiv 2211.01095).

    Args:
        scheduler: any diffusers scheduler with the training betas and prediction type.
        shape: of one sample, [C, h, w].
        conditioning, unconditional: the backbone's arguments, [N, ...], on its device.
        steps: denoising steps. guidance_scale: >= 1; at 1 the unconditional arguments are not used.
        seed: sample i depends on it, on i and on its row alone. batch_size: samples per forward.

    Returns: float32 [N, C, h, w].
    """
    count, channels = len(next(iter(conditioning.values()))), shape[0]
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    done = []
    for first in range(0, count, batch_size):
        rows = slice(first, first + batch_size)
        given, nothing = ({name: value[rows] for name, value in arguments.items()}
                          for arguments in (conditioning, unconditional))
        latents = noise[rows].to(next(iter(given.values())).device)
        solver = make_solver(scheduler)
        solver.set_timesteps(steps)
        for timestep in solver.timesteps:
            timesteps = timestep.expand(len(latents)).to(latents.device)
            pred = predict(backbone, latents, timesteps, given)[:, :channels].float()
            if guidance_scale != 1:
                base = predict(backbone, latents, timesteps, nothing)[:, :channels].float()
                pred = base + guidance_scale * (pred - base)
            latents = solver.step(pred, timestep, latents).prev_sample
        done.append(latents)
    return torch.cat(done)
