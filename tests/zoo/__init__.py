"""Tiny random models of diffusers' classes, their inputs, and what they give without a block: none of it by alter."""

import inspect
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from .audio import AUDIO
from .draws import Specimen
from .images import IMAGES
from .more_images import MORE_IMAGES
from .more_videos import MORE_VIDEOS
from .unets import UNETS
from .videos import VIDEOS

_ALL: dict[str, Specimen] = {**IMAGES, **MORE_IMAGES, **VIDEOS, **MORE_VIDEOS, **AUDIO, **UNETS}


def _is_known(name: str, specimen: Specimen) -> bool:
    """Whether this version of diffusers has the class, with all that the configuration sets."""
    cls = getattr(diffusers, specimen.cls or name, None)
    return cls is not None and specimen.config.keys() <= inspect.signature(cls.__init__).parameters.keys()


ZOO = {name: specimen for name, specimen in _ALL.items() if _is_known(name, specimen)}
# Of what newer versions of diffusers changed.
of_the_newest = pytest.mark.skipif(len(ZOO) < len(_ALL), reason="another diffusers than the newest")


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """In eval mode, every parameter drawn anew: those that diffusers sets to zero let no block change the output."""
    torch.manual_seed(seed)
    specimen = ZOO[name]
    model = getattr(diffusers, specimen.cls or name)(**specimen.config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.dim() > 1:
                value.normal_(0, max(value.shape[1:].numel(), 1) ** -0.5)
            else:
                value.normal_(1.0 if key.endswith("weight") else 0.0, 0.1)
    return nn.Module.to(model, dtype)


def inputs(name: str, model: nn.Module, batch: int = 3, seed: int = 0) -> dict[str, Any]:
    """The arguments of one forward, in the model's precision."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(value.dtype for value in model.parameters() if value.is_floating_point())
    given = ZOO[name].inputs(model, batch, generator)
    return tree_map_only(Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, given)


def alone(given: Any, index: int, batch: int) -> Any:
    """Of arguments of a batch those of one sample, still a batch: rows of tensors, members of lists of `batch`."""
    if isinstance(given, dict):
        return {key: alone(value, index, batch) for key, value in given.items()}
    if isinstance(given, list) and len(given) == batch:
        return given[index : index + 1]
    if isinstance(given, list | tuple):
        return type(given)(alone(value, index, batch) for value in given)
    is_batched = isinstance(given, Tensor) and given.dim() > 0 and len(given) == batch
    return given[index : index + 1] if is_batched else given


def answer(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """What the model gives, [B, values] of all its outputs."""
    outputs = model(**given).to_tuple()
    stacked = [torch.stack(value) if isinstance(value, list) else value for value in outputs if value is not None]
    return torch.cat([value.flatten(1) for value in stacked], 1)


def blocks(name: str, model: nn.Module) -> Iterator[str]:
    """Module paths of the blocks that can be pruned; of a UNet those whose removal is that of their parameters."""
    if ZOO[name].lists:
        yield from (f"{listed}.{index}" for listed in ZOO[name].lists for index in range(len(getattr(model, listed))))
    for path, module in model.named_modules():
        if not ZOO[name].lists and isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            if getattr(module, "conv_shortcut", None) is None:
                yield path


def removed(model: nn.Module, path: str, given: dict[str, Any]) -> Tensor:
    """What the model gives when the block at `path` has zeros for parameters: a residual block then adds nothing."""
    block: Any = model.get_submodule(path)
    zeros = {key: torch.zeros_like(value) for key, value in block.named_parameters()}

    def forward(*args: Any, **kwargs: Any) -> Any:
        del block.forward
        try:
            return functional_call(block, zeros, args, kwargs)
        finally:
            block.forward = forward

    block.forward = forward
    try:
        return answer(model, given)
    finally:
        del block.forward
