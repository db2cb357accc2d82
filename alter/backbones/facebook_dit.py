"""facebookresearch/DiT's checkpoints and diffusers' DiTTransformer2DModel: the same weights under other names.

diffusers has one timestep and label embedder per block, separate queries, keys and values, and computes the fixed
positions. All weights are copied as they are. What remains different is the timestep's sinusoid: its frequencies are
10000^(-k/128) in the original, 10000^(-k/127) in diffusers, and no configuration of diffusers' changes that.
"""

import argparse
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor

from ..common.errors import InputError

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of DiT-S, -B, -L and -XL, by width
SIZED = {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2,
         "final_layer.linear.weight": 2}  # tensors that tell the model's sizes, with their dimensions
QKV = ".attn.qkv."
POSITION_ERROR = 1e-3  # an EMA of the constant positions rounds its way up to 2e-4 off them
MOST_NAMED = 5
WEIGHTS = ("ema", "model", "state_dict")  # keys of a training checkpoint; the first that holds any counts
_AVERAGED = "n_averaged"  # beside the tensors of torch's AveragedModel
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # parts of tensors' names


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The weights in a .pt file; of those in a training checkpoint the averaged ones, `ema`, if there are any, under
    the names that they have without WRAPPERS. No code of the file runs.

    Raises:
        InputError: if it cannot be read, or holds anything but tensors and the training script's arguments.
    """
    if not file.is_file():
        raise InputError(f"{file}: {'is a folder: name the .pt file' if file.is_dir() else 'no such file'}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # fast-DiT's `args`: plain attributes
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # of the many kinds that damaged files cause
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1]}" if found else f"{type(error).__name__}: damaged, or not written by torch.save"
        raise InputError(f"{file}: cannot be read as tensors only ({reason}): save its state dict alone") from None
    if isinstance(content, dict):
        weights = [content[name] for name in WEIGHTS if isinstance(content.get(name), dict) and content[name]]
        content = weights[0] if weights else content
        content = {name: value for name, value in content.items() if name != _AVERAGED}
    if not (isinstance(content, dict) and all(isinstance(name, str) and isinstance(value, Tensor)
                                              and value.is_floating_point() for name, value in content.items())):
        raise InputError(f"{file}: holds no state dict of floating-point tensors, nor does its "
                         f"{', '.join(map(repr, WEIGHTS))}: save the state dict alone")
    assert isinstance(content, dict)
    state = {_unwrapped(name): tensor.detach() for name, tensor in content.items()}
    if len(state) < len(content):
        raise InputError(f"{file}: holds weights twice, with and without {' or '.join(sorted(WRAPPERS))} in their "
                         "names: save one state dict alone")
    return state


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def to_diffusers(state: Mapping[str, Tensor], heads: int | None, where: str) -> DiTTransformer2DModel:
    """The diffusers model of an original state dict, in its dtypes; `heads` None: those of the published sizes.

    Raises:
        InputError: beginning with `where`, if anything is missing, left over or of the wrong shape.
    """
    config = _read_config(state, heads, where)
    table = _check(state, config, where)
    positions = _positions(config).to(state["pos_embed"].dtype)
    difference = (state["pos_embed"].double() - positions.double()).abs().max().item()
    if not difference <= POSITION_ERROR:
        raise InputError(f"{where}: pos_embed: differs by {difference:.1e} from the fixed sines and cosines, the only "
                         "positions that diffusers has: give a model that was trained with those")
    weights: dict[str, Tensor] = {}
    for name, (_, targets) in table.items():
        parts = state[name].chunk(3) if QKV in name else [state[name]] * len(targets)
        weights |= {target: part.clone() for target, part in zip(targets, parts, strict=True)}
    with init_empty_weights(include_buffers=False):
        model = DiTTransformer2DModel(**config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def to_facebook(model: DiTTransformer2DModel, where: str) -> dict[str, Tensor]:
    """The state dict that the original's `load_state_dict` takes.

    Raises:
        InputError: beginning with `where`, if the original has no such model, or the blocks' embedders differ.
    """
    config, weights = {**model.config, "out_channels": model.out_channels}, model.state_dict()
    if config["activation_fn"] != "gelu-approximate":
        raise InputError(f"{where}: activation_fn={config['activation_fn']!r}: the original has gelu-approximate only")
    table = _table(config)
    odd = weights.keys() ^ {target for _, targets in table.values() for target in targets}
    if odd:
        raise InputError(f"{where}: {_some(odd)}: in only one of this model and the original: give a model with "
                         "attention_bias true and norm_elementwise_affine false")
    state = {}
    for name, (_, targets) in table.items():
        parts = [weights[target] for target in targets]
        if QKV in name:
            state[name] = torch.cat(parts)
        elif parts:
            state[name] = parts[0]
            for target, part in zip(targets, parts, strict=True):
                if not torch.equal(part, parts[0]):
                    raise InputError(f"{where}: {target}: differs from {targets[0]}, but the original has one for "
                                     "all blocks: give a model that was trained with one")
    state["pos_embed"] = _positions(config).to(state["x_embedder.proj.weight"].dtype)
    _check(state, config, where)
    return state


def _read_config(state: Mapping[str, Tensor], heads: int | None, where: str) -> dict[str, Any]:
    """Arguments of DiTTransformer2DModel."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, dimensions in SIZED.items():
        if len(shapes.get(name, ())) != dimensions or 0 in shapes[name]:
            raise InputError(f"{where}: {name}: {shapes.get(name, 'missing')}: expected {dimensions} dimensions: "
                             "give a checkpoint of facebookresearch/DiT's model")
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    heads = HEADS.get(width) if heads is None else heads
    if heads is None or heads < 1 or width % heads or width % 4:
        raise InputError(f"{where}: x_embedder.proj.weight: {heads or 'unknown'} heads for a width of {width}: give "
                         "--heads that divides it; the width must be a multiple of 4")
    return {"num_attention_heads": heads, "attention_head_dim": width // heads, "in_channels": channels,
            "out_channels": shapes["final_layer.linear.weight"][0] // patch**2, "patch_size": patch,
            "sample_size": math.isqrt(shapes["pos_embed"][1]) * patch, "norm_eps": 1e-6,
            "num_layers": len({name.split(".")[1] for name in state if name.startswith("blocks.")}) or 1,
            "num_embeds_ada_norm": shapes["y_embedder.embedding_table.weight"][0] - 1}


