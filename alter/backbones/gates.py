"""Gates at the sites of an unmodified diffusers model: x_out = (1 - m)·x_in + m·f(x_in), per sample.

Attaching sets each site's `__class__` to a parameter-free subclass of the same name whose `__call__` consults
the gate before it calls the layer. State-dict keys, `deepcopy`, hooks and `block.compile()` keep working, and
the branch stays outside compiled code. In inference (`set`, without gradients) even that look is spared: a layer that
all samples run has its own class again, one that none runs a class that only bypasses. `remove()` restores the model.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..common.errors import InputError
from .sites import Site, find_sites

_Bypass = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SoftRows:
    """Dense compute, blended by the mask: gradients reach mask_BL, float [B, L]."""

    mask_BL: Tensor

    def gate(self, index: int, bypass: _Bypass, layer: Callable, hidden_states: Tensor, args, kwargs) -> Tensor:
        output, around = layer(hidden_states, *args, **kwargs), bypass(hidden_states)
        dtype = torch.promote_types(around.dtype, output.dtype)
        mask = self.mask_BL[:, index].view(-1, *[1] * (output.dim() - 1)).to(dtype)
        return torch.lerp(around.to(dtype), output.to(dtype), mask)


class HardRows:
    """The layer runs only on the samples that keep it; known on the host, so nothing waits for the device.

    Args:
        mask_BL: bool [B, L] on the CPU; one row serves a batch of any size with one expert.
        device: where the backbone runs.
    """

    def __init__(self, mask_BL: Tensor, device: torch.device | str = "cpu") -> None:
        counts = mask_BL.sum(0).tolist()
        order_LB = mask_BL.T.int().argsort(dim=1, descending=True, stable=True).to(device, non_blocking=True)
        # Whether the site runs, for all samples; or the indices of those that keep it.
        self.kept: list[Tensor | bool] = [
            order_LB[site, :count] if 0 < count < len(mask_BL) else count > 0 for site, count in enumerate(counts)
        ]
        self.is_uniform = all(isinstance(kept, bool) for kept in self.kept)  # all samples run the same sites

    def gate(self, index: int, bypass: _Bypass, layer: Callable, hidden_states: Tensor, args, kwargs) -> Tensor:
        kept = self.kept[index]
        if kept is True:
            return layer(hidden_states, *args, **kwargs)
        around = bypass(hidden_states)
        if kept is False:
            return around
        batch = len(hidden_states)

        def select(value: Any) -> Any:
            is_batched = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
            return value.index_select(0, kept) if is_batched else value

        output = layer(
            select(hidden_states), *map(select, args), **{name: select(value) for name, value in kwargs.items()}
        )
        dtype = torch.promote_types(around.dtype, output.dtype)
        return around.to(dtype).index_copy(0, kept, output.to(dtype))


Rows = SoftRows | HardRows


class _State:
    """What the gates of one model share: the rows in force (None: dense)."""

    rows: Rows | None = None
    settled: bool = False  # by the layers' classes


@dataclass
class _Gate:
    index: int
    site: Site
    state: _State
    own: Any  # the layer's class when the gate was made
    base: Any  # that, or what others have made of it since
    given: Any  # the class that the layer has from here
    observer: Callable[[Tensor], None] | None = None

    def settle(self, layer: Any, kept: Tensor | bool | None) -> None:
        """Let the layer's class say that it runs (True) or does not (False); else the gate is consulted."""
        if type(layer) is not self.given:
            self.base = type(layer)
        settled = kept if isinstance(kept, bool) and self.observer is None and self.base is self.own else None
        if settled is None:
            self.given = _gated(self.base, self.own)
        else:
            self.given = self.own if settled else _bypassed(self.own, self.site.channels is None)
        object.__setattr__(layer, "__class__", self.given)
        # In the layer's own dictionary too, whose changes torch.compile's guards watch.
        object.__setattr__(layer, "_alter_settled", settled)


