"""Caches of diffusers beside experts: those that work, and one line about those that do not."""

import dataclasses

import numpy as np
import pytest
import torch
from by_hand import Skip, counting, make_experts
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig
from pipelines import draw, make_pipeline

from alter import InputError
from alter.experts.ladder import Rung

STEPS = 8


def first_block(pipe):
    return FirstBlockCacheConfig(threshold=0.5)


def mag(pipe):
    return MagCacheConfig(threshold=0.5, num_inference_steps=STEPS, mag_ratios=torch.linspace(1, 1.02, STEPS),
                          retention_ratio=0.2)


def broadcast(pipe):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 950),
        spatial_attention_block_identifiers=("blocks",), current_timestep_callback=lambda: pipe._current_timestep)


def faster(pipe):
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 901),
        spatial_attention_block_identifiers=("blocks",), current_timestep_callback=lambda: pipe._current_timestep,
        attention_weight_callback=lambda _: 0.3, is_guidance_distilled=True, tensor_format="BFCHW")


FIRST_BLOCK, OF_ATTENTION = [first_block, mag], [broadcast, faster]


def one_for_all(backbone, skipped):
    """The same layers at all timesteps."""
    experts = make_experts(backbone)
    mask_EL = np.ones_like(experts.mask_EL)
    mask_EL[:, skipped] = False
    return dataclasses.replace(experts, mask_EL=mask_EL)


def with_ends(backbone):
    """Experts that all run the first and the last layer."""
    experts = make_experts(backbone)
    mask_EL = experts.mask_EL.copy()
    mask_EL[:, [0, -1]] = True
    return dataclasses.replace(experts, mask_EL=mask_EL)


@pytest.mark.parametrize("config", [*FIRST_BLOCK, *OF_ATTENTION])
def test_a_cache_keeps_of_a_smaller_model_what_it_keeps_of_one_made_by_hand(config):
    """With a layer left out at all timesteps."""
    pipe, other = make_pipeline("flux"), make_pipeline("flux")
    experts = one_for_all(pipe.transformer, [1])
    for each in (pipe, other):
        each.transformer.enable_cache(config(each))
    layer = other.transformer.transformer_blocks[1]
    layer.forward = Skip(layer).forward  # under the cache's hook, which is on it
    experts.apply(pipe)
    drawn = draw(pipe, num_inference_steps=STEPS)
    assert np.array_equal(drawn, draw(other, num_inference_steps=STEPS))
    pipe.transformer.disable_cache()
    assert np.abs(drawn - draw(pipe, num_inference_steps=STEPS)).max() > 1e-3


@pytest.mark.parametrize("config", [*FIRST_BLOCK, *OF_ATTENTION])
def test_several_experts(config):
    """Layers are skipped, steps or attentions are cached, and both are undone in any order."""
    plain, pipe = make_pipeline("flux"), make_pipeline("flux")
    experts, dense = with_ends(pipe.transformer), draw(plain, num_inference_steps=STEPS)
    with experts.apply(plain), counting(plain.transformer, experts.sites) as uncached:
        expected = draw(plain, num_inference_steps=STEPS)
    pipe.transformer.enable_cache(config(pipe))
    cached = draw(pipe, num_inference_steps=STEPS)
    experts.apply(pipe)
    with counting(pipe.transformer, experts.sites) as counts:
        drawn = draw(pipe, num_inference_steps=STEPS)
    assert counts == uncached and not np.array_equal(drawn, expected) and not np.array_equal(drawn, cached)
    assert np.array_equal(draw(pipe, num_inference_steps=STEPS), drawn)
    experts.remove(pipe)
    assert np.array_equal(draw(pipe, num_inference_steps=STEPS), cached)
    experts.apply(pipe)
    pipe.transformer.disable_cache()
    assert np.array_equal(draw(pipe, num_inference_steps=STEPS), expected)
    experts.remove(pipe)
    assert np.array_equal(draw(pipe, num_inference_steps=STEPS), dense)


def test_enabling_after_apply_is_refused():
    pipe = make_pipeline("flux")
    experts = with_ends(pipe.transformer)
    experts.apply(pipe)
    with pytest.raises(InputError) as caught:
        pipe.transformer.enable_cache(first_block(pipe))
    assert str(caught.value) == ("experts: a cache of diffusers is enabled before experts are applied: remove them, "
                                 "call enable_cache, and apply them again")
    experts.remove(pipe)
    pipe.transformer.enable_cache(first_block(pipe))
    assert pipe.transformer.is_cache_enabled


@pytest.mark.parametrize("config", FIRST_BLOCK)
@pytest.mark.parametrize("skipped, name", [(0, "transformer_blocks.0"), (-1, "single_transformer_blocks.1")])
def test_experts_that_skip_the_first_or_last_layer(config, skipped, name):
    pipe = make_pipeline("flux")
    experts = with_ends(pipe.transformer)
    experts.mask_EL[2, skipped] = False
    pipe.transformer.enable_cache(config(pipe))
    with pytest.raises(InputError, match=f"experts: one skips {name}, which the enabled cache of diffusers") as caught:
        experts.apply(pipe)
    assert "\n" not in str(caught.value) and not hasattr(pipe.transformer, "_alter_applied")
    rung = dataclasses.replace(experts.rung, expert_T=np.where(experts.expert_T == 2, 1, experts.expert_T))
    dataclasses.replace(experts, ladder=(rung,)).apply(pipe)  # it is unused
    draw(pipe, num_inference_steps=STEPS)


def test_faster_cache_needs_what_the_first_step_leaves():
    pipe = make_pipeline("flux")
    experts = make_experts(pipe.transformer)  # the first step's skips the first layer, which others run
    pipe.transformer.enable_cache(faster(pipe))
    with pytest.raises(InputError, match="the one of the first step skips transformer_blocks.0, of which FasterCache"):
        experts.apply(pipe)
    one_for_all(pipe.transformer, [0]).apply(pipe)  # which no expert runs
    draw(pipe, num_inference_steps=STEPS)


def test_a_rung_that_skips_what_a_cache_needs():
    """Of the ladder, when it is applied; of a planner, when it is called."""
    pipe = make_pipeline("flux")
    experts = with_ends(pipe.transformer)
    none_L = np.zeros_like(experts.mask_EL[:1])
    experts = dataclasses.replace(experts, mask_EL=np.concatenate([experts.mask_EL, none_L]))
    low = Rung(0.1, np.full(1000, 4))
    pipe.transformer.enable_cache(first_block(pipe))
    with pytest.raises(InputError, match="experts: one skips transformer_blocks.0, which the enabled cache"):
        dataclasses.replace(experts, ladder=(low, experts.rung)).apply(pipe)
    experts.apply(pipe)
    with experts.at(low), pytest.raises(InputError, match="experts: one skips transformer_blocks.0, which the enabled"):
        draw(pipe, num_inference_steps=STEPS)
    with pytest.raises(InputError, match="experts: one skips transformer_blocks.0, which the enabled cache"):
        experts.apply(pipe, low)
    draw(pipe, num_inference_steps=STEPS)
