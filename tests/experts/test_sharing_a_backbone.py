"""Experts on a backbone that others use too: threads, direct calls, other libraries' patches, copies."""

import io
import pickle
import threading

import numpy as np
import pytest
import torch
from conftest import make_dit, make_inputs, make_unet
from diffusers.models.attention import BasicTransformerBlock
from helpers import experts_for

from alter import InputError


def call(model, kind, timestep, **changes):
    (sample, _), conditioning = make_inputs(kind, 1)
    with torch.no_grad():
        return model(sample, timestep=torch.full((1,), timestep), **{**conditioning, **changes}).sample


def make(kind):
    return (make_dit(layers=6) if kind == "dit" else make_unet()).eval()


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_threads_that_share_a_backbone_get_what_they_would_get_alone(kind):
    model = make(kind)
    experts = experts_for(model, 8 if kind == "dit" else 16)
    experts.apply(model)
    timesteps = [int(np.flatnonzero(experts.expert_T == e)[0]) for e in experts.used]
    alone = [call(model, kind, t) for t in timesteps]
    assert not torch.equal(alone[0], alone[1])
    wrong = []

    def storm(first):
        for k in range(30):
            which = (first + k) % len(timesteps)
            if not torch.equal(call(model, kind, timesteps[which]), alone[which]):
                wrong.append(which)

    threads = [threading.Thread(target=storm, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_exception_in_a_forward_does_not_block_the_next_thread():
    model = make("unet")
    experts_for(model, 16).apply(model)
    with pytest.raises(RuntimeError):
        call(model, "unet", 10, encoder_hidden_states=torch.zeros(1, 7, 5))
    done = []
    thread = threading.Thread(target=lambda: done.append(call(model, "unet", 10)))
    thread.start()
    thread.join(60)
    assert len(done) == 1


def test_a_forward_around_the_hooks_is_refused():
    model = make("unet")
    experts = experts_for(model, 16)
    experts.apply(model)
    call(model, "unet", 10)
    (sample, _), conditioning = make_inputs("unet", 1)
    with pytest.raises(InputError, match="call the backbone itself"):
        model.forward(sample, 900, **conditioning)
    experts.remove(model)
    model.forward(sample, 900, **conditioning)


def test_timesteps_in_other_units_are_refused():
    model = make("dit")
    experts_for(model, 8).apply(model)
    for timestep in (1.6, 0.0, -0.5, 999.9):
        call(model, "dit", timestep)
    for timestep in (-1.6, 1000.5, float("nan"), float("inf")):
        with pytest.raises(InputError, match="counts noise in other units"):
            call(model, "dit", timestep)


def test_other_libraries_patches_stay():
    model = make("unet")
    blocks = [module for module in model.modules() if isinstance(module, BasicTransformerBlock)]
    experts = experts_for(model, 16)
    dense = call(model, "unet", 500)
    experts.apply(model)
    with_experts = call(model, "unet", 500)
    patches = []
    for block in blocks:
        block.__class__ = type("Patched", (type(block),), {"_parent": type(block)})
        patches.append(type(block))
    assert torch.equal(call(model, "unet", 500), with_experts)
    experts.remove(model)
    assert [type(block) for block in blocks] == patches and torch.equal(call(model, "unet", 500), dense)
    experts.apply(model)
    assert torch.equal(call(model, "unet", 500), with_experts)
    experts.remove(model)
    for block in blocks:
        block.__class__ = block._parent
    assert torch.equal(call(model, "unet", 500), dense)


def test_only_these_experts_are_removed_and_applying_twice_does_nothing():
    model = make("unet")
    mine, others = experts_for(model, 16), experts_for(model, 16, seed=5)
    mine.apply(model)
    mine.apply(model)
    for wrong in (others.apply, others.remove):
        with pytest.raises(InputError, match="others are applied"):
            wrong(model)
    mine.remove(model)
    with pytest.raises(InputError, match="none are applied"):
        mine.remove(model)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_a_backbone_with_experts_is_pickled_with_them(kind):
    model = make(kind)
    experts = experts_for(model, 8 if kind == "dit" else 16)
    experts.apply(model)
    expected = [call(model, kind, t) for t in (10, 900)]
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for copied in (pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        experts.remove(model)  # a copy has gates and hooks of its own
        assert all(torch.equal(call(copied, kind, t), output) for t, output in zip((10, 900), expected, strict=True))
        experts.remove(copied)
        assert torch.equal(call(copied, kind, 10), call(model, kind, 10))
        experts.apply(model)
