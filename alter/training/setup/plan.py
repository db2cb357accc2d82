"""What a configuration means, before weights are loaded: the one place that `--check`, `--dry-run` and `build` use."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...backbones.cost import CostTable, count_cost
from ...backbones.dit import embedders, null_class
from ...backbones.family import COMPONENTS, Backbone
from ...backbones.inputs import is_class_conditional, latent_shape, takes_one_text, text_width
from ...backbones.latency import Latency, measure_latency
from ...backbones.noising import Noising
from ...backbones.pretrained import (
    DTYPES,
    check_text,
    component_of,
    condition_of,
    local_folder,
    meta_backbone,
    read_config,
    root,
    set_tf32,
    told_component,
)
from ...backbones.schedules import as_rows, image_tokens, load_scheduler
from ...backbones.sites import named_sites
from ...backbones.sizes import check_bucket_step, check_latents, latent_frames, latent_size, makes_videos
from ...common.config import Config
from ...common.errors import Faults, InputError
from ...common.load import CONFIGS
from ...data.base import Source
from ...data.batches import WithSubstitutes, split
from ...data.open import open_source
from ...experts.artefact import TemporalExperts
from ...method.budget import TOLERANCE, Budget
from .encoding import check_encoding
from .machine import check_machine
from .noise import check_noise, sampled_timesteps, take_shift, trained_noising
from .teacher import check_teacher

_NOT_TRAINED = {  # though their layers are counted
    "CogView4Transformer2DModel": "its pipeline tells it other timesteps than those of the noise",
    "GlmImageTransformer2DModel": "its pipeline makes tokens of the image that it will draw, not of those in the data",
    "HiDreamImageTransformer2DModel": "in training it gives patches, and its text has samples on the second axis",
}


@dataclass
class Plan:
    """A configuration, understood.

    Attributes:
        folder: of the backbone's JSON configuration, with or without weights. component: its sub-folder.
        backbone: on the meta device.
        scheduler: the pipeline's, by whose noise samples are drawn. noising: by what is trained.
        latent_shape: of one sample, as the scheduler steps it.
        budget: None where it is one of time that is not known yet.
        experts: those of `experts.pretrained`, None where they are to be found.
        latency: what the budget's time was measured as; None for a budget of MACs.
        source: the data set; None where it was not opened.
    """

    folder: Path
    component: str
    backbone: Backbone
    cost: CostTable
    scheduler: Any
    noising: Noising
    latent_shape: tuple[int, ...]
    budget: Budget | None
    experts: TemporalExperts | None
    latency: Latency | None
    source: Source | None


def make_plan(config: Config, folder: Path, source: Source | None, latency: Latency | None = None) -> Plan:
    """Understand the configuration of a backbone in `folder`, from JSON and, if `source` is given, its first sample.

    Args:
        latency: for `budget.cost=latency`, where it is known; None: that of `budget.latency_file`, if it is set.

    Raises:
        InputError: for whatever does not fit.
    """
    faults, component = Faults(), component_of(folder, wanted=config.backbone.component)[1]
    backbone = meta_backbone(folder, component=component)
    size, scheduler, budget, experts = 0, None, None, None
    with faults.caught():
        if (name := type(backbone).__name__) in _NOT_TRAINED:
            raise InputError(f"backbone.pretrained={config.backbone.pretrained!r}: a {name} is not trained yet, though "
                             f"experts apply to it: {_NOT_TRAINED[name]}: use another backbone")
    with faults.caught():
        if config.backbone.gradient_checkpointing and not backbone._supports_gradient_checkpointing:
            raise InputError("backbone.gradient_checkpointing=true: this backbone does not support it: set false")
    with faults.caught():
        _check_validation(config, backbone)
    with faults.caught():
        scheduler = load_scheduler(folder)
    with faults.caught():
        check_latents(folder, backbone, config.data.resolution)
    with faults.caught():
        if config.teacher.pretrained is not None and Path(config.teacher.pretrained).exists():
            check_teacher(config, local_folder(config.teacher.pretrained, field="teacher.pretrained"), backbone)
    with faults.caught():
        if by_time(config) and latency is None and config.budget.latency_file is not None:
            latency = Latency.load(Path(config.budget.latency_file))
    with faults.caught():
        size = latent_size(folder, config.data.resolution)
    with faults.caught():
        if config.data.bucket_step is not None:
            check_bucket_step(folder, config.data.bucket_step)
    frames = 1
    with faults.caught():
        frames = latent_frames(folder, config.data.frames)
        if config.data.frames > 1 and config.budget.cost == "latency":
            raise InputError(f"data.frames={config.data.frames}: latency is measured of images alone: use "
                             "budget.cost=macs")
    shape = latent_shape(backbone, size, frames)
    with faults.caught():
        if config.backbone.channels_last and (len(shape) != 3 or makes_videos(folder)):
            raise InputError("backbone.channels_last=true: this backbone is given no images with channels: set false")
    with faults.caught():
        _check_features(config, folder, shape)
    with faults.caught():
        if source is not None and size:
            _check_source(config, folder, backbone, source, shape)
    if scheduler is None or not size:
        faults.refuse()
    assert scheduler is not None
    tokens = image_tokens(shape, backbone.config.get("patch_size"))
    with faults.caught():
        check_noise(config, folder, scheduler)
    noising, asked = None, None
    with faults.caught():
        asked = take_shift(config, folder, scheduler)
        noising = trained_noising(config, folder, scheduler, tokens, asked)
    cost = count_cost(backbone, size, frames)
    with faults.caught():
        if noising is not None and (latency is not None or not by_time(config)):
            visited = sampled_timesteps(config, folder, scheduler, tokens, noising, asked)
            budget, experts = _plan_budget(config, folder, backbone, cost, size, scheduler, noising, visited, latency)
    faults.refuse()
    assert noising is not None
    return Plan(folder, component, backbone, cost, scheduler, noising, shape, budget, experts,
                experts.latency if experts else latency, source)


def check(config: Config, processes: int, latency: Latency | None = None) -> None:
    """Everything that can be refused before weights are loaded, without a network; `latency` as for `make_plan`.

    Raises:
        InputError: as `build` would, with all faults that do not depend on one another.
    """
    faults, source, folder = Faults(), None, None
    with faults.caught():
        check_machine(config, processes)
    with faults.caught():
        folder = known_folder(config)
    with faults.caught():
        if not (config.demo.model and config.data.path is not None and not Path(config.data.path).exists()):
            source = open_data(config, folder)  # else a demo draws its data first
    with faults.caught():
        if folder is not None:
            make_plan(config, folder, source, latency)
    faults.refuse()


def open_data(config: Config, folder: Path | None) -> Source:
    """The data set, of which enough is left for training.

    Args:
        folder: of the backbone, whose condition is taken where the data have several; None: not known yet.

    Raises:
        InputError: if there is none, or `data.holdout` takes all of it.
    """
    source = open_source(config, None if folder is None else condition_of(folder))
    split(source, config.data.holdout, config.seed)
    if config.data.bucket_step is not None and source.buckets is None:
        raise InputError(f"data.bucket_step={config.data.bucket_step}: the shapes of the samples are known only for "
                         "folders of captioned images, without data.prior_path, and for what `alter encode` wrote with "
                         "it: encode the data first, or set null")
    return source


def known_folder(config: Config) -> Path | None:
    """Where the backbone's JSON configuration is on this machine: its folder, or ours for a known model or a demo.

    Raises:
        InputError: if `backbone.pretrained` is a file.
    """
    pretrained, _ = root(str(config.backbone.pretrained))
    if Path(pretrained).exists():
        return local_folder(pretrained)
    ours = CONFIGS / "models" / (config.demo.model or pretrained)
    return ours if any((ours / part).is_dir() for part in COMPONENTS) else None


def by_time(config: Config) -> bool:
    """Whether latencies are needed; experts that are given bring theirs."""
    return config.budget.cost == "latency" and config.experts.pretrained is None


def plan_latency(config: Config, device: torch.device | str) -> Latency:
    """From `budget.latency_file`, or measured on `device`."""
    if config.budget.latency_file is not None:
        return Latency.load(Path(config.budget.latency_file))
    return measure(config, device)


def measure(config: Config, device: torch.device | str) -> Latency:
    """The backbone's latencies on `device`, with random weights, in the run's arithmetic.

    The hub is asked for the configuration of a backbone that is not known here.
    """
    folder = known_folder(config) or local_folder(str(config.backbone.pretrained), config.backbone.revision)
    backbone: Any = meta_backbone(folder, component=config.backbone.component)
    check_latents(folder, backbone, config.data.resolution)
    set_tf32(config.train.tf32)
    with torch.device(device):
        backbone = type(backbone).from_config(backbone.config)
    for embedder in embedders(backbone):  # equal copies, as in every trained DiT
        embedder.load_state_dict(embedders(backbone)[0].state_dict())
    nn.Module.to(backbone.eval(), DTYPES[config.train.mixed_precision])
    return measure_latency(backbone, latent_size(folder, config.data.resolution), config.budget.batch)


def reads_captions(source: Source) -> bool:
    """Whether its samples are images with text, which a text encoder has to read."""
    return source.num_classes == 0 and not source.encoded


def _plan_budget(config: Config, folder: Path, backbone: Backbone, cost: CostTable, size: int,
                 scheduler: Any, noising: Noising, visited: np.ndarray | None,
                 latency: Latency | None) -> tuple[Budget, TemporalExperts | None]:
    """The budget, of time if `latency` is given, averaged over the `visited` timesteps, and the experts of
    `experts.pretrained`, which then bring theirs."""
    budget, given = config.budget, config.experts.pretrained
    if given is not None:
        component = told_component(folder, config.backbone.component)
        experts = TemporalExperts.from_pretrained(given, component=component)
        if experts.component != component:
            raise InputError(f"experts.pretrained={given!r}: its experts are of {experts.component}: set "
                             f"backbone.component={experts.component}")
        named_sites(backbone, experts.sites, f"experts.pretrained={given!r}")
        if any(rung.cached for rung in experts.ladder):
            raise InputError(f"experts.pretrained={given!r}: has a cached rung, and training sees no steps before its "
                             "own: name experts without one")
        if len(experts.expert_T) != scheduler.config.num_train_timesteps:
            raise InputError(f"experts.pretrained={given!r}: its {len(experts.expert_T)} timesteps are not the "
                             f"scheduler's {scheduler.config.num_train_timesteps}")
        experts = dataclasses.replace(experts, macs=cost.macs, macs_total=cost.macs_total)  # at this resolution
        if not experts.rung.tuned:
            ladder = (dataclasses.replace(rung, tuned=rung is experts.rung) for rung in experts.ladder)
            experts = dataclasses.replace(experts, ladder=tuple(ladder))
        timesteps = None if experts.timesteps is None else np.array(experts.timesteps)
        share_L = experts.latency.share_L if experts.latency else cost.share_L
        return Budget(share_L, experts.keep_ratio_target, experts.budget_over, timesteps), experts
    trained = noising.trained.numpy()
    timesteps = None if visited is None else as_rows(visited, scheduler).clip(trained[0], trained[-1])
    if latency is not None and latency.sites != cost.sites:
        raise InputError(f"budget.latency_file={budget.latency_file!r}: its {len(latency.sites)} sites are not the "
                         f"{len(cost.sites)} of this backbone: measure them with `alter latency`")
    if latency is not None and latency.latent_size != size:
        raise InputError(f"budget.latency_file={budget.latency_file!r}: measured at latents of {latency.latent_size}, "
                         f"the run's are of {size}: measure them with `alter latency`")
    found = Budget(latency.share_L if latency else cost.share_L, budget.range[0], budget.over, timesteps)
    least = config.search.least * float(found.share_L.sum()) / found.scale + found.fixed
    if config.search.method == "elastic" and budget.range[0] < least - TOLERANCE:
        raise InputError(f"budget.keep_ratio={budget.range[0]} is below {least:.3f}, which search.least="
                         f"{config.search.least} leaves at least: lower search.least, or keep more")
    return found, None


def _check_validation(config: Config, backbone: Backbone) -> None:
    """Refuse validation images that the backbone's conditioning does not allow."""
    validate = config.validate
    if validate.every is None:
        return
    by_class = is_class_conditional(backbone)
    needed, other = ("labels", "prompts") if by_class else ("prompts", "labels")
    if not getattr(validate, needed) or getattr(validate, other):
        raise InputError(f"validate.every={validate.every}: for this backbone set validate.{needed}, and not "
                         f"validate.{other}; or validate.every=null")
    if by_class and not all(0 <= label < null_class(backbone) for label in validate.labels):
        raise InputError(f"validate.labels={list(validate.labels)}: the backbone knows 0 to {null_class(backbone) - 1}")


