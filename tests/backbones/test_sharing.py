"""A DiT's blocks embed timestep and label once a forward, wherever that changes nothing."""

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import make_dit, make_inputs, make_unet
from torch import nn

from alter import TemporalExperts
from alter.backbones.cost import count_cost
from alter.backbones.sharing import SharedEmbedding
from alter.backbones.sites import embedders


@pytest.fixture
def model():
    model = make_dit().eval()
    for embedder in embedders(model):  # equal copies, as in DiT
        embedder.load_state_dict(embedders(model)[0].state_dict())
    return model


def run(model, seed=1):
    (latents, timesteps), conditioning = make_inputs("dit", batch=3, seed=seed)
    with torch.no_grad():
        return model(latents, timestep=timesteps, **conditioning).sample


def count_embeddings(model, function):
    calls = []
    hooks = [embedder.timestep_embedder.register_forward_hook(lambda *_: calls.append(1))
             for embedder in embedders(model)]
    function()
    for hook in hooks:
        hook.remove()
    return len(calls)


def forward(shared, model, seed=1):
    shared.begin()
    return run(model, seed)


def test_one_embedding_a_forward_and_the_same_bits(model):
    expected = [run(model, seed) for seed in (1, 2)]
    dense = count_embeddings(model, lambda: run(model))
    shared = SharedEmbedding(model)
    for seed, output in zip((1, 2), expected, strict=True):
        assert torch.equal(forward(shared, model, seed), output)
    assert dense == 5 and count_embeddings(model, lambda: forward(shared, model)) == 1
    shared.remove()
    assert count_embeddings(model, lambda: run(model)) == dense


def test_inputs_changed_in_place_between_steps(model):
    (latents, timesteps), conditioning = make_inputs("dit", batch=3)
    shared, outputs = SharedEmbedding(model), []
    for _ in range(2):
        shared.begin()
        with torch.no_grad():
            outputs.append(model(latents, timestep=timesteps, **conditioning).sample)
        timesteps += 100
    assert not torch.equal(*outputs)


def change_a_weight(embedder):
    with torch.no_grad():
        embedder.timestep_embedder.linear_2.weight += 1


def replace_a_weight(embedder):
    embedder.timestep_embedder.linear_2.weight = nn.Parameter(2 * embedder.timestep_embedder.linear_2.weight)


def replace_a_layer(embedder):
    embedder.timestep_embedder.linear_1 = nn.Sequential(copy.deepcopy(embedder.timestep_embedder.linear_1), nn.Tanh())


def add_adapters(embedder):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["linear_1"], init_lora_weights=False), embedder)


@pytest.mark.parametrize("change", [change_a_weight, replace_a_weight, replace_a_layer, add_adapters])
@pytest.mark.parametrize("when", ["before", "after"])
def test_copies_that_differ_embed_for_themselves(model, change, when):
    if when == "after":
        shared = SharedEmbedding(model)
        forward(shared, model)
    torch.manual_seed(0)
    change(embedders(model)[2])
    if when == "before":
        shared = SharedEmbedding(model)
    output = forward(shared, model)
    shared.remove()
    assert torch.equal(output, run(model))


@pytest.mark.parametrize(("changed", "skipping", "running"), [(2, 1, 5), (0, 4, 5)])
def test_a_copy_may_differ_while_its_block_is_skipped(model, changed, skipping, running):
    """Unless it is the first block's, which the output layer uses too."""
    mask_EL = np.ones((2, 4), dtype=bool)
    mask_EL[0, changed] = False
    (latents, _), conditioning = make_inputs("dit", batch=3)
    with TemporalExperts.build(mask_EL, np.arange(1000) // 500, count_cost(model, 8), 0.9, "total").apply(model):
        change_a_weight(embedders(model)[changed])
        for timestep, expected in ((100, skipping), (900, running)):
            inputs = {"hidden_states": latents, "timestep": torch.full((3,), timestep), **conditioning}
            with torch.no_grad():
                assert count_embeddings(model, lambda inputs=inputs: model(**inputs)) == expected


def test_gradients_and_training_mode_reach_every_copy(model):
    shared = SharedEmbedding(model)
    shared.begin()
    (latents, timesteps), conditioning = make_inputs("dit", batch=3)
    model(latents, timestep=timesteps, **conditioning).sample.sum().backward()
    assert all(embedder.timestep_embedder.linear_2.weight.grad is not None for embedder in embedders(model))
    model.train()
    assert count_embeddings(model, lambda: forward(shared, model)) == 5


def test_weights_elsewhere_or_without_versions_are_not_shared(model):
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert SharedEmbedding(model).embedders == []
    with torch.inference_mode():
        fresh = make_dit().eval()
        for embedder in embedders(fresh):
            embedder.load_state_dict(embedders(fresh)[0].state_dict())
    shared = SharedEmbedding(fresh)
    assert shared.embedders == []
    forward(shared, fresh)


def test_a_unet_is_left_alone():
    model = make_unet()
    before = {name: type(module) for name, module in model.named_modules()}
    SharedEmbedding(model).begin()
    assert {name: type(module) for name, module in model.named_modules()} == before
