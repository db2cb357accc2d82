"""Arguments of one forward of a backbone, made from its configuration: to count, time and probe its layers."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import Timesteps, get_timestep_embedding
from torch import Tensor

from ..common.errors import InputError
from .family import backbone_class, family_of, floating_dtype, parameters, timestep_argument

# Keys of a UNet's configuration that stand for further inputs.
_MORE_THAN_TEXT = {
    "class_embed_type": "class labels", "num_class_embeds": "class labels",
    "encoder_hid_dim_type": "image or projected text states", "encoder_hid_dim": "projected text states",
    "time_cond_proj_dim": "a guidance embedding, as in latent consistency models",
    "dual_cross_attention": "two texts",
}
# Of the text that a backbone is given: the keys of its width, the first that is set.
_TEXT_WIDTHS = ("encoder_hid_dim", "caption_channels", "text_dim", "text_embed_dim", "joint_attention_dim",
                "cap_feat_dim", "cross_attention_dim")
_TEXT_TOKENS = {  # as their pipelines pad or commonly fill them
    "UNet2DConditionModel": 77, "SD3Transformer2DModel": 333, "PixArtTransformer2DModel": 300,
    "SanaTransformer2DModel": 300, "SanaVideoTransformer3DModel": 300, "LTXVideoTransformer3DModel": 128,
    "Lumina2Transformer2DModel": 256, "AuraFlowTransformer2DModel": 256, "CogVideoXTransformer3DModel": 226,
    "HunyuanVideoTransformer3DModel": 256, "MochiTransformer3DModel": 256, "HiDreamImageTransformer2DModel": 128,
}
_USUAL_TOKENS = 512
# How a pipeline lays out latents: packed by 2 x 2 into tokens; as tokens of a video; as a video; frames first.
_PACKED = {"BriaTransformer2DModel", "ChromaTransformer2DModel", "Flux2Transformer2DModel", "FluxTransformer2DModel",
           "LongCatImageTransformer2DModel", "OvisImageTransformer2DModel", "QwenImageTransformer2DModel"}
_PACKED_VIDEO = {"LTXVideoTransformer3DModel"}
_FRAMES_FIRST = {"CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"}


def example_inputs(backbone: Any, latent_size: int, text_tokens: int | None = None, batch: int = 1,
                   frames: int = 1) -> dict[str, Any]:
    """Keyword arguments of one forward, all zeros, on the backbone's device and in its precision.

    Args:
        latent_size: side of the latents, in latent pixels. frames: of a video's latents.
        text_tokens: of a text-conditioned backbone; None: as many as its pipeline gives it.

    Raises:
        InputError: if it needs arguments that are not known here.
    """
    cls = backbone_class(backbone)
    make = _Inputs(backbone, latent_size, text_tokens or _TEXT_TOKENS.get(cls.__name__, _USUAL_TOKENS), batch, frames)
    given = {parameters(cls)[0]: make.latents(), timestep_argument(cls)[0]: make.timestep()}
    for name in parameters(cls)[1:]:
        value = make.argument(name)
        if value is not None:
            given[name] = value
    return given


def is_class_conditional(backbone: Any) -> bool:
    """Whether class labels alone condition it."""
    return "class_labels" in parameters(backbone_class(backbone)) and _width(backbone.config) is None


def is_video(backbone: Any) -> bool:
    """Whether its latents have frames."""
    return "3D" in backbone_class(backbone).__name__


def latent_shape(backbone: Any, latent_size: int, frames: int = 1) -> tuple[int, ...]:
    """Of one sample as the scheduler steps it: (C, h, w), (C, F, h, w), (F, C, h, w) or (tokens, C)."""
    shape = _Inputs(backbone, latent_size, 0, 1, frames).shape()
    return (shape[0], *shape[2:]) if family_of(backbone).listed else shape


def takes_one_text(backbone: Any) -> bool:
    """Whether the states of one CLIP encoder are all its text, as in Stable Diffusion 1 and 2."""
    return isinstance(backbone, UNet2DConditionModel) and not backbone.config.get("addition_embed_type")


def text_width(backbone: Any) -> int | None:
    """D of its text states [B, tokens, D]; None if it takes none."""
    return _width(backbone.config)


def timestep_features(backbone: Any, num_timesteps: int) -> Tensor:
    """The backbone's own sinusoidal embedding of every training timestep 0..T-1, or a usual one: float32 [T, D]."""
    timesteps = torch.arange(num_timesteps)
    own = next((module for module in backbone.modules() if isinstance(module, Timesteps)), None)
    return (get_timestep_embedding(timesteps, 256) if own is None else own(timesteps)).float()