def _check_features(config: Config, folder: Path, shape: tuple[int, ...]) -> None:
    given = config.search.features
    if given is None:
        return
    if not (Path(given) / "config.json").is_file():
        raise InputError(f"search.features={given!r}: no such model: name the folder of a CLIP (config.json and "
                         "model.safetensors)")
    vae = folder / "vae" / "config.json"
    decoded = read_config(vae).get("_class_name") == "AutoencoderKL" if vae.is_file() else shape[0] in (1, 3)
    if len(shape) != 3 or not decoded:
        raise InputError(f"search.features={given!r}: samples of this backbone cannot be decoded in a search: leave it "
                         "out")


def _check_source(config: Config, folder: Path, backbone: Backbone, source: Source, shape: tuple[int, ...]) -> None:
    """Refuse data that do not fit the backbone, its VAE or its text encoder."""
    data = config.data
    if not source.encoded and not (folder / "vae").is_dir():
        raise InputError(f"data.source={data.source!r} gives images, and {folder} has no vae: "
                         "use data.source=latents")
    by_class = is_class_conditional(backbone)
    if by_class == (source.num_classes == 0):
        has, needs, give = ("captions", "class labels", "images in one folder per class, or latents with labels") \
            if by_class else ("class labels", "text", "images with captions, or latents with text states")
        raise InputError(f"data.source={data.source!r}: has {has}, and the backbone is conditioned on {needs}, which "
                         f"this data does not have: give {give}")
    if CONFIGS not in folder.parents:  # there, weights are yet to come
        check_encoding(config, folder, source)
        if not by_class and (reads_captions(source) or (config.validate.every and config.validate.prompts)):
            if takes_one_text(backbone):
                check_text(folder, backbone.config.cross_attention_dim)
    sample = WithSubstitutes(source, np.arange(len(source)), config.seed)[0, 0]
    moments = (2 * shape[0], *shape[1:])
    for name, expected in (("latents", shape), ("moments", moments)):
        if source.buckets is None and name in sample and tuple(sample[name].shape) != expected:
            raise InputError(
                f"data.path={data.path!r}: {name} of shape {tuple(sample[name].shape)} do not fit the "
                f"backbone, which takes {expected} at data.resolution={data.resolution}"
            )
    if by_class and (source.num_classes or 0) > null_class(backbone):
        raise InputError(f"data.path={data.path!r}: labels up to {(source.num_classes or 0) - 1}, but the "
                         f"backbone knows 0 to {null_class(backbone) - 1}: use data or a backbone of its classes")
    text = {**sample, **sample.get("conditioning", {})}.get("encoder_hidden_states")
    if text is not None and text.shape[-1] != text_width(backbone):
        raise InputError(f"data.path={data.path!r}: text states of width {text.shape[-1]} do not fit the backbone's "
                         f"{text_width(backbone)}")
