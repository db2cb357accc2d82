"""A diffusers pipeline for class-conditional DiTs of any number of classes, with a VAE or without.

diffusers' DiTPipeline takes 1000 for the class that means "no label", and needs a VAE.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Optional

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..backbones.dit import null_class
from ..backbones.family import predict
from ..backbones.pretrained import shift_of
from ..common.errors import InputError


class ClassConditionalPipeline(DiffusionPipeline):
    """Images of classes from a DiT; without a VAE its latents are the pixels.

    Args:
        transformer: predicts in the latents' channels, or in twice as many (a learned variance).
        scheduler: any diffusers scheduler that counts noise in training timesteps. vae: None for a DiT of pixels.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    # diffusers 0.37 and 0.38 read no `|` and, in Python 3.10, no Any.
    def __init__(self, transformer: DiTTransformer2DModel, scheduler: SchedulerMixin,
                 vae: Optional[AutoencoderKL] = None) -> None:  # noqa: UP045
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(self, class_labels: int | Sequence[int] | Tensor, guidance_scale: float = 4.0,
                 generator: torch.Generator | list[torch.Generator] | None = None, num_inference_steps: int = 50,
                 output_type: str = "pil", return_dict: bool = True) -> ImagePipelineOutput | tuple:
        """One image for each of `class_labels`.

        Args:
            class_labels: each in [0, number of classes).
            guidance_scale: of classifier-free guidance (arXiv 2207.12598); at 1 the null class is not computed.
            generator: one for all images, or one per image. num_inference_steps: >= 1.
            output_type: "pil"; "np", float32 [B, H, W, C] in [0, 1]; "pt", float32 [B, C, H, W] in [0, 1]; or "latent",
                float32 [B, C, h, w].

        Raises:
            InputError: naming the argument.
        """
        labels = torch.as_tensor(class_labels).reshape(-1)
        _check(labels, null_class(self.transformer), generator, num_inference_steps, output_type)
        labels, guided = labels.to(self._execution_device), guidance_scale != 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, null_class(self.transformer))])
        self.scheduler.set_timesteps(num_inference_steps)
        latents = self._noise(len(labels) // (2 if guided else 1), generator)
        random = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        for timestep in self.progress_bar(self.scheduler.timesteps):
            noisy = self.scheduler.scale_model_input(latents, timestep)
            if guided:
                noisy = torch.cat([noisy, noisy])
            pred = predict(self.transformer, noisy, torch.as_tensor(timestep).expand(len(noisy)).to(noisy.device),
                           {"class_labels": labels}).float()
            if guided:
                pred, null = pred.chunk(2)
                pred = self._guide(pred, null, guidance_scale)
            if not self._reads_variance:
                pred = pred[:, : latents.shape[1]]
            latents = self.scheduler.step(pred, timestep, latents, **random).prev_sample
        images = self._images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(self, count: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        config = self.transformer.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        return randn_tensor(shape, generator, self._execution_device, torch.float32) * self.scheduler.init_noise_sigma

    def _guide(self, pred: Tensor, null: Tensor, scale: float) -> Tensor:
        """Guidance of what is predicted; a learned variance stays that of the class."""
        channels = self.transformer.config.in_channels
        guided = null[:, :channels] + scale * (pred[:, :channels] - null[:, :channels])
        return torch.cat([guided, pred[:, channels:]], dim=1)

    @property
    def _reads_variance(self) -> bool:
        """Whether the scheduler takes the learned variance beside what is predicted."""
        learned = str(self.scheduler.config.get("variance_type")).startswith("learned")
        return learned and isinstance(self.scheduler, DDPMScheduler)

    def _images(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        if self.vae is not None:
            latents = latents / self.vae.config.scaling_factor + shift_of(self.vae)
            latents = self.vae.decode(latents.to(self.vae.dtype)).sample
        pixels = (latents.float().clamp(-1, 1) + 1) / 2
        if output_type == "pt":
            return pixels
        images = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images


def _check(labels: Tensor, classes: int, generator: Any, steps: int, output_type: str) -> None:
    if not len(labels) or labels.is_floating_point() or not all(0 <= label < classes for label in labels.tolist()):
        raise InputError(f"class_labels={labels.tolist()}: give at least one, each from 0 to {classes - 1}")
    if isinstance(generator, list) and len(generator) != len(labels):
        raise InputError(f"generator: {len(generator)} for {len(labels)} images: give one for all, or one per image")
    if steps < 1:
        raise InputError(f"num_inference_steps={steps}: give at least 1")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise InputError(f"output_type={output_type!r}: choose one of pil, np, pt, latent")
