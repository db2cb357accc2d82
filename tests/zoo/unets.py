"""UNets: of Stable Diffusion 1.5 and XL, and those with other inputs."""

from typing import Any

import torch

from .draws import Specimen, mask, normal, times

UNET = dict(sample_size=8, layers_per_block=2, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12,
            attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def plain(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return dict(sample=normal(generator, batch, model.config.in_channels, 8, 8), timestep=times(generator, batch),
                encoder_hidden_states=normal(generator, batch, 5, 12))


def xl(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """With a pooled text [B, 8] and six sizes, of 4 sines and cosines each."""
    added = dict(text_embeds=normal(generator, batch, 8), time_ids=torch.full((batch, 6), 64.0))
    return {**plain(model, batch, generator), "added_cond_kwargs": added}


def classes(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {**plain(model, batch, generator), "class_labels": torch.randint(0, 10, (batch,), generator=generator)}


def consistency(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {**plain(model, batch, generator), "timestep_cond": normal(generator, batch, 8)}


def masked(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {**plain(model, batch, generator), "encoder_attention_mask": mask(batch, 5).bool()}


def unet(inputs: Any, **changes: Any) -> Specimen:
    return Specimen({**UNET, **changes}, inputs, (), cls="UNet2DConditionModel", slow=inputs not in (plain, xl))


UNETS = {
    "UNetSD15": unet(plain),
    "UNetSDXL": unet(xl, addition_embed_type="text_time", addition_time_embed_dim=4, use_linear_projection=True,
                     projection_class_embeddings_input_dim=32, transformer_layers_per_block=(2, 1)),
    "UNetClasses": unet(classes, num_class_embeds=10),
    "UNetWithoutMid": unet(plain, mid_block_type=None),
    "UNetInpainting": unet(plain, in_channels=9),
    "UNetConsistency": unet(consistency, time_cond_proj_dim=8),
    "UNetMasked": unet(masked, dual_cross_attention=False, only_cross_attention=True),
}
