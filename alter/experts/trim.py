"""Backbones without the layers that none of their experts runs: smaller in memory and on disk.

diffusers would load such weights into a full model, fill the gaps at random and only warn. So a trimmed backbone is
saved under a file name of ours, which plain diffusers does not find, and refuses to run without its experts.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn

from ..backbones.sites import PIPELINE_COMPONENT, Removed, Site, remove_layer
from ..common.errors import InputError

WEIGHTS = "alter_trimmed.safetensors"


def trim_layers(backbone: nn.Module, sites: Sequence[Site], mask_EL: np.ndarray, used: list[int]) -> int:
    """Remove, in place, every layer that no expert of `used` runs.

    Args:
        backbone: without gates. sites: of it, [L]. mask_EL: bool [E, L].

    Returns: bytes of parameters freed.
    """
    before = _size(backbone)
    for site, runs in zip(sites, mask_EL[used].max(axis=0), strict=True):
        if not runs and not isinstance(backbone.get_submodule(site.path), Removed):
            remove_layer(backbone, site)
    kind: Any = type(backbone)
    if kind in PIPELINE_COMPONENT:
        backbone.__class__ = _trimmed(kind)
    return before - _size(backbone)


def check_runnable(backbone: nn.Module, sites: Sequence[Site], mask_EL: np.ndarray, used: list[int]) -> None:
    """Refuse experts that run a layer which the backbone no longer has."""
    for site, runs in zip(sites, mask_EL[used].max(axis=0), strict=True):
        if runs and isinstance(backbone.get_submodule(site.path), Removed):
            raise InputError(f"experts: they run {site.name}, which this backbone was trimmed of: load it untrimmed")


def load_trimmed(folder: Path, cls: type, trim: Callable[[nn.Module], int]) -> nn.Module:
    """The backbone that was saved in `folder`, never materialising the removed layers; `trim` removes them."""
    with init_empty_weights(include_buffers=False):
        backbone = cls.from_config(cls.load_config(folder))  # type: ignore[attr-defined]
    trim(backbone)
    try:
        backbone.load_state_dict(load_file(folder / WEIGHTS), strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(f"{folder / WEIGHTS}: {' '.join(str(error).split())[:300]}") from None
    return backbone.eval()


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@functools.cache
def _trimmed(cls: Any) -> Any:
    def save_pretrained(self: Any, save_directory: str | Path, is_main_process: bool = True, **_: Any) -> None:
        """As diffusers', to one file under another name."""
        if is_main_process:
            self.save_config(save_directory)
            state = {name: value.contiguous() for name, value in self.state_dict().items()}
            save_file(state, Path(save_directory) / WEIGHTS, {"format": "pt"})

    trimmed: Any = type(cls.__name__, (cls,), {"save_pretrained": save_pretrained, "__module__": cls.__module__})
    return trimmed
