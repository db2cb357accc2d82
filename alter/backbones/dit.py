"""What is particular to diffusers' DiT: one embedder of timestep and label in every block, and the null class."""

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from ..common.errors import InputError


def null_class(backbone: DiTTransformer2DModel) -> int:
    """The row of the label table that means "no label"."""
    return backbone.config.num_embeds_ada_norm


def embedders(backbone: nn.Module) -> list[Any]:
    """A DiT's timestep and label embedders, one copy per block, a shared one listed once; none for other backbones."""
    if not isinstance(backbone, DiTTransformer2DModel):
        return []
    found = [block.norm1.emb for block in backbone.transformer_blocks if hasattr(block, "norm1")]
    return list({id(embedder): embedder for embedder in found}.values())


def tie_embedders(backbone: Any, field: str = "backbone.pretrained", new: bool = False) -> None:
    """Let all blocks of a DiT use one timestep and label embedder, in place; other backbones are not changed.

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
