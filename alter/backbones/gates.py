"""Gates at the sites of an unmodified diffusers model: x_out = (1 - m)·x_in + m·f(x_in), per sample.

Attaching sets each site's `__class__` to a parameter-free subclass of the same name whose `__call__` consults the gate
before it calls the layer. State-dict keys, `deepcopy`, pickling, hooks and `block.compile()` keep working, and the
branch stays outside compiled code. `remove()` restores the model.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from ..common.errors import InputError
from .sites import Site, find_sites


@dataclass(frozen=True)
class SoftRows:
    """Every layer is computed and blended by the mask, so that gradients reach mask_BL, float [B, L]."""

    mask_BL: Tensor

    def gate(self, index: int, site: Site, layer: Callable, hidden_states: Tensor, args, kwargs) -> Tensor:
        output, around = layer(hidden_states, *args, **kwargs), site.bypass(hidden_states)
        dtype = torch.promote_types(around.dtype, output.dtype)
        mask = self.mask_BL[:, index].view(-1, *[1] * (output.dim() - 1)).to(dtype)
        return torch.lerp(around.to(dtype), output.to(dtype), mask)


class HardRows:
    """A layer runs only on the samples that keep it; these are known on the host, so nothing waits for the device.

    Args:
        mask_BL: bool [B, L] on the CPU; a single row [1, L] serves a batch of any size with one expert.
        device: where the backbone runs.
    """

    def __init__(self, mask_BL: Tensor, device: torch.device | str = "cpu") -> None:
        counts = mask_BL.sum(0).tolist()
        order_LB = mask_BL.T.int().argsort(dim=1, descending=True, stable=True).to(device, non_blocking=True)
        # True or False: the site runs for all samples or for none; else the indices of those that keep it.
        self.kept: list[Tensor | bool] = [
            order_LB[site, :count] if 0 < count < len(mask_BL) else count > 0 for site, count in enumerate(counts)
        ]

    def gate(self, index: int, site: Site, layer: Callable, hidden_states: Tensor, args, kwargs) -> Tensor:
        kept = self.kept[index]
        if kept is True:
            return layer(hidden_states, *args, **kwargs)
        around = site.bypass(hidden_states)
        if kept is False:
            return around
        batch = len(hidden_states)

        def select(value: Tensor) -> Tensor:
            return value.index_select(0, kept) if value.dim() > 0 and len(value) == batch else value

        # Conditioning may be nested: an IP-Adapter's image states come in a tuple beside the text's.
        selected, args, kwargs = tree_map_only(Tensor, select, (hidden_states, args, kwargs))
        output = layer(selected, *args, **kwargs)
        dtype = torch.promote_types(around.dtype, output.dtype)
        return around.to(dtype).index_copy(0, kept, output.to(dtype))


Rows = SoftRows | HardRows


class _State(threading.local):
    """What the gates of one model share.

    rows: those in force in this thread; None: dense. required: whether running dense is a mistake, in every thread.
    """

    rows: Rows | None = None

    def __init__(self, required: list[bool]) -> None:
        self.required = required

    def __reduce__(self) -> Any:
        """A copy, in another process perhaps, begins without rows."""
        return _State, (self.required,)


@dataclass
class _Gate:
    index: int
    site: Site
    state: _State
    observer: Callable[[Tensor], None] | None = None


class Simulator:
    """Gates on every site of `backbone`, dense until rows are put in force.

    Args:
        backbone: a UNet2DConditionModel or DiTTransformer2DModel, changed in place until `remove()`.

    Raises:
        InputError: if the backbone has no sites, or already has gates.
    """

    def __init__(self, backbone: Any) -> None:
        self.backbone, self.sites = backbone, find_sites(backbone)
        self._state = _State([False])
        self._layers: list[Any] = [backbone.get_submodule(site.name) for site in self.sites]
        self._uncompiled: list[tuple[Any, Any]] = []  # what `compile` replaced
        if any(hasattr(layer, "_alter_gate") for layer in self._layers):
            raise InputError("backbone: it already has gates: remove them first")
        for index, (site, layer) in enumerate(zip(self.sites, self._layers, strict=True)):
            layer._alter_gate = _Gate(index, site, self._state)
            cls: Any = type(layer)
            if not hasattr(cls, "_alter_base"):  # else it is a class that somebody made of ours (see `remove`)
                layer.__class__ = _gated(cls)

    @contextmanager
    def use(self, rows: Rows | None) -> Iterator[None]:
        """Put `rows` in force for the forwards inside."""
        before, self._state.rows = self._state.rows, rows
        try:
            yield
        finally:
            self._state.rows = before

    def set(self, rows: Rows | None) -> None:
        """Put `rows` in force until changed."""
        self._state.rows = rows

    def require_rows(self, required: bool) -> None:
        """Whether a layer refuses to run while no rows are in force."""
        self._state.required[0] = required

    def compile(self, **options: Any) -> None:
        """torch.compile every site's layer with these options; the branches stay outside."""
        # One graph for each kind of layer, width and mode; past the limit dynamo would quietly run eagerly.
        dynamo: Any = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * len(self._layers))
        self.uncompile()
        for layer in self._layers:
            self._uncompiled.append((layer, layer._compiled_call_impl))
            layer.compile(**options)

    def uncompile(self) -> None:
        """Undo `compile`."""
        for layer, former in self._uncompiled:
            layer._compiled_call_impl = former
        self._uncompiled = []

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in backward, with the rows that were in force in *that* forward."""
        def with_rows(function: Callable, *args: Any) -> Any:
            if not hasattr(function, "_alter_gate"):  # inside a site, in compiled code perhaps
                return checkpoint(function, *args, use_reentrant=False)
            rows = self._state.rows

            def run(*inputs: Any) -> Any:
                with self.use(rows):
                    return function(*inputs)

            return checkpoint(run, *args, use_reentrant=False)

        self.backbone.enable_gradient_checkpointing(gradient_checkpointing_func=with_rows)

    def remove(self) -> None:
        """Restore the model to what it was."""
        self.uncompile()
        for layer in self._layers:
            del layer._alter_gate
            if "_alter_base" in vars(type(layer)):
                layer.__class__ = type(layer)._alter_base
            # Else somebody has made a class of ours since, which stays: without a gate ours does nothing.
        self._layers = []


class FeatureTap:
    """Keeps the outputs of chosen modules, after their gate when they have one.

    A forward hook on a gated layer would fire before the gate, or not at all when the layer is skipped.
    """

    def __init__(self, backbone: Any, names: Sequence[str]) -> None:
        self._kept: dict[int, Tensor] = {}
        self._armed = False
        for index, name in enumerate(names):
            module = backbone.get_submodule(name)
            keep = functools.partial(self._keep, index)
            if hasattr(module, "_alter_gate"):
                module._alter_gate.observer = keep
            else:
                module.register_forward_hook(lambda module, inputs, output, keep=keep: keep(output))

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """Yields a list that holds the features, in the order of the names, after the end of the block."""
        features: list[Tensor] = []
        self._armed = True
        try:
            yield features
            features.extend(self._kept[index] for index in sorted(self._kept))
        finally:
            # Disarmed, so that gradient checkpointing's second forward of a block is not kept.
            self._armed = False
            self._kept = {}

    def _keep(self, index: int, output: Any) -> None:
        if self._armed:
            self._kept[index] = output[0] if isinstance(output, tuple) else output


@functools.cache
def _gated(cls: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        gate: _Gate | None = vars(self).get("_alter_gate")
        return dense(self, *args, **kwargs) if gate is None else _through(gate, functools.partial(dense, self), *args,
                                                                          **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        """For pickle and deepcopy, which look a class up by its name and would find `cls`."""
        return _new, (cls,), self.__getstate__()

    dense = cls.__call__
    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "__reduce_ex__": reduce,
                                       "_alter_base": cls})


def _new(cls: Any) -> Any:
    return object.__new__(_gated(cls))


def _through(gate: _Gate, layer: Callable, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The output of a layer behind its gate."""
    rows = gate.state.rows
    if rows is not None:
        output = rows.gate(gate.index, gate.site, layer, hidden_states, args, kwargs)
    elif gate.state.required[0]:
        raise InputError(f"experts: {gate.site.name} was run outside a call of its backbone (by the backbone's "
                         "`forward`, or when gradient checkpointing computes it again), where no timestep chooses the "
                         "layers: call the backbone itself, or remove the experts")
    else:
        output = layer(hidden_states, *args, **kwargs)
    if gate.observer is not None:
        gate.observer(output)
    return output
