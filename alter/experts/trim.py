"""Backbones without the layers that none of their experts runs: smaller in memory, for good.

diffusers would load such weights into a full model, fill the gaps at random and only warn. So a trimmed backbone is
not saved, and refuses to run without its experts.
"""

import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from diffusers import ModelMixin
from torch import nn

from ..backbones.sites import Removed, Site, remove_layer
from ..common.errors import InputError


def trim_layers(backbone: nn.Module, sites: Sequence[Site], mask_EL: np.ndarray, used: list[int]) -> int:
    """Remove, in place, every layer that no expert of `used` runs.

    Args:
        backbone: without gates. sites: of it, [L]. mask_EL: bool [E, L].

    Returns: bytes of parameters freed.
    """
    before = _size(backbone)
    for site, runs in zip(sites, mask_EL[used].max(axis=0), strict=True):
        if not runs and not isinstance(backbone.get_submodule(site.name), Removed):
            remove_layer(backbone, site)
    kind: Any = type(backbone)
    if isinstance(backbone, ModelMixin) and not hasattr(kind, "_alter_trimmed"):
        backbone.__class__ = _trimmed(kind)
    return before - _size(backbone)


def check_runnable(backbone: nn.Module, sites: Sequence[Site], mask_EL: np.ndarray, used: list[int]) -> None:
    """Refuse experts that run a layer which the backbone no longer has."""
    for site, runs in zip(sites, mask_EL[used].max(axis=0), strict=True):
        if runs and isinstance(backbone.get_submodule(site.name), Removed):
            raise InputError(f"experts: they run {site.name}, which this backbone was trimmed of: load it untrimmed")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@functools.cache
def _trimmed(cls: Any) -> Any:
    def save_pretrained(self: Any, *_: Any, **__: Any) -> NoReturn:
        raise InputError("experts: a trimmed backbone is not saved: keep the folder that it was loaded from, and trim "
                         "again after loading")

    return type(cls.__name__, (cls,), {"save_pretrained": save_pretrained, "__module__": cls.__module__,
                                       "_alter_trimmed": True})
