"""From a configuration to everything that the trainer needs: models, costs, budget, data."""

import copy
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from torch import Tensor

from .budget import Budget
from .config import CONFIGS, Config
from .cost import CostTable, count_cost
from .data import Source, open_source, split
from .errors import InputError
from .hypernetwork import HyperNetwork
from .simulator import FeatureTap, Simulator
from .sites import (
    PIPELINE_COMPONENT,
    Backbone,
    example_inputs,
    feature_points,
    find_sites,
    null_class,
    tie_embedders,
    timestep_features,
)


@dataclass
class Parts:
    """What a run is made of. `backbone` carries the gates of `simulator`; `teacher` never had any."""

    folder: Path
    backbone: Backbone
    teacher: Backbone
    scheduler: DDPMScheduler
    vae: AutoencoderKL | None
    hypernetwork: HyperNetwork
    cost: CostTable
    budget: Budget
    source: Source
    latent_shape: tuple[int, int, int]
    simulator: Simulator = field(init=False)
    student_tap: FeatureTap = field(init=False)
    teacher_tap: FeatureTap = field(init=False)

    def __post_init__(self) -> None:
        self.simulator = Simulator(self.backbone)
        points = feature_points(self.backbone)
        self.student_tap = FeatureTap(self.backbone, points)
        self.teacher_tap = FeatureTap(self.teacher, points)

    def latents(self, batch: dict[str, Tensor], posterior: Tensor) -> Tensor:
        """The batch's latents [B, C, h, w]; images pass the frozen VAE, sampled with `posterior`."""
        if self.vae is None or "latents" in batch:
            return batch["latents"]
        with torch.no_grad():
            moments = self.vae.encode(batch["images"].to(self.vae.device, self.vae.dtype)).latent_dist
        latents = moments.mean + moments.std * posterior.to(moments.mean)
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return ((latents - shift) * self.vae.config.scaling_factor).float()

    def conditioning(self, batch: dict[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
        """The backbone's conditioning arguments, with that of the samples in `dropped` (bool [B]) removed."""
        if "labels" in batch:
            dropped = dropped.to(batch["labels"].device)
            return {"class_labels": batch["labels"].masked_fill(dropped, null_class(self.backbone))}
        text = batch["encoder_hidden_states"]
        assert self.source.empty_text is not None
        empty = self.source.empty_text.to(text)
        return {"encoder_hidden_states": torch.where(dropped.to(text.device)[:, None, None], empty, text)}


def build(config: Config, processes: int = 1, device: torch.device | str = "cpu") -> Parts:
    """Load and check everything; the same for equal configurations (weights of Φ are seeded).

    Raises:
        InputError: for whatever does not exist or does not fit.
    """
    check_batch(config, processes)
    source = open_source(config)
    split(source, config.data.holdout, config.seed)
    folder = local_folder(config)
    backbone = load_backbone(folder)
    if config.backbone.gradient_checkpointing and not backbone._supports_gradient_checkpointing:
        raise InputError("backbone.gradient_checkpointing=true: this backbone does not support it: set false")
    tie_embedders(backbone)
    vae = None
    if not source.encoded:
        if not (folder / "vae").is_dir():
            raise InputError(f"data.source={config.data.source!r} gives images, and {folder} has no vae: "
                             "use data.source=latents")
        dtype = torch.bfloat16 if config.train.mixed_precision == "bf16" else torch.float32
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).requires_grad_(False).eval()
        vae.to(device)
    scheduler = load_scheduler(folder)
    size = latent_size(config, folder)
    shape = (backbone.config.in_channels, size, size)
    _check_sample(source, config, backbone, shape, has_vae=vae is not None)

    teacher = copy.deepcopy(backbone).requires_grad_(False).eval().to(device)
    cost = count_cost(backbone, size)
    budget = Budget(cost.share_L, config.budget.keep_ratio, config.budget.over)
    torch.manual_seed(config.seed)
    features_TD = timestep_features(backbone, scheduler.config.num_train_timesteps)
    hypernetwork = HyperNetwork(
        config.experts.count, len(cost.sites), *features_TD.shape,
        config.experts.router, config.experts.tau, config.experts.offset,
    )
    if config.experts.router == "learned":
        hypernetwork.temporal_router.features_TD.copy_(features_TD)
    return Parts(folder, backbone.to(device), teacher, scheduler, vae, hypernetwork.to(device), cost, budget,
                 source, shape)


def describe(config: Config) -> tuple[Backbone, CostTable, Budget]:
    """The backbone on the meta device with its costs and budget, from JSON alone: no weights, no network.

    Raises:
        InputError: if neither `backbone.pretrained` nor configs/models/ holds the backbone's configuration.
    """
    folder = _architecture(config)
    with torch.device("meta"):
        cls, component = _component(folder)
        backbone = cls.from_config(cls.load_config(folder / component))
        tie_embedders(backbone)
    find_sites(backbone)
    cost = count_cost(backbone, latent_size(config, folder))
    return backbone, cost, Budget(cost.share_L, config.budget.keep_ratio, config.budget.over)


def check(config: Config, processes: int) -> None:
    """Everything that can be refused before weights are loaded.

    Raises:
        InputError: as `build` would.
    """
    check_batch(config, processes)
    if config.log.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise InputError("log.tracker='wandb': the package wandb is not installed: install it, or use tensorboard")
    source = open_source(config)
    split(source, config.data.holdout, config.seed)
    pretrained = Path(str(config.backbone.pretrained))
    if config.demo.model or pretrained.is_dir() or (CONFIGS / "models" / pretrained).is_dir():
        describe(config)


def check_batch(config: Config, processes: int) -> None:
    """Raises InputError unless the global batch divides among processes and micro-batches."""
    parts = processes * config.train.gradient_accumulation
    if config.train.batch_size % parts:
        raise InputError(
            f"train.batch_size={config.train.batch_size} cannot be shared by {processes} processes with "
            f"train.gradient_accumulation={config.train.gradient_accumulation}: choose a multiple of {parts}"
        )


def local_folder(config: Config) -> Path:
    """The folder of the pretrained pipeline; a hub id is downloaded into the hub's cache first."""
    pretrained = str(config.backbone.pretrained)
    if Path(pretrained).is_dir():
        return Path(pretrained)
    try:
        return Path(DiffusionPipeline.download(pretrained, revision=config.backbone.revision))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"backbone.pretrained={pretrained!r}: no such folder, and the hub gave nothing "
                         f"({reason}): give a diffusers folder or a hub id") from None


