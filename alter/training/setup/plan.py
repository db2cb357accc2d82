"""What a configuration means before weights are loaded: architecture, costs, schedule, budget."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from torch import nn

from ...backbones.cost import CostTable, count_cost
from ...backbones.latency import Latency, measure_latency
from ...backbones.sampling import scheduler_class
from ...backbones.sites import (
    PIPELINE_COMPONENT,
    Backbone,
    Site,
    embedders,
    example_inputs,
    find_sites,
    named_sites,
    null_class,
    tie_embedders,
)
from ...common.config import CONFIGS, Config
from ...common.errors import InputError
from ...experts.artefact import TemporalExperts
from ...method.budget import Budget
from ...method.diffusion import PREDICTION_TYPES

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def describe(config: Config, latency: Latency | None = None) -> tuple[
        Backbone, CostTable, Budget | None, TemporalExperts | None]:
    """The backbone on the meta device, its costs, budget and given experts, from JSON alone: no weights.

    The budget is None where it is one of time that is neither given nor in `budget.latency_file`.

    Raises:
        InputError: if neither `backbone.pretrained` nor configs/models/ holds the backbone's configuration.
    """
    folder = _architecture(config)
    with torch.device("meta"):
        cls, component = component_of(folder)
        backbone = cls.from_config(cls.load_config(folder / component))
        tie_embedders(backbone)
    sites = choose_sites(config, backbone)
    check_validation(config, backbone)
    size, scheduler = latent_size(config, folder), load_scheduler(folder)
    cost = count_cost(backbone, size, sites)
    if by_time(config) and latency is None:
        if config.budget.latency_file is None:
            return backbone, cost, None, None
        latency = Latency.load(Path(config.budget.latency_file))
    return backbone, cost, *plan_budget(config, cost, size, scheduler, latency)


def choose_sites(config: Config, backbone: Backbone) -> tuple[Site, ...]:
    """Those of `experts.pretrained`, or what `experts.resnet_skip` and `experts.transformer_skip` choose.

    Raises:
        InputError: if the backbone does not have them.
    """
    experts = config.experts
    if experts.pretrained is None:
        return find_sites(backbone, experts.resnet_skip, experts.transformer_skip)
    given = TemporalExperts.from_pretrained(experts.pretrained)
    return named_sites(backbone, given.sites, f"experts.pretrained={experts.pretrained!r}")


def by_time(config: Config) -> bool:
    """Whether latencies are needed; experts that are given bring theirs."""
    return config.budget.cost == "latency" and config.experts.pretrained is None


def plan_latency(config: Config, device: torch.device | str) -> Latency:
    """From `budget.latency_file`, or measured on `device`."""
    if config.budget.latency_file is not None:
        return Latency.load(Path(config.budget.latency_file))
    return measure(config, device, download=True)


def measure(config: Config, device: torch.device | str, download: bool = False) -> Latency:
    """The backbone's latencies on `device`, with random weights, in the run's arithmetic.

    download: whether the hub may be asked for the configuration of a backbone that is not known here.
    """
    folder = _architecture(config, download)
    cls, component = component_of(folder)
    set_tf32(config)
    with torch.device(device):
        backbone: Any = cls.from_config(cls.load_config(folder / component))
    for embedder in embedders(backbone):  # equal copies, as in every trained DiT
        embedder.load_state_dict(embedders(backbone)[0].state_dict())
    nn.Module.to(backbone.eval(), DTYPES[config.train.mixed_precision])
    return measure_latency(backbone, latent_size(config, folder), config.budget.batch,
                           sites=choose_sites(config, backbone))


def set_tf32(config: Config) -> None:
    torch.backends.cuda.matmul.allow_tf32 = config.train.tf32
    torch.backends.cudnn.allow_tf32 = config.train.tf32


def plan_budget(config: Config, cost: CostTable, size: int, scheduler: DDPMScheduler,
                latency: Latency | None) -> tuple[Budget, TemporalExperts | None]:
    """The budget, of time if `latency` is given, and the experts of `experts.pretrained`, which then bring theirs."""
    budget, given = config.budget, config.experts.pretrained
    timesteps = None
    if given is not None:
        experts = TemporalExperts.from_pretrained(given)
        if len(experts.expert_T) != scheduler.config.num_train_timesteps:
            raise InputError(f"experts.pretrained={given!r}: its {len(experts.expert_T)} timesteps are not the "
                             f"scheduler's {scheduler.config.num_train_timesteps}")
        experts = dataclasses.replace(experts, macs=cost.macs, macs_total=cost.macs_total)  # at this resolution
        timesteps = None if experts.timesteps is None else np.array(experts.timesteps)
        share_L = experts.latency.share_L if experts.latency else cost.share_L
        return Budget(share_L, experts.keep_ratio_target, experts.budget_over, timesteps), experts
    if budget.sampler is not None:
        solver = scheduler_class(budget.sampler, "budget.sampler=").from_config(scheduler.config)
        solver.set_timesteps(budget.sampling_steps)
        last = scheduler.config.num_train_timesteps - 1
        timesteps = np.asarray(solver.timesteps).round().clip(0, last).astype(np.int64)
    if latency is not None and latency.sites != cost.sites:
        raise InputError(f"budget.latency_file={budget.latency_file!r}: its {len(latency.sites)} sites are not the "
                         f"{len(cost.sites)} of this backbone with these experts.resnet_skip and transformer_skip: "
                         "measure them with scripts/latency.py")
    if latency is not None and latency.latent_size != size:
        raise InputError(f"budget.latency_file={budget.latency_file!r}: measured at latents of {latency.latent_size}, "
                         f"the run's are of {size}: measure them with scripts/latency.py")
    share_L = latency.share_L if latency else cost.share_L
    return Budget(share_L, budget.keep_ratio, budget.over, timesteps), None


def local_folder(pretrained: str, revision: str | None = None, field: str = "backbone.pretrained") -> Path:
    """The folder of a pretrained pipeline; a hub id is downloaded into the hub's cache first."""
    if Path(pretrained).is_dir():
        return Path(pretrained)
    try:
        return Path(DiffusionPipeline.download(pretrained, revision=revision))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{field}={pretrained!r}: no such folder, and the hub gave nothing "
                         f"({reason}): give a diffusers folder or a hub id") from None


