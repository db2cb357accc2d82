"""Transformers of images."""

from typing import Any

import torch

from .draws import Specimen, ids, mask, normal, sigmas, times

HEADS = dict(num_attention_heads=2, attention_head_dim=8)


def latents(generator: torch.Generator, batch: int, channels: int = 4, size: int = 4) -> torch.Tensor:
    return normal(generator, batch, channels, size, size)


def flux(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """Packed tokens with ids; FLUX's cousins take some of these."""
    config = model.config
    columns = len(config.axes_dims_rope)
    given = dict(hidden_states=normal(generator, batch, 6, config.in_channels),
                 encoder_hidden_states=normal(generator, batch, 5, config.joint_attention_dim),
                 timestep=sigmas(generator, batch), img_ids=ids(2, 4 - 1, columns), txt_ids=torch.zeros(5, columns))
    if config.get("pooled_projection_dim") and "LongCat" not in type(model).__name__:
        given["pooled_projections"] = normal(generator, batch, config.pooled_projection_dim)
    if config.get("guidance_embeds"):
        given["guidance"] = torch.full((batch,), 3.5)
    return given


def two_lists(**more: Any) -> dict[str, Any]:
    return dict(in_channels=4, num_layers=3, num_single_layers=3, joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
                **HEADS, **more)


def bria(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {**flux(model, batch, generator), "timestep": times(generator, batch)}


def bria_fibo(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    layers = tuple(normal(generator, batch, 5, 6) for _ in range(6))
    return {**flux(model, batch, generator), "text_encoder_layers": layers}


def chroma(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    tokens = torch.cat([mask(batch, 5), torch.ones(batch, 6)], 1)
    return {**flux(model, batch, generator), "attention_mask": tokens.bool()}


def qwen(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=normal(generator, batch, 6, 4), encoder_hidden_states=normal(generator, batch, 5, 12),
                encoder_hidden_states_mask=mask(batch, 5).bool(), timestep=sigmas(generator, batch),
                img_shapes=[[(1, 2, 3)]] * batch)


def z_image(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(x=[normal(generator, 4, 1, 4, 4) for _ in range(batch)], t=sigmas(generator, batch),
                cap_feats=[normal(generator, 5 + index, 12) for index in range(batch)])


def sd3(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=latents(generator, batch), encoder_hidden_states=normal(generator, batch, 5, 12),
                pooled_projections=normal(generator, batch, 6), timestep=times(generator, batch))


def aura(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=latents(generator, batch), encoder_hidden_states=normal(generator, batch, 5, 12),
                timestep=sigmas(generator, batch))


def dit(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=latents(generator, batch), timestep=times(generator, batch).long(),
                class_labels=torch.randint(0, 10, (batch,), generator=generator))


def pixart(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    sizes = dict(resolution=None, aspect_ratio=None)
    if model.use_additional_conditions:
        sizes = dict(resolution=torch.full((batch, 2), 32.0), aspect_ratio=torch.ones(batch, 1))
    return dict(hidden_states=latents(generator, batch), encoder_hidden_states=normal(generator, batch, 5, 12),
                encoder_attention_mask=mask(batch, 5), timestep=times(generator, batch), added_cond_kwargs=sizes)


def sana(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    given = dict(hidden_states=latents(generator, batch), encoder_hidden_states=normal(generator, batch, 5, 12),
                 encoder_attention_mask=mask(batch, 5), timestep=times(generator, batch))
    return {**given, "guidance": torch.full((batch,), 4.5)} if model.config.guidance_embeds else given


def lumina2(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=latents(generator, batch), timestep=sigmas(generator, batch),
                encoder_hidden_states=normal(generator, batch, 5, 12), encoder_attention_mask=mask(batch, 5).bool())


def lumina(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    rotary = torch.polar(torch.ones(8, 8, 4), normal(generator, 8, 8, 4))
    return dict(hidden_states=latents(generator, batch), timestep=sigmas(generator, batch), image_rotary_emb=rotary,
                encoder_hidden_states=normal(generator, batch, 5, 12), encoder_mask=mask(batch, 5),
                cross_attention_kwargs={})


def cogview(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    sizes = torch.tensor([[32.0, 32.0]]).repeat(batch, 1)
    return dict(hidden_states=latents(generator, batch), encoder_hidden_states=normal(generator, batch, 5, 12),
                timestep=times(generator, batch), original_size=sizes, target_size=sizes, crop_coords=0 * sizes)


def hidream(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=latents(generator, batch), timesteps=times(generator, batch),
                encoder_hidden_states_t5=normal(generator, batch, 5, 12), pooled_embeds=normal(generator, batch, 6),
                encoder_hidden_states_llama3=tuple(normal(generator, batch, 5, 10) for _ in range(6)))


def hunyuan_dit(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=latents(generator, batch), timestep=times(generator, batch),
                encoder_hidden_states=normal(generator, batch, 5, 12), text_embedding_mask=mask(batch, 5),
                encoder_hidden_states_t5=normal(generator, batch, 7, 16), text_embedding_mask_t5=mask(batch, 7),
                image_meta_size=torch.full((batch, 6), 32.0), style=torch.zeros(batch, dtype=torch.long),
                image_rotary_emb=(normal(generator, 4, 8), normal(generator, 4, 8)))


def hunyuan_image(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=latents(generator, batch), timestep=times(generator, batch),
                encoder_hidden_states=normal(generator, batch, 5, 12), encoder_attention_mask=mask(batch, 5))


BOTH = ("transformer_blocks", "single_transformer_blocks")
TEXT = dict(in_channels=4, num_layers=3, patch_size=2)

IMAGES = {
    "FluxTransformer2DModel": Specimen(two_lists(pooled_projection_dim=6, guidance_embeds=True), flux, BOTH),
    "Flux2Transformer2DModel": Specimen(
        {**two_lists(timestep_guidance_channels=8), "axes_dims_rope": (2, 2, 2, 2)}, flux, BOTH),
    "ChromaTransformer2DModel": Specimen(
        two_lists(approximator_num_channels=16, approximator_hidden_dim=8, approximator_layers=1), chroma, BOTH),
    "BriaTransformer2DModel": Specimen(two_lists(), bria, BOTH),
    "BriaFiboTransformer2DModel": Specimen(two_lists(text_encoder_dim=6), bria_fibo, BOTH),
    "LongCatImageTransformer2DModel": Specimen(two_lists(pooled_projection_dim=6), flux, BOTH),
    "OvisImageTransformer2DModel": Specimen(two_lists(out_channels=4), flux, BOTH),
    "QwenImageTransformer2DModel": Specimen(
        dict(in_channels=4, out_channels=1, num_layers=3, joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
             **HEADS), qwen),
    "ZImageTransformer2DModel": Specimen(
        dict(in_channels=4, dim=16, n_layers=3, n_refiner_layers=3, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
             axes_dims=[4, 2, 2], axes_lens=[64, 16, 16]),
        z_image, ("noise_refiner", "context_refiner", "layers")),
    "SD3Transformer2DModel": Specimen(
        dict(**TEXT, sample_size=4, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6,
             out_channels=4, pos_embed_max_size=4, **HEADS), sd3),
    "SD35": Specimen(
        dict(**TEXT, sample_size=4, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6,
             out_channels=4, pos_embed_max_size=4, dual_attention_layers=(0, 1), qk_norm="rms_norm", **HEADS), sd3,
        cls="SD3Transformer2DModel"),
    "AuraFlowTransformer2DModel": Specimen(
        dict(sample_size=4, patch_size=2, num_mmdit_layers=3, num_single_dit_layers=3, joint_attention_dim=12,
             caption_projection_dim=16, pos_embed_max_size=16, **HEADS), aura,
        ("joint_transformer_blocks", "single_transformer_blocks")),
    "DiTTransformer2DModel": Specimen(
        dict(**TEXT, sample_size=4, num_embeds_ada_norm=10, norm_num_groups=2, **HEADS), dit),
    "PixArtTransformer2DModel": Specimen(
        dict(**TEXT, sample_size=4, cross_attention_dim=16, caption_channels=12, **HEADS), pixart),
    "PixArtAlpha1024": Specimen(
        dict(**TEXT, sample_size=4, cross_attention_dim=24, caption_channels=12, use_additional_conditions=True,
             num_attention_heads=3, attention_head_dim=8), pixart, cls="PixArtTransformer2DModel", slow=True),
    "SanaTransformer2DModel": Specimen(
        dict(in_channels=4, out_channels=4, num_layers=3, num_cross_attention_heads=2, cross_attention_head_dim=8,
             cross_attention_dim=16, caption_channels=12, sample_size=4, guidance_embeds=True,
             qk_norm="rms_norm_across_heads", **HEADS), sana),
    "Lumina2Transformer2DModel": Specimen(
        dict(in_channels=4, sample_size=4, hidden_size=16, num_layers=3, num_refiner_layers=3, num_attention_heads=2,
             num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(16, 8, 8), cap_feat_dim=12),
        lumina2, ("noise_refiner", "context_refiner", "layers")),
    "LuminaNextDiT2DModel": Specimen(
        dict(sample_size=4, hidden_size=16, num_layers=3, num_attention_heads=2, num_kv_heads=1, multiple_of=8,
             cross_attention_dim=12), lumina, ("layers",)),
    "CogView3PlusTransformer2DModel": Specimen(
        dict(**TEXT, out_channels=4, text_embed_dim=12, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8,
             sample_size=4, **HEADS), cogview),
    "CogView4Transformer2DModel": Specimen(
        dict(**TEXT, out_channels=4, text_embed_dim=12, time_embed_dim=8, condition_dim=2, sample_size=4,
             rope_axes_dim=(8, 8), **HEADS), cogview),
    "HiDreamImageTransformer2DModel": Specimen(
        dict(in_channels=4, patch_size=2, num_layers=3, num_single_layers=3, caption_channels=[12, 10], text_emb_dim=6,
             axes_dims_rope=(4, 2, 2), max_resolution=(4, 4), llama_layers=list(range(6)), **HEADS), hidream,
        ("double_stream_blocks", "single_stream_blocks")),
    "HunyuanDiT2DModel": Specimen(
        dict(in_channels=4, patch_size=2, sample_size=4, hidden_size=16, num_layers=6, cross_attention_dim=12,
             cross_attention_dim_t5=16, pooled_projection_dim=6, text_len=5, text_len_t5=7, **HEADS), hunyuan_dit,
        ("blocks",)),
    "HunyuanImageTransformer2DModel": Specimen(
        dict(in_channels=4, out_channels=4, num_layers=3, num_single_layers=3, num_refiner_layers=2, text_embed_dim=12,
             rope_axes_dim=(4, 4), **HEADS), hunyuan_image, BOTH),
}
