"""Schedulers of pipelines: by which noise a backbone trains, and which timesteps sampling visits."""

import inspect
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from ..common.errors import InputError
from .inputs import latent_shape
from .noising import PREDICTION_TYPES, Betas, Flow, Noising
from .pretrained import meta_backbone, read_config
from .sizes import latent_size

if TYPE_CHECKING:
    from ..common.flow import FlowConfig

_FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
# What most pipelines of flows hand to `set_timesteps` as sigmas: 1, (n-1)/n, ..., 1/n, in one of two spellings.
_EVEN_SIGMAS = re.compile(r"linspace\(1\.0, (1(\.0)? / num_inference_steps|0(\.0)?, num_inference_steps \+ 1)")


def load_scheduler(folder: Path) -> Any:
    """The scheduler of a pipeline's folder: a DDPMScheduler with its betas and prediction type, or its own of a flow.

    Raises:
        InputError: if there is no scheduler, one of another noise (EDM), or one of another prediction type.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise InputError(f"backbone.pretrained={str(folder)!r} has no scheduler/scheduler_config.json")
    config = read_config(file)
    name = config.get("_class_name", DDPMScheduler.__name__)
    defaults = noise_defaults(name)
    written = config.get("trained_betas") or {"beta_start", "beta_end", "beta_schedule"} <= config.keys()
    flow = _flows(name) and (name in _FLOWS or bool(config.get("use_flow_sigmas")))
    other = not flow and (bool(config.get("use_flow_sigmas")) or config.get("timestep_type") == "continuous")
    if other or not (flow or written or defaults):
        raise InputError(f"{file}: a {name} noises neither by the betas of DDPM nor by flow matching, by which alone "
                         "alter trains: give a pipeline with a scheduler such as DDPMScheduler or "
                         f"{_FLOWS[0]}")
    config = {**defaults, **config}
    shifts = "snr_shift_scale" in _parameters(name)
    if not shifts and config.get("snr_shift_scale", 1) != 1:
        raise InputError(f"{file}: snr_shift_scale={config['snr_shift_scale']} is of CogVideoX's schedulers, and not of"
                         f" a {name}: take it out, or name one of those")
    kind = config.get("prediction_type")
    if flow and (name not in _FLOWS and kind != "flow_prediction" or config.get("invert_sigmas")):
        raise InputError(f"{file}: a flow with prediction_type={kind!r} and invert_sigmas="
                         f"{config.get('invert_sigmas', False)}: alter trains flow_prediction, not inverted")
    if not flow and kind not in PREDICTION_TYPES:
        raise InputError(f"{folder / 'scheduler'}: prediction_type={kind!r}: use one of {', '.join(PREDICTION_TYPES)}")
    try:
        if shifts:
            config |= _without_shift(getattr(diffusers, name).from_config(config))
        return (getattr(diffusers, name) if flow else DDPMScheduler).from_config(config)
    except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        kinds = "flow matching" if flow else "betas"
        raise InputError(f"{file}: no schedule of {kinds} ({' '.join(str(error).split())[:200]}): "
                         "fetch it again") from None


def make_noising(scheduler: Any, tokens: int, flow: "FlowConfig | None" = None,
                 min_snr_gamma: float | None = None) -> Noising:
    """By what the backbone trains.

    Args:
        scheduler: from `load_scheduler`. tokens: of an image, for a dynamic shift.
        flow: settings of a flow; None: the defaults. min_snr_gamma: of the weights for noise by betas.
    """
    if not is_flow(scheduler):
        return Betas(scheduler.alphas_cumprod, scheduler.config.prediction_type, min_snr_gamma)
    if flow is None:
        from ..common.flow import FlowConfig  # which needs PyYAML: experts are served without

        flow = FlowConfig()
    shift = own_shift(scheduler.config, tokens) if flow.shift is None else flow.shift
    return Flow(scheduler.config.num_train_timesteps, shift, flow.density, flow.logit_mean, flow.logit_std,
                flow.mode_scale, flow.weighting)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is one of flow matching."""
    return type(scheduler).__name__ in _FLOWS or bool(scheduler.config.get("use_flow_sigmas"))


def scheduler_class(name: str, field: str, flow: bool = False) -> Any:
    """The diffusers scheduler class of that name; `field` stands before the name in the error.

    Args:
        flow: whether it is to sample a backbone of flow matching, or else one that counts noise by betas.

    Raises:
        InputError: if there is none, or it is made for another noise.
    """
    example = _FLOWS[0] if flow else "DPMSolverMultistepScheduler"
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise InputError(f"{field}{name!r}: diffusers has no such scheduler: use for example {example}")
    if not (_flows(name) if flow else noise_defaults(name)):
        kinds = "than by flow matching (betas, EDM)" if flow else "than by betas (flow matching, EDM)"
        raise InputError(f"{field}{name!r}: it is made for another noising {kinds}: use for example {example}")
    return found


def make_sampler(name: str, field: str, scheduler: Any, tokens: int) -> Any:
    """A diffusers scheduler by name, with the noise of `scheduler`; arguments and errors as of `scheduler_class`."""
    flow = is_flow(scheduler)
    cls = scheduler_class(name, field, flow)
    return _as_flow(cls, scheduler.config, tokens) if flow else cls.from_config(scheduler.config)


def noise_defaults(name: str) -> dict[str, Any]:
    """What a diffusers scheduler noises by where its configuration is silent; nothing if it does not go by betas."""
    parameters = _parameters(name)
    if "beta_start" not in parameters:
        return {}
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    return {"prediction_type": "epsilon", **{key: parameters[key].default for key in keys if key in parameters}}


