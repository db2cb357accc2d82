"""Whether the blocks of a backbone that no test knows give what they were given when their weights are zeros."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from .sites import Site, find_sites


@torch.no_grad()
def not_residual(backbone: Any, run: Callable[[], Any]) -> list[str]:
    """The sites whose layer, with zeros for parameters, gives something else than `Site.bypass`.

    Args:
        backbone: without gates in force, or with gates and no rows.
        run: calls it once; each site then gives its bypass, so that the call costs little but for the first layers.
    """
    others: list[str] = []
    layers = [(site, backbone.get_submodule(site.name)) for site in find_sites(backbone)]

    def watch(site: Site, layer: Any) -> None:
        forward = layer.forward

        def probe(*args: Any, **kwargs: Any) -> Any:
            # One number each, however large the parameter; some layers compare their shapes.
            zeros = {name: value.new_zeros(()).expand(value.shape) for name, value in layer.named_parameters()}
            around = site.bypass(args, kwargs)
            layer.forward = forward
            try:
                outputs = site.unpack(functional_call(layer, zeros, args, kwargs))
            finally:
                layer.forward = probe
            if not all(map(_equal, outputs, around)):
                others.append(site.name)
            return site.pack(around)

        layer.forward = probe

    for site, layer in layers:
        watch(site, layer)
    try:
        run()
    finally:
        for _, layer in layers:
            del layer.forward
    return others


def _equal(output: Tensor | None, around: Tensor) -> bool:
    """Up to rounding; a stream may end in the layer."""
    return output is None or output.shape == around.shape and torch.allclose(output.float(), around.float(), 1e-3, 1e-5)
