"""Gates at the sites of an unmodified diffusers model: x_out = (1 - m)·x_in + m·f(x_in), per sample.

Attaching sets each site's `__class__` to a parameter-free subclass of the same name whose `__call__` consults the gate
before it calls the layer. State-dict keys, `deepcopy`, pickling, hooks and `block.compile()` keep working, and the
branch stays outside compiled code. `remove()` restores the model.
"""

import functools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only
from torch.utils.checkpoint import checkpoint

from ..common.device import to_device
from ..common.errors import InputError
from .sites import Site, find_sites

_Streams = tuple[Tensor, ...]  # of a layer's output
Added = tuple[Tensor | None, ...]  # to each stream by a layer


@dataclass(frozen=True)
class SoftRows:
    """Every layer is computed and blended by the mask, so that gradients reach mask_BL, float [B, L]."""

    mask_BL: Tensor

    def gate(self, index: int, site: Site, layer: Callable, args: tuple, kwargs: dict[str, Any]) -> _Streams:
        mask_B = self.mask_BL[:, index]

        def blend(around: Tensor | None, output: Tensor | None) -> Any:
            if output is None or around is None:  # a stream that ends in this layer, or is not there
                return None
            dtype = torch.promote_types(around.dtype, output.dtype)
            each = _rows_each(site, around, len(mask_B))
            mask = mask_B.repeat_interleave(each) if each > 1 else mask_B
            return torch.lerp(around.to(dtype), output.to(dtype), mask.view(-1, *[1] * (output.dim() - 1)).to(dtype))

        return tuple(map(blend, site.bypass(args, kwargs), layer(*args, **kwargs)))


class HardRows:
    """A layer runs only on the samples that keep it; these are known on the host, so nothing waits for the device.

    Args:
        mask_BL: bool [B, L] on the CPU; a single row [1, L] serves a batch of any size with one expert.
        device: where the backbone runs.
    """

    def __init__(self, mask_BL: Tensor, device: torch.device | str = "cpu") -> None:
        self.batch = len(mask_BL)
        counts = mask_BL.sum(0).tolist()
        order_LB = to_device(mask_BL.T.int().argsort(dim=1, descending=True, stable=True), device)
        # True or False: the site runs for all samples or for none; else the indices of those that keep it.
        self.kept: list[Tensor | bool] = [
            order_LB[site, :count] if 0 < count < len(mask_BL) else count > 0 for site, count in enumerate(counts)
        ]

    def gate(self, index: int, site: Site, layer: Callable, args: tuple, kwargs: dict[str, Any]) -> _Streams:
        kept = self.kept[index]
        if kept is True:
            return layer(*args, **kwargs)
        around = site.bypass(args, kwargs)
        if kept is False:
            return around
        _check_distinct(site, around, self.batch, {**dict(zip(site.arguments, args, strict=False)), **kwargs})
        rows = {self.batch: kept}  # by the length of what they are taken of
        for stream in (stream for stream in around if stream is not None):
            each = _rows_each(site, stream, self.batch)
            if each > 1:  # the frames of a video
                rows[len(stream)] = (kept[:, None] * each + torch.arange(each, device=kept.device)).flatten()

        def select(value: Tensor) -> Tensor:
            return value.index_select(0, rows[len(value)]) if value.dim() > 0 and len(value) in rows else value

        def scatter(around: Tensor | None, output: Tensor | None) -> Any:
            if output is None or around is None:
                return None
            dtype = torch.promote_types(around.dtype, output.dtype)
            return around.to(dtype).index_copy(0, rows[len(around)], output.to(dtype))

        # Conditioning may be nested: rotary embeddings are tuples, an IP-Adapter's image states lie beside the text's.
        args, kwargs = tree_map_only(Tensor, select, (args, kwargs))
        return tuple(map(scatter, around, layer(*args, **kwargs)))