def image_tokens(shape: tuple[int, ...], patch: Any) -> int:
    """Tokens of latents [C, h, w], of a video [C, F, h, w], or of packed ones [N, C], for a dynamic shift.

    patch: the backbone's `patch_size`: a side, one side an axis, or None for 1.
    """
    if len(shape) == 2:
        return shape[0]
    return math.prod(shape[1:]) // (math.prod(patch) if isinstance(patch, (tuple, list)) else (patch or 1) ** 2)


def tokens_of(folder: Path, resolution: int | None) -> int:
    """`image_tokens` of a pipeline's folder.

    resolution: in pixels; None: the size for which the backbone was made, or else 1024.
    """
    backbone: Any = meta_backbone(folder)
    made_for = backbone.config.get("sample_size") if resolution is None else None
    size = made_for if isinstance(made_for, int) else latent_size(folder, resolution or 1024)
    return image_tokens(latent_shape(backbone, size), backbone.config.get("patch_size"))


def own_shift(config: Mapping[str, Any], tokens: int) -> float:
    """s of `Flow.shifted` as diffusers samples with it: a flow scheduler's constant, or, if dynamic, by the tokens.

    Its dynamic shift e^μ / (e^μ + 1/σ - 1) is that of s = e^μ; the linear one that of s = μ.
    """
    if not config.get("use_dynamic_shifting"):
        return config.get("shift", config.get("flow_shift", 1.0))
    mu = mean_shift(config, tokens)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def mean_shift(config: Mapping[str, Any], tokens: int) -> float:
    """μ: on the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift), as the pipelines of
    diffusers compute it (`calculate_shift`)."""
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    return low + (tokens - first) * (high - low) / (last - first)


def make_solver(scheduler: Any, tokens: int) -> Any:
    """What `sample_latents` samples with: DPM-Solver++ (arXiv 2211.01095), without a learned variance, or, for a flow,
    Euler's method; with the noise of `scheduler`."""
    if is_flow(scheduler):
        return _as_flow(FlowMatchEulerDiscreteScheduler, {**scheduler.config, "stochastic_sampling": False}, tokens)
    return DPMSolverMultistepScheduler.from_config(scheduler.config, variance_type=None)


def solver_at(scheduler: Any, timesteps: list[int]) -> Any:
    """The same kinds of solver, set to these decreasing training timesteps."""
    if is_flow(scheduler):
        count = scheduler.config.num_train_timesteps
        solver = FlowMatchEulerDiscreteScheduler(count)
        solver.set_timesteps(sigmas=[timestep / count for timestep in timesteps])
    else:
        solver = make_solver(scheduler, 0)
        solver.set_timesteps(timesteps=timesteps)
    return solver


def set_timesteps(solver: Any, steps: int, tokens: int, even: bool = False) -> None:
    """Let a scheduler prepare for `steps` steps as a pipeline does.

    Args:
        tokens: of an image, for a dynamic shift. even: `hands_sigmas` of the pipeline.
    """
    given: dict[str, Any] = {"num_inference_steps": steps}
    if solver.config.get("use_dynamic_shifting"):
        given["mu"] = mean_shift(solver.config, tokens)
    if even and "sigmas" in inspect.signature(solver.set_timesteps).parameters and not solver.config.get(
            "use_flow_sigmas"):
        given["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    solver.set_timesteps(**given)


def visited_timesteps(solver: Any, steps: int, tokens: int, even: bool = False) -> np.ndarray:
    """The timesteps that a scheduler visits, float64 [any], in its order; arguments as of `set_timesteps`."""
    set_timesteps(solver, steps, tokens, even)
    return np.asarray(solver.timesteps, dtype=np.float64)


def visited_rows(solver: Any, steps: int, tokens: int, even: bool = False) -> np.ndarray:
    """The training timesteps that a scheduler visits, int64 [any]."""
    return as_rows(visited_timesteps(solver, steps, tokens, even), solver)


def as_rows(timesteps: np.ndarray, scheduler: Any) -> np.ndarray:
    """Timesteps of a scheduler as the training timesteps by which experts are chosen, int64 [any]."""
    return timesteps.round().clip(0, scheduler.config.num_train_timesteps - 1).astype(np.int64)


def hands_sigmas(folder: Path) -> bool:
    """Whether the pipeline of a folder gives its flow scheduler the sigmas 1, (n-1)/n, ..., 1/n; by its source."""
    file = folder / "model_index.json"
    cls: Any = getattr(diffusers, str(read_config(file).get("_class_name")), None) if file.is_file() else None
    return cls is not None and bool(_EVEN_SIGMAS.search(inspect.getsource(sys.modules[cls.__module__])))


def _without_shift(scheduler: Any) -> dict[str, Any]:
    """The noise of one of CogVideoX's schedulers as betas, which any other scheduler knows."""
    alphas = scheduler.alphas_cumprod.double()
    return {"trained_betas": [1 - float(alphas[0]), *(1 - alphas[1:] / alphas[:-1]).tolist()], "snr_shift_scale": 1.0}


def _flows(name: str) -> bool:
    """Whether a scheduler of that name can sample flows."""
    return name in _FLOWS or {"beta_start", "flow_shift"} <= _parameters(name).keys()


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    found = getattr(diffusers, name, None)
    return inspect.signature(found).parameters if isinstance(found, type) else {}


def _as_flow(cls: Any, config: Mapping[str, Any], tokens: int) -> Any:
    """A flow scheduler of another class with the shift of `config`; constant where the class knows no dynamic one."""
    shift = own_shift(config, tokens)
    wanted = {**config, "shift": shift, "flow_shift": shift, "use_flow_sigmas": True,
              "prediction_type": "flow_prediction"}
    return cls.from_config({key: value for key, value in wanted.items() if key in _parameters(cls.__name__)})
