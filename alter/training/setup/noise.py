"""What a configuration says of the noise by which a pipeline trains and samples."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...backbones.asking import asked_timesteps
from ...backbones.draws import generator
from ...backbones.inputs import FRAMES_FIRST
from ...backbones.noising import Flow, Noising
from ...backbones.pretrained import component_of, pipeline_of, share_of
from ...backbones.schedules import hands_sigmas, is_flow, make_noising, make_sampler, visited_timesteps
from ...backbones.sizes import pixel_size
from ...common.config import Config, FlowConfig
from ...common.errors import Faults, InputError

# Pipelines whose dynamic shift is not that of `schedules.mean_shift`.
_OWN_SHIFTS = ("EasyAnimate", "Flux2", "GlmImage", "HiDream", "Krea2")


def check_noise(config: Config, folder: Path, scheduler: Any) -> None:
    """Refuse settings of one kind of noise where the pipeline's scheduler has the other.

    Raises:
        InputError: naming the keys.
    """
    faults, name = Faults(), type(scheduler).__name__
    if is_flow(scheduler):
        if config.loss.min_snr_gamma is not None:
            faults.lines.append(f"loss.min_snr_gamma={config.loss.min_snr_gamma}: weighs noise by betas, and the "
                                f"pipeline's {name} is of flow matching: set null, and flow.weighting instead")
        if config.train.noise_offset > 0:
            faults.lines.append(f"train.noise_offset={config.train.noise_offset}: helps models that never see pure "
                                f"noise, and the pipeline's {name} is of flow matching, which begins there: set 0")
    else:
        backbone = component_of(folder, wanted=config.backbone.component)[0].__name__
        if config.train.noise_offset > 0 and backbone in FRAMES_FIRST:
            faults.lines.append(f"train.noise_offset={config.train.noise_offset}: shifts channels, and the latents of "
                                f"a {backbone} have frames on that axis: set 0")
        default = FlowConfig()
        faults.lines += [f"flow.{key.name}={value!r}: is for flow matching, and the pipeline noises by betas: leave "
                         "the section flow out" for key in dataclasses.fields(FlowConfig)
                         if (value := getattr(config.flow, key.name)) != getattr(default, key.name)]
    faults.refuse()


def take_shift(config: Config, folder: Path, scheduler: Any) -> dict[str, Any] | None:
    """Let `scheduler` have the shift of a pipeline that computes one by a formula of its own.

    Returns: what that pipeline gives to `set_timesteps` for `budget.sampling_steps` steps; None for other pipelines.

    Raises:
        InputError: if it cannot be asked, and the configuration needs it.
    """
    name = pipeline_of(folder)
    if not (is_flow(scheduler) and scheduler.config.get("use_dynamic_shifting") and name.startswith(_OWN_SHIFTS)):
        return None
    size = pixel_size(folder, config.data.resolution, config.data.frames)
    try:
        asked = asked_timesteps(folder, scheduler, config.budget.sampling_steps, size)
        scheduler.register_to_config(base_shift=asked["mu"], max_shift=asked["mu"])  # whatever the number of tokens
        return asked
    except (InputError, KeyError) as error:
        if config.flow.shift is not None and config.budget.sampler == "uniform":
            return None
        raise InputError(f"flow.shift={config.flow.shift} with budget.sampler={config.budget.sampler!r}: a {name} "
                         f"computes its shift by a formula of its own, and cannot be asked ({error}): set flow.shift, "
                         "and budget.sampler=uniform") from None


def sampled_timesteps(config: Config, folder: Path, scheduler: Any, tokens: int, noising: Noising,
                      asked: dict[str, Any] | None = None) -> np.ndarray | None:
    """The timesteps over which the budget is averaged, float64 [any]; None: all of them.

    Args:
        folder: of the pipeline. scheduler: from it. tokens: of an image. noising: by what the backbone trains.
        asked: from `take_shift`.

    Raises:
        InputError: about budget.sampler.
    """
    budget, flow = config.budget, is_flow(scheduler)
    served = noising if isinstance(noising, Flow) and noising.within else None
    if budget.sampler == "uniform" or budget.sampler is None and not flow:
        return None if served is None else served.trained.double().numpy()
    named = f"budget.sampler={budget.sampler!r}" if budget.sampler else f"the pipeline's {type(scheduler).__name__}"
    try:
        solver = make_sampler(budget.sampler, "budget.sampler=", scheduler, tokens) if budget.sampler else scheduler
        if asked is not None and budget.sampler is None:
            solver.set_timesteps(**asked)
            visited = np.asarray(solver.timesteps, dtype=np.float64)
        else:
            visited = visited_timesteps(solver, budget.sampling_steps, tokens, flow and hands_sigmas(folder))
        if served is not None:
            visited = visited[served.serves(torch.from_numpy(visited)).numpy()]
        if not len(visited):
            raise InputError(f"{named} with budget.sampling_steps={budget.sampling_steps}: visits no timestep of the "
                             "component that is trained: set more steps")
        return visited
    except InputError:
        raise
    except (ImportError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        example = "uniform" if flow else "DPMSolverMultistepScheduler"
        raise InputError(f"{named} with budget.sampling_steps={budget.sampling_steps}: it cannot sample this backbone "
                         f"({' '.join(str(error).split())[:200]}): use for example budget.sampler={example}") from None


def response_sampler(config: Config, flow: bool) -> tuple[bool, int]:
    """Whether the response of samples is measured by `make_solver`'s sampler, and in how many steps: in
    `evaluate.sampling_steps` then; else, by `budget.sampler` or a flow's own, in `budget.sampling_steps`."""
    budget = config.budget
    solvers = budget.sampler == "uniform" or budget.sampler is None and not flow
    return solvers, config.evaluate.sampling_steps if solvers else budget.sampling_steps


def trained_noising(config: Config, folder: Path, scheduler: Any, tokens: int,
                    asked: dict[str, Any] | None = None) -> Noising:
    """By what the backbone trains: of two, at the timesteps that are its own; with `train.timesteps=sampled`, at those
    alone that the sampler visits. Arguments as of `sampled_timesteps`.

    Raises:
        InputError: if no sampler is known then, or training would hardly draw a timestep of its own.
    """
    noising = make_noising(scheduler, tokens, config.flow, config.loss.min_snr_gamma)
    component = component_of(folder, wanted=config.backbone.component)[1]
    share, count = share_of(folder, component), noising.num_timesteps
    if share is not None:
        if not isinstance(noising, Flow):
            raise InputError(f"backbone.pretrained={config.backbone.pretrained!r}: has two backbones and noise by "
                             "betas: pairs are trained by flow matching alone")
        drawn = noising.timesteps(4096, generator(config.seed, 0, 8))
        noising = dataclasses.replace(noising, within=(share[0] * count, share[1] * count))
        met = noising.serves(drawn).float().mean().item()
        if met < 0.01 and config.train.timesteps == "all":
            raise InputError(f"flow.density={config.flow.density!r} with flow.shift={noising.shift:g}: {met:.1%} of the"
                             f" timesteps that it draws are those of {component}: choose another density")
    if config.train.timesteps == "all":
        return noising
    visited = sampled_timesteps(config, folder, scheduler, tokens, noising, asked)
    if visited is None:
        raise InputError("train.timesteps=sampled: needs the sampler whose timesteps are trained: set budget.sampler, "
                         "for example DPMSolverMultistepScheduler, and budget.sampling_steps")
    given = visited if isinstance(noising, Flow) else visited.round().astype(int)
    return dataclasses.replace(noising, visited=tuple(given.tolist()))
