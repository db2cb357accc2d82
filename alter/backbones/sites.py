"""The prunable layers ("sites") of a diffusers backbone (ALTER, arXiv 2505.21817).

DiT: every transformer block. UNet, as in ALTER's paper: every transformer block, and every resnet whose *hidden* input
has as many channels as its output. A down or mid resnet's hidden input is its input; an up-block resnet receives the
concatenation of the hidden state and a skip feature, hidden state first, so its bypass is the first channels of its
input and skipping it drops the skip feature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..common.errors import InputError

Backbone: TypeAlias = UNet2DConditionModel | DiTTransformer2DModel
PIPELINE_COMPONENT = {UNet2DConditionModel: "unet", DiTTransformer2DModel: "transformer"}

# Keys of a UNet's configuration that stand for further inputs.
_MORE_THAN_TEXT = {
    "addition_embed_type": "as in SDXL", "class_embed_type": "class labels", "num_class_embeds": "class labels",
    "encoder_hid_dim_type": "image or projected text states", "encoder_hid_dim": "projected text states",
    "time_cond_proj_dim": "a guidance embedding, as in latent consistency models",
    "dual_cross_attention": "two texts",
}


@dataclass(frozen=True)
class Site:
    """One prunable layer ("site"), and what its output is when it is skipped.

    Attributes:
        name: its module path.
        channels: C of its output [B, C, H, W]; None for a layer of tokens, [B, N, D].
    """

    name: str
    channels: int | None

    def bypass(self, hidden_states: Tensor) -> Tensor:
        """x_in, the layer's output when it is skipped: `hidden_states`, or its first channels."""
        return hidden_states if self.channels is None else hidden_states[:, : self.channels]


class Removed(nn.Module):
    """Stands in a site whose layer was taken out of memory; it is still a site, which no expert may run."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site, self.out_channels = site, site.channels

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise InputError("experts: this backbone was trimmed and has no dense form: apply its experts first")


def find_sites(backbone: nn.Module) -> tuple[Site, ...]:
    """The sites of `backbone`, in the order of its named modules.

    Raises:
        InputError: if the model is of another class or has no prunable layer.
    """
    if not isinstance(backbone, tuple(PIPELINE_COMPONENT)):
        known = " or ".join(cls.__name__ for cls in PIPELINE_COMPONENT)
        raise InputError(
            f"backbone.pretrained: a {type(backbone).__name__} has no sites known to alter: use a {known}"
        )
    hidden_channels = _hidden_channels(backbone) if isinstance(backbone, UNet2DConditionModel) else {}
    sites = []
    for path, module in backbone.named_modules():
        if isinstance(module, Removed):
            sites.append(module.site)
        elif isinstance(module, BasicTransformerBlock):
            sites.append(Site(path, None))
        elif isinstance(module, ResnetBlock2D) and not (module.up or module.down):
            if hidden_channels.get(path) == module.out_channels:
                sites.append(Site(path, module.out_channels))
    if not sites:
        raise InputError(f"backbone.pretrained: this {type(backbone).__name__} has no prunable layer")
    return tuple(sites)


def check_supported(name: str, config: Mapping[str, Any], field: str = "backbone.pretrained") -> None:
    """Refuse a backbone that needs more than alter gives it; reads its configuration alone.

    Args:
        name: of its class. config: as diffusers saves it; what is missing has diffusers' default.

    Raises:
        InputError: about `field`, naming what is not supported.
    """
    channels = config.get("in_channels", 4)
    out = config.get("out_channels", 4 if name == UNet2DConditionModel.__name__ else channels) or channels
    if name == UNet2DConditionModel.__name__:
        needs = [f"{key}={config[key]!r} ({meaning})" for key, meaning in _MORE_THAN_TEXT.items() if config.get(key)]
        if needs:
            raise InputError(f"{field}: a UNet with {', '.join(needs)} is not supported yet: use one that "
                             "is conditioned on text alone, such as Stable Diffusion 1.5 or 2.1")
        width = config.get("cross_attention_dim", 1280)
        if not isinstance(width, int):
            raise InputError(f"{field}: a UNet with cross_attention_dim={width!r} is not supported yet: "
                             "use one with the same width in all blocks")
    if out not in (channels, 2 * channels):  # 2: a learned variance
        raise InputError(f"{field}: a {name} with in_channels={channels} and out_channels={out} (inpainting, editing, "
                         "upscaling) is not supported yet: use one that takes the latents alone, such as that of "
                         "Stable Diffusion 1.5 or 2.1")


def named_sites(backbone: nn.Module, names: Sequence[str], field: str = "experts") -> tuple[Site, ...]:
    """The sites of `backbone`, which must have these names.

    Raises:
        InputError: about `field`, if they have not.
    """
    sites = find_sites(backbone)
    if tuple(site.name for site in sites) != tuple(names):
        raise InputError(f"{field}: their {len(names)} sites are not the {len(sites)} of this "
                         f"{type(backbone).__name__} (they begin with {names[0] if names else None!r}): use the "
                         "backbone that they were trained on")
    return sites


def remove_layer(backbone: nn.Module, site: Site) -> None:
    """Take the site's layer out of `backbone`, in place, except for what others read in it."""
    layer: Any = backbone.get_submodule(site.name)
    removed: Any = Removed(site)
    if site.name == "transformer_blocks.0" and isinstance(backbone, DiTTransformer2DModel):
        removed.norm1 = nn.Module()  # the output head embeds the timestep with the first block's embedder
        removed.norm1.emb = layer.norm1.emb
    parent, _, child = site.name.rpartition(".")
    setattr(backbone.get_submodule(parent), child, removed)


