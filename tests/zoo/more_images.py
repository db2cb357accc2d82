"""Transformers of images that came to diffusers after 0.36, and variants of older ones."""

from typing import Any

import torch

from .draws import Specimen, ids, mask, normal, sigmas, times
from .images import BOTH, HEADS, TEXT, flux, latents, qwen, two_lists


def qwen_edit(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """With a second image, whose tokens are modulated at time 0: the blocks get 2 B rows of the time's embedding."""
    return {**qwen(model, batch, generator), "hidden_states": normal(generator, batch, 10, 4),
            "img_shapes": [[(1, 2, 3), (1, 2, 2)]] * batch}


def qwen21(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    slots = torch.tensor([[False] * 5 + [True] * 2]).repeat(batch, 1)
    return dict(hidden_states=normal(generator, batch, 8, 4), encoder_hidden_states=normal(generator, batch, 5, 12),
                timestep=sigmas(generator, batch), img_shapes=[[(1, 4, 2)]] * batch, img_mask=slots,
                encoder_hidden_states_mask=mask(batch, 5))


def krea(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=normal(generator, batch, 6, 4), encoder_hidden_states=normal(generator, batch, 5, 2, 12),
                timestep=sigmas(generator, batch), position_ids=torch.cat([torch.zeros(5, 3), ids(2, 4 - 1)]),
                encoder_attention_mask=mask(batch, 5).bool())


def prx(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=latents(generator, batch), encoder_hidden_states=normal(generator, batch, 5, 12),
                timestep=sigmas(generator, batch), attention_mask=mask(batch, 5).bool())


def ernie(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=latents(generator, batch), timestep=times(generator, batch),
                text_bth=normal(generator, batch, 5, 12), text_lens=mask(batch, 5).sum(1))


def glm(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    sizes = torch.tensor([[32.0, 32.0]]).repeat(batch, 1)
    return dict(hidden_states=latents(generator, batch), encoder_hidden_states=normal(generator, batch, 5, 12),
                prior_token_id=torch.randint(0, 20, (batch, 4), generator=generator),
                prior_token_drop=torch.zeros(batch, 4, dtype=torch.bool), timestep=times(generator, batch),
                target_size=sizes, crop_coords=0 * sizes)


def fibo2(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=latents(generator, batch), timestep=sigmas(generator, batch),
                encoder_hidden_states=normal(generator, batch, 3, 5, 12), encoder_attention_mask=mask(batch, 5).bool())


def ideogram(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """Text and image in one sequence; 3 marks a token of text, 2 one of the image."""
    marks = torch.tensor([3] * 5 + [2] * 6).repeat(batch, 1)
    return dict(hidden_states=normal(generator, batch, 11, 4), timestep=sigmas(generator, batch),
                encoder_hidden_states=normal(generator, batch, 11, 12), indicator=marks,
                segment_ids=torch.ones(batch, 11, dtype=torch.long),
                position_ids=torch.arange(11)[None, :, None].repeat(batch, 1, 3))


def joy(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=normal(generator, batch, 4, 2, 4, 4), timestep=times(generator, batch),
                encoder_hidden_states=normal(generator, batch, 5, 12))


def joy_plus(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=normal(generator, batch, 6, 4, 1, 2, 2), timestep=times(generator, batch),
                encoder_hidden_states=normal(generator, batch, 5, 12), encoder_hidden_states_mask=mask(batch, 5),
                shape_list=[[(1, 2, 2), (1, 1, 2)], [(1, 2, 2)], [(1, 1, 2)]][:batch])


def omnigen(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=latents(generator, batch), timestep=sigmas(generator, batch),
                input_ids=torch.randint(1, 20, (batch, 5), generator=generator), input_img_latents=(),
                input_image_sizes={}, attention_mask=torch.ones(batch, 10, 10),
                position_ids=torch.arange(10).repeat(batch, 1))


def prior(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(hidden_states=normal(generator, batch, 8), timestep=times(generator, batch),
                proj_embedding=normal(generator, batch, 8), encoder_hidden_states=normal(generator, batch, 5, 8))


QWEN = dict(in_channels=4, out_channels=1, num_layers=3, joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
            **HEADS)
JOY = dict(in_channels=4, hidden_size=16, num_attention_heads=2, text_dim=12, num_layers=3, rope_dim_list=[4, 2, 2])

MORE_IMAGES = {
    "FluxSchnell": Specimen(two_lists(pooled_projection_dim=6), flux, BOTH, cls="FluxTransformer2DModel", slow=True),
    "Flux2Klein": Specimen(
        {**two_lists(timestep_guidance_channels=8, guidance_embeds=False), "axes_dims_rope": (2, 2, 2, 2)}, flux, BOTH,
        cls="Flux2Transformer2DModel", slow=True),
    "Flux3Transformer2DModel": Specimen(
        {**two_lists(cond_in_channels=4, timestep_channels=8), "axes_dims_rope": (2, 2, 2, 2)}, flux,
        ("txt_mode_blocks", "single_transformer_blocks")),
    "QwenImageEdit2511": Specimen({**QWEN, "zero_cond_t": True}, qwen_edit, cls="QwenImageTransformer2DModel"),
    "QwenImage21Transformer2DModel": Specimen(
        dict(in_channels=4, out_channels=4, num_layers=3, context_in_dim=12, axes_dims_rope=(2, 2, 4), **HEADS),
        qwen21),
    "Krea2Transformer2DModel": Specimen(
        dict(in_channels=4, num_layers=3, num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=8,
             text_hidden_dim=12, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
             text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
             axes_dims_rope=(4, 2, 2), **HEADS), krea),
    "PRXTransformer2DModel": Specimen(
        dict(in_channels=4, context_in_dim=12, hidden_size=16, num_heads=2, depth=3, axes_dim=[4, 4]), prx,
        ("blocks",)),
    "ErnieImageTransformer2DModel": Specimen(
        dict(hidden_size=16, num_attention_heads=2, num_layers=3, ffn_hidden_size=32, in_channels=4, out_channels=4,
             patch_size=2, text_in_dim=12, rope_axes_dim=(4, 2, 2)), ernie, ("layers",)),
    "GlmImageTransformer2DModel": Specimen(
        dict(**TEXT, out_channels=4, text_embed_dim=12, time_embed_dim=8, condition_dim=2,
             prior_vq_quantizer_codebook_size=20, **HEADS), glm),
    "NucleusMoEImageTransformer2DModel": Specimen(
        {**QWEN, "num_layers": 5, "num_experts": 4, "moe_intermediate_dim": 8, "capacity_factors": 2.0}, qwen),
    "BriaFibo2Transformer2DModel": Specimen(
        dict(in_channels=4, dim=16, n_layers=3, n_refiner_layers=3, n_heads=2, cap_feat_dim=12,
             injection_layer_ids=(0, 2), perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=4,
             gist_step=1, gist_min_text_len=1, gist_max_text_len=6, axes_dims=(4, 2, 2), axes_lens=(16, 8, 8)),
        fibo2, ("noise_refiner", "layers")),
    "Ideogram4Transformer2DModel": Specimen(
        dict(in_channels=4, num_layers=3, num_attention_heads=2, attention_head_dim=16, intermediate_size=32,
             adaln_dim=8, llm_features_dim=12, mrope_section=(4, 2, 2)), ideogram, ("layers",)),
    "JoyImageEditTransformer3DModel": Specimen(JOY, joy, ("double_blocks",)),
    "JoyImageEditPlusTransformer3DModel": Specimen(JOY, joy_plus, ("double_blocks",), slow=True),
    "OmniGenTransformer2DModel": Specimen(
        dict(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32, num_layers=3,
             pad_token_id=0, vocab_size=20, pos_embed_max_size=8, time_step_dim=8, max_position_embeddings=32,
             original_max_position_embeddings=16,
             rope_scaling={"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}), omnigen, ("layers",)),
    "PriorTransformer": Specimen(
        dict(num_layers=3, embedding_dim=8, num_embeddings=5, **HEADS), prior, slow=True),
}