class Simulator:
    """Gates on every site of `backbone`, dense until `rows` are set.

    Args:
        backbone: a UNet2DConditionModel or DiTTransformer2DModel, changed in place until `remove()`.
        sites: of the backbone; None: as in the paper.

    Raises:
        InputError: if the backbone has no sites, or already has gates.
    """

    def __init__(self, backbone: Any, sites: Sequence[Site] | None = None) -> None:
        self.backbone = backbone
        self.sites = tuple(sites or find_sites(backbone))
        self._state = _State()
        self._layers: list[Any] = [backbone.get_submodule(site.path) for site in self.sites]
        self._uncompiled: dict[int, tuple[Any, Any]] = {}  # what `compile` replaced
        if any(hasattr(layer, "_alter_gate") for layer in self._layers):
            raise InputError("backbone: it already has gates: remove them first")
        for index, (site, layer) in enumerate(zip(self.sites, self._layers, strict=True)):
            own = type(layer)
            layer._alter_gate = _Gate(index, site, self._state, own, own, own)
            layer._alter_gate.settle(layer, None)

    @contextmanager
    def use(self, rows: Rows | None) -> Iterator[None]:
        """Put `rows` in force for the forwards inside."""
        self._settle(None)
        before, self._state.rows = self._state.rows, rows
        try:
            yield
        finally:
            self._state.rows = before

    def set(self, rows: Rows | None) -> None:
        """Put `rows` in force until changed."""
        # A block whose activations are recomputed in backward must find the rows of its forward: not with gradients.
        uniform = rows if isinstance(rows, HardRows) and not torch.is_grad_enabled() else None
        if rows is not self._state.rows or self._state.settled != (uniform is not None):
            self._state.rows = None  # until all layers have followed, should an interrupt come between
            self._settle(uniform)
            self._state.rows = rows

    def _settle(self, rows: HardRows | None) -> None:
        """Let the layers' classes say which run; None: they consult their gates."""
        if rows is None and not self._state.settled:
            return
        self._state.settled = True
        for layer in self._layers:
            gate: _Gate = layer._alter_gate
            gate.settle(layer, None if rows is None else rows.kept[gate.index])
        self._state.settled = rows is not None

    @property
    def is_uniform(self) -> bool:
        """Whether all samples of a batch run the same sites, by the hard rows in force."""
        rows = self._state.rows
        return isinstance(rows, HardRows) and rows.is_uniform

    def compile(self, **options: Any) -> None:
        """torch.compile every site's layer with these options; the branches stay outside."""
        # One graph for each kind of layer, width and mode; past the limit dynamo would quietly run eagerly.
        dynamo: Any = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * len(self._layers))
        for layer in self._layers:
            self._uncompiled.setdefault(id(layer), (layer, layer._compiled_call_impl))
            layer.compile(**options)

    def uncompile(self) -> None:
        """Undo `compile`."""
        for layer, former in self._uncompiled.values():
            layer._compiled_call_impl = former
        self._uncompiled = {}

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
        self._settle(None)
        for layer in self._layers:
            layer.__class__ = layer._alter_gate.own
            del layer._alter_gate
            del layer._alter_settled
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
                module._alter_gate.settle(module, None)
            else:
                module.register_forward_hook(lambda module, inputs, output, keep=keep: keep(output))

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """Yields a list that holds the features, in the order of the names, once the block is left."""
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
def _gated(cls: Any, own: Any) -> Any:
    def call(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        gate: _Gate = self._alter_gate
        rows = gate.state.rows
        if rows is None and gate.observer is None:
            return dense(self, hidden_states, *args, **kwargs)
        in_tuple = kwargs.get("return_dict") is False  # so diffusers asks a whole transformer for (output,)

        def layer(*args: Any, **kwargs: Any) -> Tensor:
            return dense(self, *args, **kwargs)[0] if in_tuple else dense(self, *args, **kwargs)

        def bypass(hidden_states: Tensor) -> Tensor:
            return gate.site.bypass(self, hidden_states)

        if rows is None:
            output = layer(hidden_states, *args, **kwargs)
        else:
            output = rows.gate(gate.index, bypass, layer, hidden_states, args, kwargs)
        if gate.observer is not None:
            gate.observer(output)
        return (output,) if in_tuple else output

    dense = own.__call__
    return _subclass(cls, call)


@functools.cache
def _bypassed(cls: Any, of_tokens: bool) -> Any:
    """of_tokens: the layer gives back its input, without a lookup that compiled code would have to guard."""
    def around(self: Any, hidden_states: Tensor, *_: Any, **kwargs: Any) -> Any:
        output = self._alter_gate.site.bypass(self, hidden_states)
        return (output,) if kwargs.get("return_dict") is False else output

    def through(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    return _subclass(cls, through if of_tokens else around)


def _subclass(cls: Any, call: Callable) -> Any:
    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