class _Inputs:
    """The arguments, by their names."""

    def __init__(self, backbone: Any, size: int, tokens: int, batch: int, frames: int) -> None:
        self.backbone, self.config, self.cls = backbone, backbone.config, backbone_class(backbone)
        self.size, self.tokens, self.batch, self.frames = size, tokens, batch, frames

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.backbone.device, dtype=floating_dtype(self.backbone))

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, device=self.backbone.device, dtype=torch.bool)

    def shape(self) -> tuple[int, ...]:
        """Of one sample, as the backbone takes it."""
        name, channels, size = self.cls.__name__, self.config.in_channels, self.size
        if name in _PACKED:
            return (size // 2) ** 2, channels
        if name in _PACKED_VIDEO:
            return self.frames * size**2, channels
        if name in _FRAMES_FIRST:
            return self.frames, channels, size, size
        if is_video(self.backbone) or family_of(self.backbone).listed:
            return channels, self.frames, size, size
        return channels, size, size

    def latents(self) -> Any:
        shape = self.shape()
        return [self.zeros(*shape)] * self.batch if family_of(self.backbone).listed else self.zeros(self.batch, *shape)

    def timestep(self) -> Tensor:
        if family_of(self.backbone).noise_level:
            return self.zeros(self.batch)
        return torch.zeros(self.batch, dtype=torch.long, device=self.backbone.device)

    def argument(self, name: str) -> Any:
        """A further argument; None where the backbone does without."""
        config, batch, size = self.config, self.batch, self.size
        width = _width(config)
        if name == "encoder_hidden_states" and width is not None:
            return self.zeros(batch, self.tokens, width)
        if name == "cap_feats":
            return [self.zeros(self.tokens, config.cap_feat_dim)] * batch
        if name in ("encoder_attention_mask", "encoder_hidden_states_mask") and self.cls is not UNet2DConditionModel:
            return self.ones(batch, self.tokens)
        if name == "pooled_projections":
            return self.zeros(batch, config.pooled_projection_dim)
        if name == "guidance" and config.get("guidance_embeds"):
            return self.zeros(batch)
        if name in ("img_ids", "txt_ids") and self.cls.__name__ in _PACKED:
            axes = len(config.get("axes_dims_rope") or (1, 1, 1))
            return self.zeros((size // 2) ** 2 if name == "img_ids" else self.tokens, axes)
        if name == "timestep_cond" and config.get("time_cond_proj_dim"):
            return self.zeros(batch, config.time_cond_proj_dim)
        if name == "img_shapes":
            return [[(1, size // 2, size // 2)]] * batch
        if name in ("num_frames", "height", "width"):
            return self.frames if name == "num_frames" else size
        if name in ("original_size", "target_size", "crop_coords"):
            return self.zeros(batch, 2)
        if name == "class_labels" and (width is None or config.get("num_class_embeds")):
            return torch.zeros(batch, dtype=torch.long, device=self.backbone.device)
        return self._added() if name == "added_cond_kwargs" else None

    def _added(self) -> dict[str, Any]:
        config, batch = self.config, self.batch
        if config.get("addition_embed_type") == "text_time":  # SDXL: size and crop
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            return {"text_embeds": self.zeros(batch, pooled), "time_ids": self.zeros(batch, 6)}
        if getattr(self.backbone, "use_additional_conditions", False):  # PixArt-alpha at 1024 pixels
            return {"resolution": self.zeros(batch, 2), "aspect_ratio": self.zeros(batch, 1)}
        return {"resolution": None, "aspect_ratio": None} if self.cls is not UNet2DConditionModel else {}


def _width(config: Mapping[str, Any]) -> int | None:
    return next((config[key] for key in _TEXT_WIDTHS if config.get(key) is not None), None)


def check_supported(name: str, config: Mapping[str, Any], field: str = "backbone.pretrained") -> None:
    """Refuse a UNet that needs conditioning which its pipeline does not give alone; reads its configuration.

    Args:
        name: of its class. config: as diffusers saves it; what is missing has diffusers' default.

    Raises:
        InputError: about `field`, naming what is not supported.
    """
    channels = config.get("in_channels", 4)
    is_unet = name == UNet2DConditionModel.__name__
    if is_unet:
        needs = [f"{key}={config[key]!r} ({meaning})" for key, meaning in _MORE_THAN_TEXT.items() if config.get(key)]
        if needs:
            raise InputError(f"{field}: a UNet with {', '.join(needs)} is not trained yet, though experts apply to it: "
                             "use one that is conditioned on text alone, such as Stable Diffusion 1.5 or 2.1")
        width = config.get("cross_attention_dim", 1280)
        if not isinstance(width, int):
            raise InputError(f"{field}: a UNet with cross_attention_dim={width!r} is not supported yet: "
                             "use one with the same width in all blocks")
    out = config.get("out_channels", 4 if is_unet else channels) or channels
    packed = name in _PACKED and 4 * out == channels  # Qwen-Image counts its output before packing
    if out not in (channels, 2 * channels) and not packed:  # 2: a learned variance
        raise InputError(f"{field}: a {name} with in_channels={channels} and out_channels={out} (inpainting, editing, "
                         "upscaling) is not trained yet, though experts apply to it: use one that takes the latents "
                         "alone, such as that of Stable Diffusion 1.5 or 2.1")
