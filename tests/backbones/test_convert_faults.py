"""Checkpoints of DiT trainers as DDP, torch.compile, FSDP, Lightning and torch's AveragedModel leave them."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from alter import InputError
from alter.backbones.facebook_dit import read_checkpoint, to_diffusers, to_facebook


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6,
                                  num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=5, norm_eps=1e-6)
    for block in model.transformer_blocks:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    return to_facebook(model, "model")


def prefixed(state, *prefixes):
    return {"".join(prefixes) + name: tensor for name, tensor in state.items()}


def inside(state):
    """Each block compiled on its own."""
    return {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in state.items()}


LAYOUTS = {
    "plain": lambda state: state,
    "DDP": lambda state: prefixed(state, "module."),
    "torch.compile": lambda state: {"model": prefixed(state, "_orig_mod.")},
    "both": lambda state: {"ema": prefixed(state, "module.", "_orig_mod."), "model": {}},
    "blocks compiled": inside,
    "FSDP": lambda state: prefixed(state, "_fsdp_wrapped_module."),
    "Lightning": lambda state: {"state_dict": state},
    "ema: None": lambda state: {"ema": None, "model": state, "opt": {}},
    "AveragedModel": lambda state: {"ema": {"n_averaged": torch.tensor(7), **prefixed(state, "module.")}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_found_in_every_layout(state, tmp_path, layout):
    torch.save(LAYOUTS[layout](state), tmp_path / "c.pt")
    found = read_checkpoint(tmp_path / "c.pt")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    back = to_facebook(to_diffusers(found, 2, "c.pt"), "back")
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_the_average_goes_before_the_weights(state, tmp_path):
    other = {name: tensor + 1 for name, tensor in state.items()}
    for content in ({"model": other, "ema": state}, {"state_dict": other, "model": state}):
        torch.save(content, tmp_path / "c.pt")
        assert torch.equal(read_checkpoint(tmp_path / "c.pt")["pos_embed"], state["pos_embed"])


@pytest.mark.parametrize("content, reason", [
    ({"ema": None, "model": None}, "holds no state dict of floating-point tensors, nor does its 'ema', 'model'"),
    ({"ema": {}}, "holds no state dict"),
    ({"epoch": 3}, "holds no state dict"),
    ({"a.weight": torch.zeros(1), "module.a.weight": torch.ones(1)}, "holds weights twice, with and without"),
])
def test_checkpoints_without_weights(tmp_path, content, reason):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(InputError, match=f"c.pt: {reason}") as error:
        read_checkpoint(tmp_path / "c.pt")
    assert "\n" not in str(error.value)


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="is a folder: name the .pt file"):
        read_checkpoint(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        read_checkpoint(tmp_path / "c.pt")
