"""Transformers of video that came to diffusers after 0.36, and variants of older ones."""

from typing import Any

import torch

from .draws import Specimen, mask, normal, times
from .videos import BOTH, COGVIDEO, HEADS, HUNYUAN, WAN, clip, ltx2, masked, plain


def sky_forcing(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """Each frame with its own timestep: [B, F]."""
    steps = times(generator, batch)[:, None] + torch.tensor([[0.0, 1.0]])
    return {**plain(model, batch, generator), "timestep": steps, "enable_diffusion_forcing": True}


def cogvideo15(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {**plain(model, batch, generator), "hidden_states": normal(generator, batch, 2, 4, 4, 4),
            "ofs": torch.full((1,), 2.0), "image_rotary_emb": (normal(generator, 4, 16), normal(generator, 4, 16))}


def ltx23(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    given = ltx2(model, batch, generator)
    return {**given, "sigma": given["timestep"], "encoder_hidden_states": normal(generator, batch, 5, 32),
            "audio_encoder_hidden_states": normal(generator, batch, 5, 16)}


def anyflow(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    steps = times(generator, batch)[:, None].repeat(1, 2)
    return {**plain(model, batch, generator), "hidden_states": normal(generator, batch, 2, 4, 4, 4),
            "timestep": steps, "r_timestep": steps / 2}


def far(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {**anyflow(model, batch, generator), "chunk_partition": (1, 1)}


def kandinsky6_sr(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=normal(generator, batch, 1, 8, 8, 9), timestep=times(generator, batch))


def helios(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """With a short history, whose tokens are modulated at time 0."""
    return {**plain(model, batch, generator), "indices_hidden_states": torch.tensor([[2, 3]]).repeat(batch, 1),
            "latents_history_short": clip(generator, batch), "indices_latents_history_short":
            torch.tensor([[0, 1]]).repeat(batch, 1)}


def kandinsky6(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=normal(generator, batch, 2, 4, 4, 4), timestep=times(generator, batch),
                encoder_hidden_states=normal(generator, batch, 5, 12), pooled_projections=normal(generator, batch, 6),
                audio_hidden_states=normal(generator, batch, 6, 4))


def minimax(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """Text, video and audio in one sequence; two timesteps, of the text and of the rest, that all samples share."""
    return dict(hidden_states=normal(generator, batch, 4, 16), audio_hidden_states=normal(generator, batch, 2, 4),
                encoder_hidden_states=normal(generator, batch, 5, 12), timestep=torch.tensor([0.0, 700.0]),
                timestep_indices=torch.tensor([0] * 5 + [1] * 6), token_tags=torch.tensor([0] * 5 + [1] * 4 + [2] * 2),
                position_ids=torch.arange(11)[:, None].repeat(1, 3), text_indices=torch.arange(5),
                video_indices=torch.arange(5, 9), audio_indices=torch.arange(9, 11))


def sana_wm(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """Each frame with its own timestep: [B, 1, F]."""
    steps = times(generator, batch)[:, None, None].repeat(1, 1, 2)
    return dict(hidden_states=clip(generator, batch), timestep=steps, mask=mask(batch, 5),
                encoder_hidden_states=normal(generator, batch, 1, 5, 12))


def sana_refiner(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=normal(generator, batch, 8, 4), timestep=times(generator, batch),
                encoder_hidden_states=normal(generator, batch, 5, 12), encoder_attention_mask=mask(batch, 5),
                video_rotary_emb=(normal(generator, 1, 8, 32), normal(generator, 1, 8, 32)))


LTX2 = dict(in_channels=4, out_channels=4, cross_attention_dim=32, caption_channels=12, num_layers=3,
            audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
            audio_cross_attention_dim=16, **HEADS)
MORE_VIDEOS = {
    "SkyReelsForcing": Specimen(WAN, sky_forcing, ("blocks",), cls="SkyReelsV2Transformer3DModel", slow=True),
    "CogVideoX15": Specimen(
        {**COGVIDEO, "patch_size_t": 2, "ofs_embed_dim": 8, "use_rotary_positional_embeddings": True,
         "patch_bias": False}, cogvideo15, cls="CogVideoXTransformer3DModel", slow=True),
    "LTX23": Specimen(
        {**LTX2, "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True,
         "use_prompt_embeddings": False, "rope_type": "split"}, ltx23, cls="LTX2VideoTransformer3DModel", slow=True),
    "AnyFlowTransformer3DModel": Specimen(
        {key: value for key, value in WAN.items() if key != "qk_norm"}, anyflow, ("blocks",)),
    "AnyFlowFARTransformer3DModel": Specimen(
        {**{key: value for key, value in WAN.items() if key != "qk_norm"}, "chunk_partition": (1, 1)}, far, ("blocks",),
        backward=False, slow=True),
    "Kandinsky6SRTransformer3DModel": Specimen(
        dict(in_visual_dim=4, out_visual_dim=4, time_dim=8, model_dim=32, ff_dim=32, num_visual_blocks=3,
             axes_dims=(4, 6, 6)), kandinsky6_sr, ("visual_transformer_blocks",), backward=False, slow=True),
    "HeliosTransformer3DModel": Specimen(
        {**{key: value for key, value in WAN.items() if key != "rope_max_seq_len"}, "rope_dim": (4, 6, 6),
         "is_amplify_history": True}, helios, ("blocks",)),
    "MotifVideoTransformer3DModel": Specimen(
        {**{key: value for key, value in HUNYUAN.items() if key not in ("num_refiner_layers", "pooled_projection_dim")},
         "num_decoder_layers": 1, "enable_text_cross_attention_dual": True}, masked, BOTH, double=False, slow=True),
    "Kandinsky6Transformer3DModel": Specimen(
        dict(in_visual_dim=4, out_visual_dim=4, in_text_dim=12, in_text_dim2=6, time_dim=8, model_dim=32, ff_dim=32,
             num_text_blocks=3, num_visual_blocks=3, axes_dims=(4, 6, 6), visual_cond=False, in_audio_dim=4,
             out_audio_dim=4), kandinsky6,
        ("video_text_transformer_blocks", "audio_text_transformer_blocks", "visual_transformer_blocks")),
    "MiniMaxH3Transformer3DModel": Specimen(
        dict(num_attention_heads=2, attention_head_dim=16, hidden_size=32, num_layers=3, num_refiner_layers=1,
             ffn_dim=32, in_channels=4, audio_in_channels=4, text_dim=12, freq_dim=8, time_embed_hidden_dim=16,
             time_embed_dim=8, rope_freq_dim=2), minimax),
    "SanaWMTransformer3DModel": Specimen(
        dict(in_channels=4, num_layers=4, hidden_size=32, num_attention_heads=2, linear_head_dim=16, softmax_every_n=2,
             chunk_plucker_channels=4, caption_channels=12, image_size=32), sana_wm, ("blocks",), slow=True),
    "SanaWMLTX2RefinerTransformer3DModel": Specimen(LTX2, sana_refiner, slow=True),
}
