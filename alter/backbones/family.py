"""How diffusers' backbones differ at their boundary: name, unit and direction of the timestep, sign of the output.

All else that a pipeline tells its backbone (text states, pooled text, masks, ids of positions, guidance, sizes) is
conditioning, which passes unchanged.
"""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Backbone: TypeAlias = Any  # a UNet2DConditionModel or a transformer of diffusers
COMPONENTS = ("unet", "transformer", "transformer_2")  # of a pipeline, that may be a backbone
_TIMESTEPS = ("timestep", "timesteps", "t")  # the argument's names


@dataclass(frozen=True)
class Family:
    """What a class of backbones expects and gives.

    Attributes:
        noise_level: the timestep is the noise level sigma in [0, 1], not a training timestep in [0, T].
        reversed: it counts from pure noise to the clean image. scale: it is multiplied by this.
        sign: of the output, against what the scheduler steps with.
        listed: inputs and outputs are lists of samples [C, 1, h, w].
        batched: blocks have the batch on their first axis, so that layers can run on some samples alone.
        unknown: why its timestep does not tell the training timestep, by which experts are chosen.
    """

    noise_level: bool = False
    reversed: bool = False
    scale: float = 1.0
    sign: int = 1
    listed: bool = False
    batched: bool = True
    unknown: str = ""

    def training(self, value: float, count: int) -> float:
        """The training timestep, of `count`, that the backbone's `value` stands for; a flow's has fractions."""
        timestep = value / self.scale * count if self.noise_level else value / self.scale
        return count - timestep if self.reversed else timestep

    def value(self, timesteps: Tensor) -> Tensor:
        """The inverse, of timesteps [B], of 1000 as every pipeline of such families counts."""
        timesteps = 1000 - timesteps if self.reversed else timesteps
        timesteps = timesteps.float() / 1000 if self.noise_level else timesteps
        return timesteps if self.scale == 1 else timesteps * self.scale


_SIGMA = Family(noise_level=True)
_TO_CLEAN = Family(noise_level=True, reversed=True, sign=-1)
_EDM = Family(unknown="it is told noise in EDM's units")
FAMILIES = {
    **dict.fromkeys(
        ("AceStepTransformer1DModel", "AuraFlowTransformer2DModel", "BriaFibo2Transformer2DModel",
         "ChromaTransformer2DModel", "Flux2Transformer2DModel", "Flux3Transformer2DModel", "FluxTransformer2DModel",
         "Krea2Transformer2DModel", "LongCatImageTransformer2DModel", "OvisImageTransformer2DModel",
         "PRXTransformer2DModel", "QwenImage21Transformer2DModel", "QwenImageTransformer2DModel"), _SIGMA),
    **dict.fromkeys(
        ("Ideogram4Transformer2DModel", "Lumina2Transformer2DModel", "LuminaNextDiT2DModel"), _TO_CLEAN),
    **dict.fromkeys(("CosmosTransformer3DModel", "StableAudioDiTModel"), _EDM),
    "ErnieImageTransformer2DModel": Family(batched=False),
    "HiDreamImageTransformer2DModel": Family(sign=-1),
    "LongCatAudioDiTTransformer": Family(noise_level=True, reversed=True),
    "MiniMaxH3Transformer3DModel": Family(unknown="its timesteps are those of a sequence, not one of each sample"),
    "MochiTransformer3DModel": Family(reversed=True),
    "NucleusMoEImageTransformer2DModel": Family(noise_level=True, sign=-1),
    "OmniGenTransformer2DModel": Family(noise_level=True, reversed=True),
    "SanaWMTransformer3DModel": Family(sign=-1),
    "ZImageTransformer2DModel": Family(noise_level=True, reversed=True, sign=-1, listed=True),
}


def backbone_class(backbone: Any) -> Any:
    """The diffusers class of a backbone, beneath what compiles, wraps or subclasses it."""
    module = getattr(backbone, "_orig_mod", backbone)
    module = getattr(module, "module", module)  # of DistributedDataParallel
    classes = [cls for cls in type(module).__mro__ if "forward" in vars(cls)]
    return next((cls for cls in classes if cls.__module__.startswith("diffusers.")), classes[0])


def family_of(backbone: Any) -> Family:
    """By the name of its class, and by its configuration."""
    family, config = FAMILIES.get(backbone_class(backbone).__name__, Family()), backbone.config
    if config.get("zero_cond_t") or config.get("causal_condition"):  # Qwen-Image-Edit: further rows for time 0
        family = dataclasses.replace(family, batched=False)
    if backbone_class(backbone).__name__ == "SanaTransformer2DModel" and config.get("guidance_embeds"):
        family = dataclasses.replace(family, unknown="Sana-Sprint is told noise in units of its own")
    return dataclasses.replace(family, scale=config.get("timestep_scale") or 1.0)


@functools.cache
def parameters(cls: Any) -> tuple[str, ...]:
    """The names of the arguments of a class's forward, without self."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


@functools.cache
def timestep_argument(cls: Any) -> tuple[str, int]:
    """The name of a backbone class's timestep and its place among the arguments of forward."""
    name = next(name for name in _TIMESTEPS if name in parameters(cls))
    return name, parameters(cls).index(name)


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The precision of a model's weights, without those that are quantised, adapters, or kept in fp32 by diffusers."""
    # diffusers' `dtype` property walks over every module
    model = getattr(model, "module", model)  # of DistributedDataParallel
    other = (".lora_", *(getattr(model, "_keep_in_fp32_modules", None) or ()))
    floating = ((name, value.dtype) for name, value in model.named_parameters() if value.is_floating_point())
    return next(dtype for name, dtype in floating if not any(part in name for part in other))


def predict(backbone: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
    """What the scheduler steps with, from a diffusers backbone in the precision of its weights; inputs may have any.

    Args:
        noisy_latents: as the scheduler steps them, [B, C, h, w], [B, C, F, h, w] or, where the pipeline packs them,
            [B, tokens, C].
        timesteps: training timesteps [B], int64 or, of a flow, float32 in [0, 1000].
        conditioning: further keyword arguments; nested tensors are cast too.

    Returns: as `noisy_latents`; with twice the channels where the backbone learns the variance.
    """
    cls, family = backbone_class(backbone), family_of(getattr(backbone, "module", backbone))
    dtype = floating_dtype(backbone)

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    latents = noisy_latents.to(dtype)
    output = backbone(**{parameters(cls)[0]: list(latents.unsqueeze(2)) if family.listed else latents,
                         timestep_argument(cls)[0]: family.value(timesteps),
                         **tree_map_only(Tensor, cast, dict(conditioning))}).sample
    output = torch.stack(output).squeeze(2) if family.listed else output
    return output if family.sign == 1 else -output