def load_backbone(folder: Path) -> Backbone:
    """The pipeline's UNet or DiT in fp32, from safetensors (or, with `weights_only`, older weight files)."""
    cls, component = _component(folder)
    try:
        return cls.from_pretrained(folder / component, torch_dtype=torch.float32)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"backbone.pretrained: {folder / component} cannot be loaded "
                         f"({' '.join(str(error).split())[:300]})") from None


def load_scheduler(folder: Path) -> DDPMScheduler:
    """The training schedule, with the betas and the prediction type of the pipeline's scheduler."""
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise InputError(f"backbone.pretrained={str(folder)!r} has no scheduler/scheduler_config.json")
    return DDPMScheduler.from_pretrained(folder / "scheduler")


def latent_size(config: Config, folder: Path) -> int:
    """Side of the latents: `data.resolution`, divided by the VAE's factor where the pipeline has a VAE."""
    if not (folder / "vae" / "config.json").is_file():
        return config.data.resolution
    levels = len(AutoencoderKL.load_config(folder / "vae")["block_out_channels"])
    factor = 2 ** (levels - 1)
    if config.data.resolution % factor:
        raise InputError(f"data.resolution={config.data.resolution}: choose a multiple of the VAE's {factor}")
    return config.data.resolution // factor


def _architecture(config: Config) -> Path:
    """Where the backbone's JSON configuration is: its folder, or ours for a known model or a demo."""
    pretrained = str(config.backbone.pretrained)
    for folder in (Path(pretrained), CONFIGS / "models" / (config.demo.model or pretrained)):
        if folder.is_dir() and any((folder / part).is_dir() for part in PIPELINE_COMPONENT.values()):
            return folder
    raise InputError(f"backbone.pretrained={pretrained!r}: no such folder, and configs/models/ does not know "
                     "it: give a diffusers folder")


def _component(folder: Path) -> tuple[type[Backbone], str]:
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


def _check_sample(source: Source, config: Config, backbone: Backbone, shape: tuple[int, ...],
                  has_vae: bool) -> None:
    sample = source[0, 0]
    wanted = example_inputs(backbone, shape[-1])
    if not has_vae and tuple(sample["latents"].shape) != shape:
        raise InputError(
            f"data.path={config.data.path!r}: latents of shape {tuple(sample['latents'].shape)} do not fit the "
            f"backbone, which takes {shape} at data.resolution={config.data.resolution}"
        )
    if ("class_labels" in wanted) != ("labels" in sample):
        kind = "class labels" if "class_labels" in wanted else "text"
        raise InputError(f"data.source={config.data.source!r}: the backbone is conditioned on {kind}, which "
                         "this data does not have")
    if "class_labels" in wanted and source.num_classes > null_class(backbone):
        raise InputError(f"data.path={config.data.path!r}: {source.num_classes} classes, but the backbone knows "
                         f"{null_class(backbone)}")
    if "encoder_hidden_states" in wanted:
        width = backbone.config.cross_attention_dim
        if sample["encoder_hidden_states"].shape[-1] != width:
            raise InputError(f"data.path={config.data.path!r}: text states of width "
                             f"{sample['encoder_hidden_states'].shape[-1]} do not fit the backbone's {width}")
