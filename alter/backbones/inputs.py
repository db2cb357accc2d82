"""Arguments of one forward of a backbone, made from its configuration: to count, time and probe its layers."""

import inspect
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import Timesteps, get_timestep_embedding
from torch import Tensor

from ..common.errors import InputError
from .family import backbone_class, family_of, floating_dtype, parameters, timestep_argument

Size: TypeAlias = int | tuple[int, int]  # of latents, in latent pixels: a side, or height and width

# Keys of a UNet's configuration that stand for further inputs.
_MORE_THAN_TEXT = {
    "class_embed_type": "class labels", "num_class_embeds": "class labels",
    "encoder_hid_dim_type": "image or projected text states", "encoder_hid_dim": "projected text states",
    "time_cond_proj_dim": "a guidance embedding, as in latent consistency models",
    "dual_cross_attention": "two texts",
}
# Of the text that a backbone is given: the keys of its width, the first that is set.
_TEXT_WIDTHS = ("encoder_hid_dim", "caption_channels", "text_dim", "text_embed_dim", "joint_attention_dim",
                "cap_feat_dim", "context_in_dim", "cross_attention_dim", "text_hidden_dim")
_TEXT_TOKENS = {  # as their pipelines pad them; Qwen-Image and Z-Image do not: a long prompt
    "QwenImageTransformer2DModel": 128, "ZImageTransformer2DModel": 128,
    "UNet2DConditionModel": 77, "SD3Transformer2DModel": 333, "PixArtTransformer2DModel": 300,
    "SanaTransformer2DModel": 300, "SanaVideoTransformer3DModel": 300, "LTXVideoTransformer3DModel": 128,
    "Lumina2Transformer2DModel": 256, "AuraFlowTransformer2DModel": 256,
    "HunyuanVideoTransformer3DModel": 256, "MochiTransformer3DModel": 256, "HiDreamImageTransformer2DModel": 128,
}
_USUAL_TOKENS = 512
# How a pipeline lays out latents: packed by 2 x 2 into tokens; as tokens; as those of a video; frames first.
_PACKED = {"BriaTransformer2DModel", "ChromaTransformer2DModel", "Flux2Transformer2DModel", "Flux3Transformer2DModel",
           "FluxTransformer2DModel", "Krea2Transformer2DModel", "LongCatImageTransformer2DModel",
           "NucleusMoEImageTransformer2DModel", "OvisImageTransformer2DModel", "QwenImageTransformer2DModel"}
_AS_TOKENS = {"BriaFiboTransformer2DModel"}
_PACKED_VIDEO = {"LTXVideoTransformer3DModel"}
FRAMES_FIRST = {"CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"}


def example_inputs(backbone: Any, size: Size, text_tokens: int | None = None, batch: int = 1,
                   frames: int = 1) -> dict[str, Any]:
    """Keyword arguments of one forward, all zeros, on the backbone's device and in its precision.

    Args:
        size: of the latents. frames: of a video's latents.
        text_tokens: of a text-conditioned backbone; None: as many as its pipeline gives it.

    Raises:
        InputError: if it needs arguments that are not known here.
    """
    cls = backbone_class(backbone)
    usual = backbone.config.get("max_text_seq_length") or _TEXT_TOKENS.get(cls.__name__, _USUAL_TOKENS)
    make = _Inputs(backbone, size, text_tokens or usual, batch, frames)
    given = {parameters(cls)[0]: make.latents(), timestep_argument(cls)[0]: make.zeros(batch)}
    for name in parameters(cls)[1:]:
        value = make.argument(name)
        if value is not None:
            given[name] = value
    needed = [name for name, one in inspect.signature(cls.forward).parameters.items() if one.default is one.empty]
    unknown = [name for name in needed[1:] if name not in given]
    if unknown:
        raise InputError(f"backbone.pretrained: alter does not know what a {cls.__name__} takes for "
                         f"{', '.join(unknown)}, so that its layers cannot be counted: use another backbone")
    return given


def run_example(backbone: Any, inputs: Mapping[str, Any]) -> None:
    """One forward on `example_inputs`.

    Raises:
        InputError: if the backbone needs what they lack, or cannot run where it is (on the meta device).
    """
    try:
        with torch.no_grad():
            backbone(**inputs)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"backbone.pretrained: a {backbone_class(backbone).__name__} cannot be counted, because it "
                         f"fails on {', '.join(inputs)} ({' '.join(str(error).split())[:120]}): use another "
                         "backbone") from None


def is_class_conditional(backbone: Any) -> bool:
    """Whether class labels alone condition it."""
    return "class_labels" in parameters(backbone_class(backbone)) and _width(backbone.config) is None


def is_video(backbone: Any) -> bool:
    """Whether its latents have frames."""
    return "3D" in backbone_class(backbone).__name__


def latent_shape(backbone: Any, size: Size, frames: int = 1) -> tuple[int, ...]:
    """Of one sample as the scheduler steps it: (C, h, w), (C, F, h, w), (F, C, h, w) or (tokens, C)."""
    shape = _Inputs(backbone, size, 0, 1, frames).shape()
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
    # Some models multiply a timestep in [0, 1] by 1000 here.
    return (get_timestep_embedding(timesteps, 256) if own is None else own(timesteps / own.scale)).float()


