"""From a configuration to everything that the trainer needs: models, costs, budget, data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...backbones.conditioning import Conditioner, Conditioning, join
from ...backbones.cost import CostTable
from ...backbones.dit import null_class, tie_embedders
from ...backbones.family import Backbone, predict
from ...backbones.gates import FeatureTap, Simulator
from ...backbones.guidance import guidance_of
from ...backbones.inputs import is_class_conditional, timestep_features
from ...backbones.latency import Latency
from ...backbones.latents import encode, final_latents
from ...backbones.lora import FILE_NAME as ADAPTERS
from ...backbones.lora import Base, add_adapters, load_adapters, merge_adapters, put_adapters, without_adapters
from ...backbones.noising import Betas, Noising
from ...backbones.pretrained import (
    DTYPES,
    load_backbone,
    load_vae,
    local_folder,
    shift_of,
    told_component,
)
from ...backbones.sampling import sample_latents
from ...backbones.schedules import image_tokens, make_solver
from ...backbones.sites import feature_points
from ...backbones.sizes import pixel_size
from ...backbones.stepping import only_steps
from ...common.config import Config
from ...common.device import to_device
from ...common.errors import InputError
from ...data.base import Source
from ...data.batches import Fit
from ...experts.artefact import TemporalExperts
from ...method.budget import Budget, rows_of, timestep_weights
from ...method.hypernetwork import HyperNetwork
from ...method.routers import Times, slow_features
from .machine import check_machine
from .plan import Plan, by_time, make_plan, open_data, plan_latency, reads_captions
from .teacher import load_teacher


@dataclass
class Parts:
    """What a run is made of. `backbone` carries the gates of `simulator`.

    component: what the pipeline in `folder` calls the backbone.
    teacher: the frozen dense model, without gates; `backbone` itself where adapters alone are trained (see `dense`);
        None where a finished run is tuned further and nothing else is named.
    offload: moves the teacher back to host memory (accelerate), or None where it stays on the device.
    vae: frozen; None where the data is encoded already, or the model has none.
    conditioner: of captions; None where the data has none. Images of encoded data load both for as long as they take.
    scheduler: the pipeline's, by whose noise samples are drawn. noising: by what is trained.
    precision: of vae and text encoders. size: of images in pixels, (height, width), or (frames, height, width).
    guidance_scale, max_tokens: of all images that are drawn.
    hypernetwork: None where the search needs none.
    experts: those given by `experts.pretrained`, or None where they are to be found.
    latency: what the budget's time was measured as; None for a budget of MACs.
    """

    folder: Path
    component: str
    backbone: Backbone
    teacher: Backbone | None
    offload: Any
    scheduler: Any
    noising: Noising
    precision: torch.dtype
    vae: AutoencoderKL | None
    conditioner: Conditioner | None
    size: tuple[int, ...]
    guidance_scale: float
    max_tokens: int | None
    hypernetwork: HyperNetwork | None
    cost: CostTable
    budget: Budget
    source: Source
    latent_shape: tuple[int, ...]
    experts: TemporalExperts | None = None
    latency: Latency | None = None
    simulator: Simulator = field(init=False)
    student_tap: FeatureTap = field(init=False)
    teacher_tap: FeatureTap | None = field(init=False)

    def __post_init__(self) -> None:
        self.simulator = Simulator(self.backbone)
        points = feature_points(self.backbone)
        self.student_tap = FeatureTap(self.backbone, points)
        self.teacher_tap = None if self.teacher is None else (
            self.student_tap if self.teacher is self.backbone else FeatureTap(self.teacher, points))

    @property
    def fit(self) -> Fit:
        """What a sample must be like."""
        by_class, empty = is_class_conditional(self.backbone), self.source.empty_text
        shape = self.latent_shape if self.source.buckets is None else None
        return Fit(shape, null_class(self.backbone) if by_class else None,
                   None if empty is None else tuple(empty.shape))

    @property
    def told_component(self) -> str | None:
        """The component as experts.json names it."""
        return told_component(self.folder, self.component)

    @property
    def tokens(self) -> int:
        """Of an image, by which dynamic shifts of flows go."""
        return image_tokens(self.latent_shape, self.backbone.config.get("patch_size"))

    @property
    def free_guidance(self) -> float:
        """`guidance_of` the run's scale."""
        return guidance_of(self.backbone, self.guidance_scale)

    @property
    def has_pictures(self) -> bool:
        """Whether what `images` gives are pixels."""
        return (self.folder / "vae").is_dir() or self.latent_shape[0] in (1, 3)

    @contextmanager
    def dense(self) -> Iterator[Backbone]:
        """The teacher, for forwards inside the block: of the backbone itself, without adapters and with open gates."""
        if self.teacher is not self.backbone:
            yield self.teacher
            return
        backbone: Any = self.backbone
        training = backbone.training
        try:
            with without_adapters(backbone.eval()), self.simulator.use(None):
                yield backbone
        finally:
            backbone.train(training)

    @torch.no_grad()
    def teach(self, noisy_latents: Tensor, timesteps: Tensor,
              conditioning: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The teacher's output and its activations at the feature points."""
        assert self.teacher_tap is not None
        with self.dense() as teacher, self.teacher_tap.capture() as features:
            pred = predict(teacher, noisy_latents, timesteps, conditioning)
        self.release_teacher()
        return pred, features

    def release_teacher(self) -> None:
        """Free the device of an offloaded teacher until its next use."""
        if self.offload is not None:
            self.offload.offload()

    @torch.no_grad()
    def latents(self, batch: Mapping[str, Any], posterior: Callable[..., Tensor] | None = None) -> Tensor:
        """The batch's latents float32 [B, C, h, w].

        posterior: from the shape (C, h, w) of a sample's latents to the noise [B, C, h, w] with which they are sampled,
            if the batch holds images or moments; None: their mean is taken.
        """
        if "latents" in batch:
            return batch["latents"]
        if "moments" in batch:
            mean, std = batch["moments"].chunk(2, dim=1)
            return mean if posterior is None else mean + std * to_device(
                posterior(tuple(mean.shape[1:])), mean.device).to(mean.dtype)
        assert self.vae is not None
        pipe = self.conditioner.pipe if self.conditioner else SimpleNamespace(vae=self.vae)
        mean, std = encode(pipe, batch["images"])
        return mean if posterior is None else mean + std * to_device(
            posterior(tuple(mean.shape[1:])), mean.device)

    def draw(self, backbone: Backbone, batch: Mapping[str, Any], steps: int, seed: int, batch_size: int = 250,
             chosen: Sequence[int] | None = None) -> Tensor:
        """The images of `drawn`."""
        return self.drawn(backbone, batch, steps, seed, batch_size, chosen)[0]

    def drawn(self, backbone: Backbone, batch: Mapping[str, Any], steps: int, seed: int, batch_size: int = 250,
              chosen: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Images float32 [N, C, H, W] (of videos [N, F, C, H, W]) in [-1, 1] by the weights of `backbone`, and their
        latents float32 [N, ...] as the scheduler steps them, both on the CPU.

        Args:
            batch: has "labels" long [N], on its device, or "captions" (a list of N), which the pipeline draws itself.
            steps: denoising steps. seed: sample i depends on it, on i and on its condition alone.
            batch_size: samples per forward. chosen: those of the steps that are taken; None: all.
        """
        if "captions" in batch:
            conditioner = self.conditioner or self._conditioner()
            solver = make_solver(self.scheduler, self.tokens) if isinstance(
                self.noising, Betas) else conditioner.pipe.scheduler
            with only_steps(solver, chosen, steps), final_latents(solver) as latents:
                images = conditioner.draw(backbone, batch["captions"], steps, self.guidance_scale, seed, solver,
                                          batch_size)
            return images, torch.cat(latents).float().cpu()
        everything = torch.ones(len(batch["labels"]), dtype=torch.bool)
        given, nothing = self.conditioning(batch, ~everything), self.conditioning(batch, everything)
        found = sample_latents(backbone, self.scheduler, self.latent_shape, given, nothing, steps, seed,
                               self.guidance_scale, batch_size, chosen)
        return self.images(found), found.cpu()

    def _conditioner(self) -> Conditioner:
        return Conditioner(self.folder, self.backbone.device, self.precision, self.size, self.guidance_scale,
                           self.max_tokens, self.component)

    @torch.no_grad()
    def images(self, latents: Tensor, vae: AutoencoderKL | None = None) -> Tensor:
        """Latents pass the decoder of this VAE, or of the model's where it has one."""
        if (self.folder / "vae").is_dir():
            vae = vae or self.vae or load_vae(self.folder, self.backbone.device, self.precision)
            latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + shift_of(vae)
            latents = torch.cat([vae.decode(part).sample for part in latents.split(8)])
        return latents.float().clamp(-1, 1).cpu()

    def conditioning(self, batch: Mapping[str, Any], dropped: Tensor) -> dict[str, Any]:
        """The backbone's conditioning arguments, with that of the samples in `dropped` (bool [B]) removed.

        batch: has "labels" long [B], "captions" (a list of B), "conditioning" (rows of each of B) or
            "encoder_hidden_states" [B, tokens, D], and of images "sizes" [B, 4].
        """
        if "labels" in batch:
            dropped = to_device(dropped, batch["labels"].device)
            return {"class_labels": batch["labels"].masked_fill(dropped, null_class(self.backbone))}
        if "captions" in batch:
            assert self.conditioner is not None
            height, width = batch["images"].shape[-2:] if "images" in batch else self.size[-2:]
            return self.conditioner(batch["captions"], dropped, (height, width)).arguments(batch.get("sizes"))
        if "conditioning" in batch:
            common = self.source.common[batch["bucket"][0] if "bucket" in batch else 0]
            samples = [{**common.same, **(common.dropped if drop else rows)}
                       for rows, drop in zip(batch["conditioning"], dropped.tolist(), strict=True)]
            told = Conditioning(join(samples, self.backbone), common.shared).arguments(batch.get("sizes"))
            return tree_map_only(Tensor, lambda value: to_device(value, self.backbone.device), told)
        text = batch["encoder_hidden_states"]
        assert self.source.empty_text is not None
        empty = to_device(self.source.empty_text, text.device).to(text.dtype)
        return {"encoder_hidden_states": torch.where(to_device(dropped, text.device)[:, None, None], empty, text)}


def build(config: Config, processes: int = 1, device: torch.device | str = "cpu",
          latency: Latency | None = None, source: Source | None = None, frozen: torch.dtype | None = None) -> Parts:
    """Load everything that `plan.make_plan` has found to fit; the same for equal configurations (Φ is seeded).

    Args:
        latency: for `budget.cost=latency`, where it is known already; None: read or measured here.
        source: in place of the data that `config` names.
        frozen: the weights are not trained: the backbone has this dtype, and is its own teacher.

    Raises:
        InputError: for whatever does not exist or does not fit.
    """
    check_machine(config, processes)
    folder = local_folder(str(config.backbone.pretrained), config.backbone.revision)
    source = open_data(config, folder) if source is None else source
    if by_time(config):
        latency = latency or plan_latency(config, device)
    plan = make_plan(config, folder, source, latency)
    assert plan.budget is not None
    component = plan.component
    backbone = load_backbone(folder, dtype=frozen or DTYPES[config.backbone.precision],
                             quantize=config.backbone.quantize, component=component)
    tie_embedders(backbone)
    former = _former_adapters(config, component)
    if former and config.lora.rank is None:
        put_adapters(backbone, former, component)
        merge_adapters(backbone)
    dtype = DTYPES[config.train.mixed_precision]
    size, guidance = pixel_size(folder, config.data.resolution, config.data.frames), config.evaluate.guidance_scale
    tokens = config.data.max_tokens
    conditioner = Conditioner(folder, device, dtype, size, guidance, tokens, component) if reads_captions(
        source) else None
    vae = conditioner.pipe.vae if conditioner else None if source.encoded else load_vae(folder, device, dtype)
    teacher, offload = load_teacher(config, folder, backbone, device, frozen is not None)
    if teacher is None and plan.experts is None and config.search.method == "elastic":
        raise InputError(f"backbone.pretrained={config.backbone.pretrained!r} is a finished run, and "
                         "search.method=elastic measures errors against a dense model: set teacher.pretrained")
    choose_trained(backbone, config)
    if former and config.lora.rank is not None:
        load_adapters(backbone, former, component)
    if config.backbone.channels_last:
        backbone.to(memory_format=torch.channels_last)
    hypernetwork = None
    if config.search.method == "hypernetwork":
        hypernetwork = _make_hypernetwork(config, backbone, plan).to(device)
    return Parts(folder, component, backbone.to(device), teacher, offload, plan.scheduler, plan.noising.to(device),
                 dtype, vae, conditioner, size, guidance, tokens, hypernetwork, plan.cost, plan.budget, source,
                 plan.latent_shape, plan.experts, plan.latency)


def _former_adapters(config: Config, component: str) -> dict[str, Tensor]:
    """Those of the finished run that `backbone.pretrained` names, if it holds adapters alone."""
    folder = Path(str(config.backbone.pretrained))
    base = Base.beside(folder)
    if base is None:
        return {}
    if base.component != component:
        raise InputError(f"backbone.pretrained={config.backbone.pretrained!r}: holds adapters of {base.component}, and "
                         f"the run trains {component}: name a whole pipeline, such as that of a run with lora.merge")
    return load_file(folder / ADAPTERS)


def _make_hypernetwork(config: Config, backbone: Backbone, plan: Plan) -> HyperNetwork:
    torch.manual_seed(config.seed)
    assert plan.budget is not None
    experts, noising, count = config.experts, plan.noising, plan.noising.num_timesteps
    features_TD = slow_features(count) if experts.router == "smooth" else timestep_features(backbone, count)
    log_snr_T = noising.log_snr(noising.at(torch.arange(count)))
    trained, place_T = noising.trained, torch.arange(count)
    if len(trained) < count:  # timesteps that are not trained have the expert of the nearest
        assert plan.budget.timesteps is not None
        place_T = torch.from_numpy(rows_of(trained.numpy(), plan.budget.timesteps, count))
        features_TD, log_snr_T = features_TD[trained[place_T]], log_snr_T[trained[place_T]]
    times = Times(features_TD, log_snr_T, timestep_weights(count, plan.budget.timesteps), place_T)
    return HyperNetwork(experts.count, len(plan.cost.sites), times, experts.router, experts.tau, experts.offset)


def choose_trained(backbone: Backbone, config: Config) -> None:
    """Add adapters, which alone are trained then, and freeze what `backbone.freeze` names.

    Raises:
        InputError: for names that nothing has, or if nothing is left to train.
    """
    if config.lora.rank is not None:
        add_adapters(backbone, config.lora.rank, config.lora.alpha, config.lora.targets)
        # Every process has read them; broadcasting those that are quantised is not possible.
        backbone._ddp_params_and_buffers_to_ignore = [
            name for name, value in backbone.named_parameters() if not value.requires_grad]
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