def _architecture(config: Config, download: bool = False) -> Path:
    """Where the backbone's JSON configuration is: its folder, or ours for a known model or a demo, or the hub's."""
    pretrained = str(config.backbone.pretrained)
    for folder in (Path(pretrained), CONFIGS / "models" / (config.demo.model or pretrained)):
        if folder.is_dir() and any((folder / part).is_dir() for part in PIPELINE_COMPONENT.values()):
            return folder
    if download:
        return local_folder(pretrained, config.backbone.revision)
    raise InputError(f"backbone.pretrained={pretrained!r}: no such folder, and configs/models/ does not know "
                     "it: give a diffusers folder")


def component_of(folder: Path) -> tuple[type[Backbone], str]:
    """The class and the sub-folder of a pipeline folder's backbone; reads JSON only."""
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


def load_scheduler(folder: Path) -> DDPMScheduler:
    """The training schedule, with the betas and the prediction type of the pipeline's scheduler."""
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise InputError(f"backbone.pretrained={str(folder)!r} has no scheduler/scheduler_config.json")
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    kind = scheduler.config.prediction_type
    if kind not in PREDICTION_TYPES:
        raise InputError(f"{folder / 'scheduler'}: prediction_type={kind!r}: use one of {', '.join(PREDICTION_TYPES)}")
    return scheduler


def latent_size(config: Config, folder: Path) -> int:
    """Side of the latents: `data.resolution`, divided by the VAE's factor where the pipeline has a VAE."""
    if not (folder / "vae" / "config.json").is_file():
        return config.data.resolution
    levels = len(AutoencoderKL.load_config(folder / "vae")["block_out_channels"])
    factor = 2 ** (levels - 1)
    if config.data.resolution % factor:
        raise InputError(f"data.resolution={config.data.resolution}: choose a multiple of the VAE's {factor}")
    return config.data.resolution // factor


def check_validation(config: Config, backbone: Backbone) -> None:
    """Refuse validation images that the backbone's conditioning does not allow."""
    validate = config.validate
    if validate.every is None:
        return
    by_class = "class_labels" in example_inputs(backbone, 1)
    needed, other = ("labels", "prompts") if by_class else ("prompts", "labels")
    if not getattr(validate, needed) or getattr(validate, other):
        raise InputError(f"validate.every={validate.every}: for this backbone set validate.{needed}, and not "
                         f"validate.{other}; or validate.every=null")
    if by_class and not all(0 <= label < null_class(backbone) for label in validate.labels):
        raise InputError(f"validate.labels={list(validate.labels)}: the backbone knows 0 to {null_class(backbone) - 1}")