class _Inputs:
    """The arguments, by their names."""

    def __init__(self, backbone: Any, size: Size, tokens: int, batch: int, frames: int) -> None:
        self.backbone, self.config, self.cls = backbone, backbone.config, backbone_class(backbone)
        self.height, self.width = (size, size) if isinstance(size, int) else size
        self.tokens, self.batch, self.frames = tokens, batch, frames

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.backbone.device, dtype=floating_dtype(self.backbone))

    def whole(self) -> Tensor:
        """The mask of texts that fill their tokens."""
        return torch.ones(self.batch, self.tokens, device=self.backbone.device, dtype=torch.bool)

    def numbers(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.backbone.device, dtype=torch.long)

    def shape(self) -> tuple[int, ...]:
        """Of one sample, as the backbone takes it."""
        name, channels, height, width = self.cls.__name__, self.config.get("in_channels"), self.height, self.width
        if channels is None:
            raise InputError(f"backbone.pretrained: alter does not know the latents of a {name}: use another backbone")
        if name in _PACKED:
            return (height // 2) * (width // 2), channels
        if name in _AS_TOKENS:
            return height * width, channels
        if name in _PACKED_VIDEO:
            return self.frames * height * width, channels
        if name in FRAMES_FIRST:
            return self.frames, channels, height, width
        if is_video(self.backbone) or family_of(self.backbone).listed:
            return channels, self.frames, height, width
        return channels, height, width

    def latents(self) -> Any:
        shape = self.shape()
        return [self.zeros(*shape)] * self.batch if family_of(self.backbone).listed else self.zeros(self.batch, *shape)

    def argument(self, name: str) -> Any:
        """A further argument; None where the backbone does without."""
        config, batch, size = self.config, self.batch, (self.height, self.width)
        width = _width(config)
        if name == "encoder_hidden_states" and width is not None:
            layers = [config.num_text_layers] if "num_text_layers" in config else []  # of the encoder, in Krea 2
            return self.zeros(batch, self.tokens, *layers, width)
        if name == "position_ids" and "num_text_layers" in config:
            return self.zeros(self.tokens + self.shape()[0], 3)
        if name == "cap_feats":
            return [self.zeros(self.tokens, config.cap_feat_dim)] * batch
        if name in ("encoder_attention_mask", "encoder_hidden_states_mask") and self.cls.__name__ not in (
                "UNet2DConditionModel", "LatteTransformer3DModel"):
            return self.whole()
        if name in ("pooled_projections", "pooled_embeds"):
            pooled = config.get("pooled_projection_dim") or config.get("text_emb_dim")
            return None if pooled is None else self.zeros(batch, pooled)
        if name == "guidance" and config.get("guidance_embeds"):
            return self.zeros(batch)
        if name in ("img_ids", "txt_ids") and self.cls.__name__ in _PACKED | _AS_TOKENS:
            axes = len(config.get("axes_dims_rope") or (1, 1, 1))
            return self.zeros(self.shape()[0] if name == "img_ids" else self.tokens, axes)
        if name == "timestep_cond" and config.get("time_cond_proj_dim"):
            return self.zeros(batch, config.time_cond_proj_dim)
        if name == "img_shapes":
            return [[(1, self.height // 2, self.width // 2)]] * batch
        if name in ("num_frames", "height", "width"):
            return {"num_frames": self.frames, "height": self.height, "width": self.width}[name]
        if name in ("original_size", "target_size", "crop_coords"):
            return self.zeros(batch, 2)
        if name == "class_labels" and (width is None or config.get("num_class_embeds")):
            return self.numbers(batch)
        if name == "text_encoder_layers":  # BRIA FIBO: a text for each block
            blocks = config.num_layers + config.num_single_layers
            return [self.zeros(batch, self.tokens, config.text_encoder_dim)] * blocks
        if name in ("encoder_hidden_states_t5", "encoder_hidden_states_llama3") and "llama_layers" in config:  # HiDream
            t5, llama = (self.zeros(batch, self.tokens, channels) for channels in config.caption_channels)
            return t5 if name.endswith("t5") else [llama] * (config.num_layers + config.num_single_layers)
        if name == "fps" and "concat_padding_mask" in config:  # Cosmos
            return 24
        if name == "padding_mask" and config.get("concat_padding_mask"):
            return self.zeros(1, 1, *size)
        if name == "control_hidden_states" and config.get("vace_in_channels"):
            return self.zeros(batch, config.vace_in_channels, self.frames, *size)
        if name == "text_bth":  # ERNIE-Image
            return self.zeros(batch, self.tokens, config.text_in_dim)
        if name == "text_lens":
            return torch.full((batch,), self.tokens, device=self.backbone.device)
        if name == "prior_token_id":  # GLM-Image
            return self.numbers(batch, (self.height // config.patch_size) * (self.width // config.patch_size))
        if name == "prior_token_drop":  # an index: of none
            return self.numbers(0)
        return self._second(name) if config.get("text_embed_2_dim") else (
            self._added() if name == "added_cond_kwargs" else None)

    def _second(self, name: str) -> Any:
        """HunyuanVideo 1.5: a second text, and an image."""
        config, batch = self.config, self.batch
        if name == "encoder_attention_mask_2":
            return self.whole()
        width = {"encoder_hidden_states_2": "text_embed_2_dim", "image_embeds": "image_embed_dim"}.get(name)
        return None if width is None else self.zeros(batch, self.tokens, config[width])

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
