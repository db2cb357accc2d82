"""From a configuration to everything that the trainer needs: models, costs, budget, data."""

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import cpu_offload_with_hook
from accelerate.utils import parse_flag_from_env
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor, nn

from ...backbones.cost import CostTable, count_cost
from ...backbones.gates import FeatureTap, Simulator
from ...backbones.latency import Latency
from ...backbones.lora import add_adapters
from ...backbones.sites import (
    Backbone,
    example_inputs,
    feature_points,
    named_sites,
    null_class,
    tie_embedders,
    timestep_features,
)
from ...backbones.text import TextEncoder, check_text
from ...common.config import CONFIGS, Config
from ...common.errors import InputError
from ...data.batches import Fit, Tolerant, split
from ...data.open import Encoding, Source, open_source, weights_hash
from ...experts.artefact import FILE_NAME as EXPERTS
from ...experts.artefact import TemporalExperts
from ...method.budget import Budget
from ...method.diffusion import predict
from ...method.hypernetwork import HyperNetwork
from .plan import (
    DTYPES,
    by_time,
    check_validation,
    choose_sites,
    component_of,
    describe,
    latent_size,
    load_scheduler,
    local_folder,
    plan_budget,
    plan_latency,
)


@dataclass
class Parts:
    """What a run is made of. `backbone` carries the gates of `simulator`; `teacher` never had any.

    teacher: the frozen dense model; None where a finished run is tuned further and nothing else is named.
    offload: moves the teacher back to host memory (accelerate), or None where it stays on the device.
    vae, text: frozen; None where the data is encoded already. Images then load them for as long as they take.
    precision: of vae and text.
    experts: those given by `experts.pretrained`, or None where they are to be found.
    latency: what the budget's time was measured as; None for a budget of MACs.
    """

    folder: Path
    backbone: Backbone
    teacher: Backbone | None
    offload: Any
    scheduler: DDPMScheduler
    precision: torch.dtype
    vae: AutoencoderKL | None
    text: TextEncoder | None
    hypernetwork: HyperNetwork
    cost: CostTable
    budget: Budget
    source: Source
    latent_shape: tuple[int, int, int]
    experts: TemporalExperts | None = None
    latency: Latency | None = None
    simulator: Simulator = field(init=False)
    student_tap: FeatureTap = field(init=False)
    teacher_tap: FeatureTap | None = field(init=False)

    def __post_init__(self) -> None:
        self.simulator = Simulator(self.backbone, named_sites(self.backbone, self.cost.sites))
        points = feature_points(self.backbone)
        self.student_tap = FeatureTap(self.backbone, points)
        self.teacher_tap = FeatureTap(self.teacher, points) if self.teacher is not None else None

    @property
    def fit(self) -> Fit:
        """What a sample must be like."""
        by_class, empty = "class_labels" in example_inputs(self.backbone, 1), self.source.empty_text
        return Fit(self.latent_shape, null_class(self.backbone) if by_class else None,
                   None if empty is None else tuple(empty.shape))

    @torch.no_grad()
    def teach(self, noisy_latents: Tensor, timesteps: Tensor,
              conditioning: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The teacher's output and its activations at the feature points."""
        assert self.teacher is not None and self.teacher_tap is not None
        with self.teacher_tap.capture() as features:
            pred = predict(self.teacher, noisy_latents, timesteps, conditioning)
        self.release_teacher()
        return pred, features

    def release_teacher(self) -> None:
        """Free the device of an offloaded teacher until its next use."""
        if self.offload is not None:
            self.offload.offload()

    @torch.no_grad()
    def latents(self, batch: Mapping[str, Any], posterior: Tensor) -> Tensor:
        """The batch's latents float32 [B, C, h, w]; those of images and of moments are sampled with `posterior`."""
        if "latents" in batch:
            return batch["latents"]
        if "moments" in batch:
            mean, std = batch["moments"].chunk(2, dim=1)
            return mean + std * posterior.to(mean)
        assert self.vae is not None
        moments = self.vae.encode(batch["images"].to(self.vae.device, self.vae.dtype)).latent_dist
        latents = moments.mean.float() + moments.std.float() * posterior.to(moments.mean.device)
        return (latents - _shift(self.vae)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Images float32 [B, C, H, W] in [-1, 1], on the CPU; latents pass the VAE's decoder where there is one."""
        if (self.folder / "vae").is_dir():
            vae = self.vae or load_vae(self.folder, self.backbone.device, self.precision)
            latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + _shift(vae)
            latents = torch.cat([vae.decode(part).sample for part in latents.split(8)])
        return latents.float().clamp(-1, 1).cpu()

    def conditioning(self, batch: Mapping[str, Any], dropped: Tensor) -> dict[str, Tensor]:
        """The backbone's conditioning arguments, with that of the samples in `dropped` (bool [B]) removed.

        batch: has "labels" long [B], "captions" (a list of B) or "encoder_hidden_states" [B, tokens, D].
        """
        if "labels" in batch:
            dropped = dropped.to(batch["labels"].device)
            return {"class_labels": batch["labels"].masked_fill(dropped, null_class(self.backbone))}
        if "captions" in batch:
            text = self.text or TextEncoder(self.folder, self.backbone.device, self.precision)
            pairs = zip(batch["captions"], dropped.tolist(), strict=True)
            return {"encoder_hidden_states": text(["" if drop else caption for caption, drop in pairs])}
        text = batch["encoder_hidden_states"]
        assert self.source.empty_text is not None
        empty = self.source.empty_text.to(text)
        return {"encoder_hidden_states": torch.where(dropped.to(text.device)[:, None, None], empty, text)}


def build(config: Config, processes: int = 1, device: torch.device | str = "cpu",
          latency: Latency | None = None) -> Parts:
    """Load and check everything; the same for equal configurations (weights of Φ are seeded).

    Args:
        latency: for `budget.cost=latency`, where it is known already; None: read or measured here.

    Raises:
        InputError: for whatever does not exist or does not fit.
    """
    check_batch(config, processes)
    source = open_source(config)
    split(source, config.data.holdout, config.seed)
    folder = local_folder(str(config.backbone.pretrained), config.backbone.revision)
    backbone = load_backbone(folder)
    if config.backbone.gradient_checkpointing and not backbone._supports_gradient_checkpointing:
        raise InputError("backbone.gradient_checkpointing=true: this backbone does not support it: set false")
    tie_embedders(backbone)
    if not source.encoded and not (folder / "vae").is_dir():
        raise InputError(f"data.source={config.data.source!r} gives images, and {folder} has no vae: "
                         "use data.source=latents")
    scheduler = load_scheduler(folder)
    size = latent_size(config, folder)
    shape = (backbone.config.in_channels, size, size)
    cost = count_cost(backbone, size, choose_sites(config, backbone))
    if by_time(config):
        latency = latency or plan_latency(config, device)
    budget, experts = plan_budget(config, cost, size, scheduler, latency)
    check_validation(config, backbone)
    check_encoding(source.encoding, folder, config)
    _check_sample(source, config, backbone, shape)
    dtype = DTYPES[config.train.mixed_precision]
    captioned = _reads_captions(source)
    if captioned or (config.validate.every and config.validate.prompts):
        check_text(folder, backbone.config.cross_attention_dim)
    vae = None if source.encoded else load_vae(folder, device, dtype)
    text = TextEncoder(folder, device, dtype) if captioned else None

    teacher, offload = _teacher(config, folder, backbone, device)
    choose_trained(backbone, config)
    if config.backbone.channels_last:
        backbone.to(memory_format=torch.channels_last)
    torch.manual_seed(config.seed)
    features_TD = timestep_features(backbone, scheduler.config.num_train_timesteps)
    hypernetwork = HyperNetwork(
        config.experts.count, len(cost.sites), *features_TD.shape,
        config.experts.router, config.experts.tau, config.experts.offset,
    )
    if config.experts.router == "learned":
        hypernetwork.temporal_router.features_TD.copy_(features_TD)
    return Parts(folder, backbone.to(device), teacher, offload, scheduler, dtype, vae, text,
                 hypernetwork.to(device), cost, budget, source, shape, experts,
                 experts.latency if experts else latency)


def load_vae(folder: Path, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKL:
    """The pipeline's VAE, frozen.

    Raises:
        InputError: if it cannot be loaded.
    """
    return _load(AutoencoderKL, folder / "vae", dtype).requires_grad_(False).eval().to(device)


def _load(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A diffusers model, with all of its weights; diffusers alone makes up those that a file lacks."""
    try:
        model, info = cls.from_pretrained(folder, torch_dtype=dtype, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"backbone.pretrained: {folder} cannot be loaded "
                         f"({' '.join(str(error).split())[:300]})") from None
    if info["missing_keys"]:
        raise InputError(f"backbone.pretrained: {folder} lacks {len(info['missing_keys'])} weights, such as "
                         f"{sorted(info['missing_keys'])[0]}: fetch or convert it again")
    return model


def check_encoding(encoding: Encoding | None, folder: Path, config: Config) -> None:
    """Refuse latents that were made otherwise than this run would make them, as far as is written in them.

    Raises:
        InputError: naming what differs.
    """
    if encoding is None:
        return
    data = config.data
    found: dict[str, Any] = {"resolution": encoding.resolution}
    wanted: dict[str, Any] = {"resolution": data.resolution}
    if (folder / "vae" / "config.json").is_file():
        vae = AutoencoderKL.load_config(folder / "vae")
        found |= {"scaling factor": encoding.scaling_factor, "shift factor": encoding.shift_factor, "VAE": encoding.vae}
        wanted |= {"scaling factor": vae.get("scaling_factor", 0.18215), "shift factor": vae.get("shift_factor") or 0.0,
                   "VAE": encoding.vae and weights_hash(folder / "vae")}
    if encoding.text_encoder is not None:
        found["text encoder"] = encoding.text_encoder
        wanted["text encoder"] = weights_hash(folder / "text_encoder")
    for name, value in found.items():
        if value is not None and wanted[name] is not None and value != wanted[name]:
            raise InputError(f"data.path={data.path!r}: encoded by {encoding.maker} with {name} {value}, but "
                             f"backbone.pretrained={config.backbone.pretrained!r} at data.resolution={data.resolution} "
                             f"has {wanted[name]}: encode again with scripts/encode_latents.py")
    if data.flip and not encoding.mirrored:
        raise InputError(f"data.flip=true: data.path={data.path!r} holds no mirror images: encode again with "
                         "data.flip=true, or set false")


def check(config: Config, processes: int, latency: Latency | None = None) -> None:
    """Everything that can be refused before weights are loaded; `latency` as for `build`.

    Raises:
        InputError: as `build` would.
    """
    check_batch(config, processes)
    check_packages(config)
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if config.train.mixed_precision == "fp16" and on_cpu:  # where accelerate would switch it off without a word
        raise InputError("train.mixed_precision='fp16' needs a GPU: use no or bf16 on a CPU")
    captioned, encoding = False, None
    if not config.demo.model or config.data.path is None or Path(config.data.path).exists():  # a demo draws its data
        source = open_source(config)
        split(source, config.data.holdout, config.seed)
        captioned, encoding = _reads_captions(source), source.encoding
    pretrained = Path(str(config.backbone.pretrained))
    if config.demo.model or pretrained.is_dir() or (CONFIGS / "models" / pretrained).is_dir():
        backbone, *_ = describe(config, latency)
        if pretrained.is_dir():
            check_encoding(encoding, pretrained, config)
        if captioned and pretrained.is_dir():
            check_text(pretrained, backbone.config.cross_attention_dim)


def check_packages(config: Config) -> None:
    """Raises InputError if an option needs a package that is not installed."""
    optional = [
        ("wandb", f"log.tracker={config.log.tracker}", config.log.tracker == "wandb"),
        ("bitsandbytes", f"optim.optimizer={config.optim.optimizer}", config.optim.optimizer == "adamw_8bit"),
        ("peft", f"lora.rank={config.lora.rank}", config.lora.rank is not None),
    ]
    for package, option, wanted in optional:
        if wanted and importlib.util.find_spec(package) is None:
            raise InputError(f"{option}: the package {package} is not installed: pip install {package}, or change it")


def check_batch(config: Config, processes: int) -> None:
    """Raises InputError unless the global batch divides among processes and micro-batches."""
    parts = processes * config.train.gradient_accumulation
    if config.train.batch_size % parts:
        raise InputError(
            f"train.batch_size={config.train.batch_size} cannot be shared by {processes} processes with "
            f"train.gradient_accumulation={config.train.gradient_accumulation}: choose a multiple of {parts}"
        )


def load_backbone(folder: Path) -> Backbone:
    """The pipeline's UNet or DiT in fp32, from safetensors (or, with `weights_only`, older weight files)."""
    cls, component = component_of(folder)
    return _load(cls, folder / component, torch.float32)


def _teacher(config: Config, folder: Path, backbone: Backbone,
             device: torch.device | str) -> tuple[Backbone | None, Any]:
    """The frozen dense model, `backbone` as it is now or that of `teacher.pretrained`; its offloading hook or None."""
    if config.teacher.pretrained is not None:
        teacher = load_backbone(local_folder(config.teacher.pretrained, field="teacher.pretrained"))
        if _shape_of(teacher) != _shape_of(backbone):
            raise InputError(f"teacher.pretrained={config.teacher.pretrained!r}: another architecture than the "
                             "backbone's: name a pipeline of the same one")
        tie_embedders(teacher)
    elif not (folder / EXPERTS).is_file() and config.experts.pretrained != config.backbone.pretrained:
        teacher = copy.deepcopy(backbone)
    elif config.loss.distils:  # weights that were tuned under experts make no dense model
        raise InputError(f"backbone.pretrained={config.backbone.pretrained!r} is a finished run: set "
                         "teacher.pretrained to the original model, or loss.output_kd and loss.feature_kd to 0")
    else:
        return None, None
    nn.Module.to(teacher, DTYPES[config.teacher.precision])  # past diffusers' warning of modules to keep in fp32: none
    teacher.requires_grad_(False).eval()
    if config.teacher.offload or not config.loss.distils:
        return cpu_offload_with_hook(teacher, device)
    return teacher.to(device), None


def _shape_of(backbone: Backbone) -> dict[str, Any]:
    return {name: value for name, value in backbone.config.items() if not name.startswith("_")}


def choose_trained(backbone: Backbone, config: Config) -> None:
    """Add adapters, which alone are trained then, and freeze what `backbone.freeze` names.

    Raises:
        InputError: for names that nothing has, or if nothing is left to train.
    """
    if config.lora.rank is not None:
        add_adapters(backbone, config.lora.rank, config.lora.alpha, config.lora.targets)
    patterns = config.backbone.freeze
    names = dict(backbone.named_parameters())
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(f"backbone.freeze: {pattern!r} names no parameter: use names such as "
                             f"{next(iter(names))!r}, with wildcards")
        for name in matched:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise InputError(f"backbone.freeze={list(patterns)}: leaves nothing to train: freeze less")


def _reads_captions(source: Source) -> bool:
    return source.num_classes == 0 and source.empty_text is None


def _shift(vae: AutoencoderKL) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0


def _check_sample(source: Source, config: Config, backbone: Backbone, shape: tuple[int, ...]) -> None:
    sample = Tolerant(source, np.arange(len(source)), config.seed)[0, 0]
    wanted = example_inputs(backbone, shape[-1])
    moments = (2 * shape[0], *shape[1:])
    for name, expected in (("latents", shape), ("moments", moments)):
        if name in sample and tuple(sample[name].shape) != expected:
            raise InputError(
                f"data.path={config.data.path!r}: {name} of shape {tuple(sample[name].shape)} do not fit the "
                f"backbone, which takes {expected} at data.resolution={config.data.resolution}"
            )
    if ("class_labels" in wanted) != ("labels" in sample):
        kind = "class labels" if "class_labels" in wanted else "text"
        raise InputError(f"data.source={config.data.source!r}: the backbone is conditioned on {kind}, which "
                         "this data does not have")
    if "class_labels" in wanted and (source.num_classes or 0) > null_class(backbone):
        raise InputError(f"data.path={config.data.path!r}: {source.num_classes} classes, but the backbone knows "
                         f"{null_class(backbone)}")
    if "encoder_hidden_states" in sample:
        width = backbone.config.cross_attention_dim
        if sample["encoder_hidden_states"].shape[-1] != width:
            raise InputError(f"data.path={config.data.path!r}: text states of width "
                             f"{sample['encoder_hidden_states'].shape[-1]} do not fit the backbone's {width}")