def _check(state: Mapping[str, Tensor], config: Mapping[str, Any],
           where: str) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """The table, which the state dict follows."""
    table = _table(config)
    wrong = [f"{name} {tuple(tensor.shape)} instead of {table[name][0]}" for name, tensor in state.items()
             if name in table and tuple(tensor.shape) != table[name][0]]
    for problem, names in (("missing", table.keys() - state.keys()), ("unknown", state.keys() - table.keys()),
                           ("wrong shape", wrong)):
        if names:
            raise InputError(f"{where}: {problem}: {_some(names)}: give a checkpoint of facebookresearch/DiT's model")
    if config["out_channels"] not in (config["in_channels"], 2 * config["in_channels"]):
        raise InputError(f"{where}: {config['out_channels']} output channels for {config['in_channels']}: the "
                         "original has as many, or twice as many where it learns sigma")
    return table


def _table(config: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """The original's tensors: shape, and names in diffusers: none, one, three (thirds) or one per block (copies)."""
    width, patch = config["num_attention_heads"] * config["attention_head_dim"], config["patch_size"]
    embedders = [f"transformer_blocks.{i}.norm1.emb" for i in range(config["num_layers"])]
    modules: dict[str, tuple[tuple[int, ...], list[str]]] = {
        "x_embedder.proj": ((width, config["in_channels"], patch, patch), ["pos_embed.proj"]),
        "t_embedder.mlp.0": ((width, 256), [f"{name}.timestep_embedder.linear_1" for name in embedders]),
        "t_embedder.mlp.2": ((width, width), [f"{name}.timestep_embedder.linear_2" for name in embedders]),
        "final_layer.adaLN_modulation.1": ((2 * width, width), ["proj_out_1"]),
        "final_layer.linear": ((patch**2 * config["out_channels"], width), ["proj_out_2"]),
    }
    for i in range(config["num_layers"]):
        block, target = f"blocks.{i}", f"transformer_blocks.{i}"
        modules[f"{block}.adaLN_modulation.1"] = (6 * width, width), [f"{target}.norm1.linear"]
        modules[f"{block}.attn.qkv"] = (3 * width, width), [f"{target}.attn1.to_{part}" for part in "qkv"]
        modules[f"{block}.attn.proj"] = (width, width), [f"{target}.attn1.to_out.0"]
        modules[f"{block}.mlp.fc1"] = (4 * width, width), [f"{target}.ff.net.0.proj"]
        modules[f"{block}.mlp.fc2"] = (width, 4 * width), [f"{target}.ff.net.2"]
    table = {f"{name}.{leaf}": (shape if leaf == "weight" else shape[:1], [f"{target}.{leaf}" for target in targets])
             for name, (shape, targets) in modules.items() for leaf in ("weight", "bias")}
    table["y_embedder.embedding_table.weight"] = ((config["num_embeds_ada_norm"] + 1, width), [
        f"{name}.class_embedder.embedding_table.weight" for name in embedders])
    return table | {"pos_embed": ((1, (config["sample_size"] // patch) ** 2, width), [])}


def _positions(config: Mapping[str, Any]) -> Tensor:
    """float32 [1, patches, width], as diffusers computes them."""
    side = config["sample_size"] // config["patch_size"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt").float()[None]


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:MOST_NAMED]) + (f" and {len(listed) - MOST_NAMED} more" if listed[MOST_NAMED:] else "")
