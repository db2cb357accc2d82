"""Transformers of video."""

from typing import Any

import torch

from .draws import Specimen, mask, normal, times

HEADS = dict(num_attention_heads=2, attention_head_dim=16)


def clip(generator: torch.Generator, batch: int, channels: int = 4, frames: int = 2, size: int = 4) -> torch.Tensor:
    """Latents [B, C, F, H, W]."""
    return normal(generator, batch, channels, frames, size, size)


def plain(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=clip(generator, batch, model.config.in_channels), timestep=times(generator, batch),
                encoder_hidden_states=normal(generator, batch, 5, 12))


def masked(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {**plain(model, batch, generator), "encoder_attention_mask": mask(batch, 5)}


def wan_image(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {**plain(model, batch, generator), "encoder_hidden_states_image": normal(generator, batch, 4, 10)}


def wan_tokens(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """As Wan 2.2 TI2V: a timestep for each token, 0 for those of a first frame that is given."""
    steps = times(generator, batch)[:, None].repeat(1, 8)
    steps[:, :4] = 0
    return {**plain(model, batch, generator), "timestep": steps}


def vace(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {**plain(model, batch, generator), "control_hidden_states": clip(generator, batch, 6)}


def animate(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {**wan_image(model, batch, generator), "hidden_states": clip(generator, batch, 12, frames=3),
            "pose_hidden_states": clip(generator, batch, frames=2),
            "face_pixel_values": normal(generator, batch, 3, 5, 16, 16)}


def packed(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=normal(generator, batch, 8, 4), timestep=times(generator, batch),
                encoder_hidden_states=normal(generator, batch, 5, 12), encoder_attention_mask=mask(batch, 5),
                num_frames=2, height=2, width=2)


def ltx2(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(**packed(model, batch, generator), audio_hidden_states=normal(generator, batch, 6, 4),
                audio_encoder_hidden_states=normal(generator, batch, 5, 12), audio_num_frames=6,
                audio_encoder_attention_mask=mask(batch, 5))


def hunyuan(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    given = {**masked(model, batch, generator), "pooled_projections": normal(generator, batch, 6)}
    return {**given, "guidance": torch.full((batch,), 6000.0)} if model.config.guidance_embeds else given


def hunyuan15(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {**masked(model, batch, generator), "encoder_hidden_states_2": normal(generator, batch, 4, 10),
            "encoder_attention_mask_2": mask(batch, 4), "image_embeds": normal(generator, batch, 5, 8)}


def framepack(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    def frames(first: int, count: int) -> torch.Tensor:
        return torch.arange(first, first + count)

    return {**hunyuan(model, batch, generator), "image_embeds": normal(generator, batch, 4, 10),
            "indices_latents": frames(8, 2), "latents_clean": clip(generator, batch, frames=2),
            "indices_latents_clean": frames(0, 2), "latents_history_2x": clip(generator, batch, frames=2),
            "indices_latents_history_2x": frames(2, 2), "latents_history_4x": clip(generator, batch, frames=4),
            "indices_latents_history_4x": frames(4, 4)}


def mochi(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=clip(generator, batch), timestep=times(generator, batch),
                encoder_hidden_states=normal(generator, batch, 5, 16), encoder_attention_mask=mask(batch, 5).bool())


def cogvideo(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    rotary = (normal(generator, 8, 16), normal(generator, 8, 16))
    return {**plain(model, batch, generator), "hidden_states": normal(generator, batch, 2, 4, 4, 4),
            "image_rotary_emb": rotary if model.config.use_rotary_positional_embeddings else None}


def allegro(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    angles, places = normal(generator, 2, 6), torch.cartesian_prod(*[torch.arange(2)] * 3)
    return {**masked(model, batch, generator), "attention_mask": torch.ones(batch, 2, 4, 4),
            "image_rotary_emb": (((angles.cos(), angles.sin()),) * 3, tuple(places.T[:, None].unbind()))}


def cosmos(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {**plain(model, batch, generator), "fps": 24, "padding_mask": torch.zeros(1, 1, 4, 4)}


def kandinsky5(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=normal(generator, batch, 2, 4, 4, 4), timestep=times(generator, batch),
                encoder_hidden_states=normal(generator, batch, 5, 12), pooled_projections=normal(generator, batch, 6),
                visual_rope_pos=(torch.arange(2), torch.arange(2), torch.arange(2)), text_rope_pos=torch.arange(5))


BOTH = ("transformer_blocks", "single_transformer_blocks")
WAN = dict(in_channels=4, out_channels=4, text_dim=12, freq_dim=16, ffn_dim=32, num_layers=3, rope_max_seq_len=16,
           **HEADS)
IMAGE = dict(image_dim=10, added_kv_proj_dim=32)
HUNYUAN = dict(in_channels=4, out_channels=4, num_layers=3, num_single_layers=3, num_refiner_layers=1,
               text_embed_dim=12, pooled_projection_dim=6, rope_axes_dim=(4, 6, 6), **HEADS)
COGVIDEO = dict(in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12, num_layers=3, sample_width=4,
                sample_height=4, sample_frames=5, max_text_seq_length=5, **HEADS)
COSMOS = dict(in_channels=4, out_channels=4, num_layers=3, text_embed_dim=12, adaln_lora_dim=4, max_size=(4, 4, 4),
              **HEADS)

VIDEOS = {
    "WanTransformer3DModel": Specimen(WAN, plain, ("blocks",)),
    "Wan21Image": Specimen({**WAN, **IMAGE}, wan_image, ("blocks",), cls="WanTransformer3DModel", slow=True),
    "Wan22Tokens": Specimen(WAN, wan_tokens, ("blocks",), cls="WanTransformer3DModel"),
    "WanVACETransformer3DModel": Specimen({**WAN, "vace_layers": [0, 2], "vace_in_channels": 6}, vace, ("blocks",)),
    "WanAnimateTransformer3DModel": Specimen(
        {**WAN, **IMAGE, "in_channels": 12, "latent_channels": 4, "motion_encoder_size": 16, "motion_style_dim": 8,
         "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
         "inject_face_latents_blocks": 1, "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}},
        animate, ("blocks",), slow=True),
    "SkyReelsV2Transformer3DModel": Specimen(WAN, plain, ("blocks",)),
    "ChronoEditTransformer3DModel": Specimen({**WAN, **IMAGE}, wan_image, ("blocks",)),
    "LTXVideoTransformer3DModel": Specimen(
        dict(in_channels=4, out_channels=4, cross_attention_dim=32, caption_channels=12, num_layers=3,
             **HEADS), packed),
    "LTX2VideoTransformer3DModel": Specimen(
        dict(in_channels=4, out_channels=4, cross_attention_dim=32, caption_channels=12, num_layers=3,
             audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
             audio_cross_attention_dim=16, **HEADS), ltx2),
    "HunyuanVideoTransformer3DModel": Specimen(HUNYUAN, hunyuan, BOTH),
    "HunyuanVideoTokenReplace": Specimen(
        {**HUNYUAN, "guidance_embeds": False, "image_condition_type": "token_replace"}, hunyuan, BOTH,
        cls="HunyuanVideoTransformer3DModel", slow=True),
    "HunyuanVideoFramepackTransformer3DModel": Specimen(
        {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 10, "has_clean_x_embedder": True}, framepack, BOTH,
        slow=True),
    "HunyuanVideo15Transformer3DModel": Specimen(
        dict(in_channels=4, out_channels=4, num_layers=3, num_refiner_layers=1, text_embed_dim=12, text_embed_2_dim=10,
             image_embed_dim=8, rope_axes_dim=(4, 6, 6), target_size=4, **HEADS), hunyuan15, slow=True),
    "CogVideoXTransformer3DModel": Specimen(COGVIDEO, cogvideo),
    "ConsisIDTransformer3DModel": Specimen({**COGVIDEO, "use_rotary_positional_embeddings": True}, cogvideo),
    "MochiTransformer3DModel": Specimen(
        dict(in_channels=4, num_layers=3, pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=16,
             max_sequence_length=5, **HEADS), mochi),
    "LatteTransformer3DModel": Specimen(
        dict(in_channels=4, out_channels=4, num_layers=3, cross_attention_dim=32, caption_channels=12, sample_size=4,
             patch_size=2, attention_bias=True, activation_fn="gelu-approximate", norm_type="ada_norm_single",
             num_embeds_ada_norm=1000, norm_elementwise_affine=False, norm_eps=1e-6, video_length=2, **HEADS), plain,
        ("transformer_blocks", "temporal_transformer_blocks")),
    "AllegroTransformer3DModel": Specimen(
        dict(num_layers=3, cross_attention_dim=36, caption_channels=12, sample_height=4, sample_width=4,
             sample_frames=2, num_attention_heads=2, attention_head_dim=18), allegro),
    "CosmosTransformer3DModel": Specimen(COSMOS, cosmos, double=False),
    "Cosmos2": Specimen({**COSMOS, "extra_pos_embed_type": None}, cosmos, cls="CosmosTransformer3DModel", slow=True),
    "EasyAnimateTransformer3DModel": Specimen(
        dict(in_channels=4, out_channels=4, patch_size=2, sample_width=4, sample_height=4, num_layers=3, mmdit_layers=2,
             time_embed_dim=8, text_embed_dim=12, num_attention_heads=2, attention_head_dim=16), plain),
    "SanaVideoTransformer3DModel": Specimen(
        dict(in_channels=4, out_channels=4, num_layers=3, num_cross_attention_heads=2, cross_attention_head_dim=16,
             cross_attention_dim=32, caption_channels=12, sample_size=4, rope_max_seq_len=16, **HEADS), masked),
    "Kandinsky5Transformer3DModel": Specimen(
        dict(in_text_dim=12, in_text_dim2=6, time_dim=8, model_dim=32, ff_dim=32, num_text_blocks=3,
             num_visual_blocks=3, axes_dims=(4, 6, 6)), kandinsky5,
        ("text_transformer_blocks", "visual_transformer_blocks"), double=False),
}