def feature_points(backbone: Backbone) -> tuple[str, ...]:
    """Modules whose outputs L_featKD compares. UNet: each down, mid and up block. DiT: the middle block."""
    if isinstance(backbone, DiTTransformer2DModel):
        return (f"transformer_blocks.{len(backbone.transformer_blocks) // 2}",)
    down = [f"down_blocks.{i}" for i in range(len(backbone.down_blocks))]
    up = [f"up_blocks.{i}" for i in range(len(backbone.up_blocks))]
    return (*down, *(["mid_block"] if backbone.mid_block is not None else []), *up)


def timestep_features(backbone: Backbone, num_timesteps: int) -> Tensor:
    """The backbone's own sinusoidal embedding of every training timestep 0..T-1: float32 [T, D]."""
    timesteps = torch.arange(num_timesteps)
    if isinstance(backbone, DiTTransformer2DModel):
        return backbone.transformer_blocks[0].norm1.emb.time_proj(timesteps).float()
    return backbone.time_proj(timesteps).float()


def example_inputs(backbone: Backbone, latent_size: int, text_tokens: int = 77, batch: int = 1) -> dict[str, Any]:
    """Keyword arguments of one forward, all zeros, on the backbone's device and in its dtype.

    Args:
        latent_size: side of the latents, in latent pixels. text_tokens: of a text-conditioned backbone.
    """
    like = {"device": backbone.device, "dtype": backbone.dtype}
    sample = torch.zeros(batch, backbone.config.in_channels, latent_size, latent_size, **like)
    timestep = torch.zeros(batch, dtype=torch.long, device=backbone.device)
    if isinstance(backbone, DiTTransformer2DModel):
        return {"hidden_states": sample, "timestep": timestep, "class_labels": torch.zeros_like(timestep)}
    text = torch.zeros(batch, text_tokens, backbone.config.cross_attention_dim, **like)
    return {"sample": sample, "timestep": timestep, "encoder_hidden_states": text}


def null_class(backbone: DiTTransformer2DModel) -> int:
    """The row of the label table that means "no label"."""
    return backbone.config.num_embeds_ada_norm


def embedders(backbone: nn.Module) -> list[Any]:
    """A DiT's timestep and label embedders, one copy per block, a shared one listed once; none for a UNet."""
    if not isinstance(backbone, DiTTransformer2DModel):
        return []
    found = [block.norm1.emb for block in backbone.transformer_blocks if hasattr(block, "norm1")]
    return list({id(embedder): embedder for embedder in found}.values())


def tie_embedders(backbone: Backbone, field: str = "backbone.pretrained", new: bool = False) -> None:
    """Let all blocks of a DiT use one timestep and label embedder, in place; a UNet is not changed.

    diffusers gives every DiT block its own copy of what is one module in the original model. One shared
    module keeps the copies equal while training and costs one optimizer state. Its built-in label dropout,
    which would draw separately in every block, is switched off: labels are dropped once, in the trainer.

    Args:
        field: where the weights come from. new: they are random, so that unequal copies mean nothing.

    Raises:
        InputError: about `field`, if the copies are not equal, as after training them in plain diffusers.
    """
    if isinstance(backbone, DiTTransformer2DModel):
        shared = backbone.transformer_blocks[0].norm1.emb
        for index, block in enumerate(backbone.transformer_blocks):
            if not (new or backbone.device.type == "meta") and not _equal(shared, block.norm1.emb):
                raise InputError(f"{field}: its blocks 0 and {index} have unequal timestep or label embedders "
                                 "(transformer_blocks.*.norm1.emb), of which alter keeps one: give weights in which "
                                 "they are equal, such as those from before a fine-tuning by diffusers")
        shared.class_embedder.dropout_prob = 0.0
        for block in backbone.transformer_blocks:
            block.norm1.emb = shared


def _equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return one is other or all(torch.equal(a, b) for a, b in pairs)


def _hidden_channels(unet: UNet2DConditionModel) -> dict[str, int]:
    """Channels of the hidden state that enters each resnet, without concatenated skip features."""
    hidden = {}
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D) and not name.startswith("up_blocks."):
            hidden[name] = module.in_channels
    channels = unet.config.block_out_channels[-1]
    for i, block in enumerate(unet.up_blocks):
        for j, resnet in enumerate(block.resnets):
            hidden[f"up_blocks.{i}.resnets.{j}"] = channels
            channels = resnet.out_channels
    return hidden