class CachedRows:
    """A layer that is left out adds what it added when it last ran, if it has.

    Args:
        kept: bool [L], the layers that run, for all samples. added: what each layer added to each stream, by its index;
            read, and written where `noted`, bool [L].

    Raises:
        InputError: in a forward, if a layer is given other shapes than when it last ran.
    """

    def __init__(self, kept: Sequence[bool], added: dict[int, Added], noted: Sequence[bool]) -> None:
        self.kept, self.added, self.noted = kept, added, noted

    @torch.compiler.disable(recursive=False)
    def gate(self, index: int, site: Site, layer: Callable, args: tuple, kwargs: dict[str, Any]) -> _Streams:
        if self.kept[index] and not self.noted[index]:
            return layer(*args, **kwargs)
        around = site.bypass(args, kwargs)
        if self.kept[index]:
            outputs = layer(*args, **kwargs)
            self.added[index] = tuple(None if output is None or stream is None else output - stream.to(output.device)
                                      for output, stream in zip(outputs, around, strict=True))
            return outputs
        added = self.added.get(index, (None,) * len(around))
        for stream, more in zip(around, added, strict=True):
            if more is not None and more.shape != stream.shape:
                raise InputError(f"experts: {site.name} added {list(more.shape)} at a step before and is given "
                                 f"{list(stream.shape)}; a cached rung needs the same samples at every step: leave out "
                                 "what ends guidance")
        return tuple(stream if more is None else stream.to(more.device) + more
                     for stream, more in zip(around, added, strict=True))


Rows = SoftRows | HardRows | CachedRows


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
        backbone: a UNet or transformer of diffusers, changed in place until `remove()`.

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
        sites = {site.name: site for site in find_sites(backbone)}
        for index, name in enumerate(names):
            module = backbone.get_submodule(name)
            keep = functools.partial(self._keep, index)
            if hasattr(module, "_alter_gate"):
                module._alter_gate.observer = keep
            else:
                module.register_forward_hook(functools.partial(_observe, sites.get(name), keep))

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

    def _keep(self, index: int, output: Tensor) -> None:
        if self._armed:
            self._kept[index] = output


def _observe(site: Site | None, keep: Callable[[Tensor], None], module: Any, inputs: Any, output: Any) -> None:
    """The forward hook of a module without a gate: of a site, or of a UNet's block."""
    if site is not None:
        keep(site.image(site.unpack(output)))
    else:
        keep(output[0] if isinstance(output, tuple) else output)


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


def _through(gate: _Gate, layer: Callable, *args: Any, **kwargs: Any) -> Any:
    """The output of a layer behind its gate."""
    rows, site = gate.state.rows, gate.site
    if rows is None and gate.state.required[0]:
        raise InputError(f"experts: {site.name} was run outside a call of its backbone (by the backbone's "
                         "`forward`, or when gradient checkpointing computes it again), where no timestep chooses the "
                         "layers: call the backbone itself, or remove the experts")

    def streams(*args: Any, **kwargs: Any) -> _Streams:
        return site.unpack(layer(*args, **kwargs))

    outputs = streams(*args, **kwargs) if rows is None else rows.gate(gate.index, site, streams, args, kwargs)
    if gate.observer is not None:
        gate.observer(site.image(outputs))
    return site.pack(outputs)


def _rows_each(site: Site, stream: Tensor, batch: int) -> int:
    """How many rows of `stream` belong to one sample of `batch`, side by side."""
    each, left = divmod(len(stream), batch)
    if left or not each or (batch > 1 and not site.batched):
        raise InputError(f"experts: {site.name} was given {len(stream)} rows for {batch} samples: this backbone does "
                         "not keep the batch on the first axis, so that its samples cannot run different layers: call "
                         "it with one timestep at a time")
    return each


def _check_distinct(site: Site, around: _Streams, batch: int, given: Any) -> None:
    """Refuse a batch as large as the number of tokens where positions, one a token, could be taken for samples."""
    tokens = [stream.shape[1] for stream in around if stream is not None and stream.dim() == 3]
    if batch not in {*tokens, sum(tokens)}:
        return
    for path, value in tree_flatten_with_path(given)[0]:
        name = keystr(path).lower()
        if isinstance(value, Tensor) and value.dim() and len(value) == batch and re.search("rot|freq|rope|pos|ids",
                                                                                            name):
            raise InputError(f"experts: {site.name} has a batch of {batch} samples of as many tokens, which leaves "
                             "open what its positions belong to: choose another batch size")
