"""Transformers of sound."""

from typing import Any

import torch

from .draws import Specimen, mask, normal, sigmas

HEADS = dict(num_attention_heads=2, attention_head_dim=8)


def stable(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=normal(generator, batch, 4, 6), timestep=sigmas(generator, batch),
                encoder_hidden_states=normal(generator, batch, 5, 12),
                global_hidden_states=normal(generator, batch, 1, 6),
                rotary_embedding=(normal(generator, 7, 4), normal(generator, 7, 4)))


def stable3(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=normal(generator, batch, 4, 6), timestep=sigmas(generator, batch),
                encoder_hidden_states=normal(generator, batch, 5, 12), encoder_attention_mask=mask(batch, 5),
                global_hidden_states=normal(generator, batch, 6), local_add_cond=normal(generator, batch, 5, 6))


def ace(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    time = sigmas(generator, batch)
    return dict(hidden_states=normal(generator, batch, 10, 4), timestep=time, timestep_r=time,
                encoder_hidden_states=normal(generator, batch, 5, 12), context_latents=normal(generator, batch, 10, 8))


def longcat(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=normal(generator, batch, 6, 4), timestep=sigmas(generator, batch),
                encoder_hidden_states=normal(generator, batch, 5, 12), encoder_attention_mask=mask(batch, 5),
                latent_cond=normal(generator, batch, 6, 4), attention_mask=torch.ones(batch, 6, dtype=torch.bool))


def music(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=normal(generator, batch, 4, 6), timestep=sigmas(generator, batch),
                encoder_hidden_states=normal(generator, batch, 6, 12))


AUDIO = {
    "StableAudioDiTModel": Specimen(
        dict(sample_size=6, in_channels=4, num_layers=3, num_key_value_attention_heads=1, out_channels=4,
             cross_attention_dim=8, time_proj_dim=8, global_states_input_dim=6, cross_attention_input_dim=12, **HEADS),
        stable),
    "StableAudio3DiTModel": Specimen(
        dict(io_channels=4, embed_dim=16, depth=3, num_heads=2, cond_token_dim=12, global_cond_dim=6,
             local_add_cond_dim=5, timestep_features_dim=8, num_memory_tokens=2), stable3),
    "AceStepTransformer1DModel": Specimen(
        dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
             head_dim=8, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=2, encoder_hidden_size=12), ace,
        ("layers",), double=False),
    "LongCatAudioDiTTransformer": Specimen(
        dict(dit_dim=16, dit_depth=3, dit_heads=2, dit_text_dim=12, latent_dim=4), longcat, ("blocks",)),
    "MiniMaxMusic3Transformer1DModel": Specimen(
        dict(in_channels=4, condition_dim=12, num_layers=3, ff_inner_dim=32, rotary_dim=4, fourier_embedding_dim=8,
             **HEADS), music),
}
