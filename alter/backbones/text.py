"""Prompts to the text states that condition a backbone, as diffusers' Stable Diffusion pipelines make them."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..common.device import to_device
from ..common.errors import InputError
from .pretrained import variant_of


class TextEncoder:
    """A pipeline folder's tokenizer and frozen text encoder.

    Raises:
        InputError: if either cannot be loaded, or they do not fit each other.
    """

    def __init__(self, folder: Path, device: torch.device | str, dtype: torch.dtype) -> None:
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
            self.model = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype,
                                                       variant=variant_of(folder / "text_encoder"))
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise InputError(f"backbone.pretrained: tokenizer/ or text_encoder/ of {folder} cannot be loaded "
                             f"({' '.join(str(error).split())[:200]})") from None
        if len(self.tokenizer) > self.model.config.vocab_size:
            raise InputError(f"{folder / 'tokenizer'}: {len(self.tokenizer)} tokens do not fit the text encoder's "
                             f"vocab_size={self.model.config.vocab_size}: use the tokenizer it was trained with")
        self.model.to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """The last hidden states [B, tokens, D] of B `prompts`, padded or cut to the tokenizer's length."""
        return self.encode(prompts)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """As calling it, but with an autograd graph, for training the encoder."""
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=self.tokenizer.model_max_length,
                                truncation=True, return_tensors="pt")
        mask = tokens.attention_mask if getattr(self.model.config, "use_attention_mask", False) else None
        device = self.model.device
        return self.model(to_device(tokens.input_ids, device),
                          attention_mask=None if mask is None else to_device(mask, device))[0]

    def too_long(self, prompts: Sequence[str]) -> int:
        """How many of `prompts` are cut, being longer than the tokenizer takes."""
        whole = self.tokenizer(list(prompts), verbose=False).input_ids
        return sum(len(ids) > self.tokenizer.model_max_length for ids in whole)


def check_text(folder: Path, width: int) -> None:
    """Refuse a tokenizer or text encoder that does not fit a backbone with cross-attention of `width`; reads JSON only.

    Raises:
        InputError: naming the file and the value.
    """
    encoder = _read(folder / "text_encoder" / "config.json")
    tokenizer = _read(folder / "tokenizer" / "tokenizer_config.json")
    if encoder.get("hidden_size") != width:
        raise InputError(f"{folder / 'text_encoder'}: hidden_size={encoder.get('hidden_size')} does not fit the "
                         f"backbone's cross_attention_dim={width}: use the text encoder it was trained with")
    length, most = tokenizer.get("model_max_length", 0), encoder.get("max_position_embeddings", 0)
    if not 0 < length <= most:
        raise InputError(f"{folder / 'tokenizer'}: model_max_length={length} does not fit the text encoder's "
                         f"max_position_embeddings={most}: use the tokenizer it was trained with")


def _read(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"backbone.pretrained: {file} cannot be read ({type(error).__name__}): text needs a "
                         "complete tokenizer/ and text_encoder/") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object")
    return content
