"""A pretend GPU, "gpu:0": tensors that hold real values in main memory but meet no tensor of the CPU, as on a GPU, and
a count of what makes the host wait for the device.

Importing this module registers the device with torch for the whole process: import it in a process of its own.
"""

import collections
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import alter

aten = torch.ops.aten
_PACKAGE = f"{Path(alter.__file__).parent}/"
# Their results have a size that depends on values, so that a GPU's host waits for it (bincount: for the maximum).
_SIZED_BY_VALUES = (aten.nonzero, aten.masked_select, aten.bincount, aten._unique2, aten.unique_dim, aten.equal)
_INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._unsafe_index_put)


class _Module:
    """What torch asks of a device's module."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("gpu", _Module())
DEVICE = torch.device("gpu:0")


class Waits:
    """What made the host wait, as "file:line" of the package → how often.

    Attributes:
        reads: copies to the host, and operations that need a value there.
        uploads: copies from the host that are not asynchronous: asked to block, or from memory that is not pinned.
    """

    def __init__(self) -> None:
        self.reads: collections.Counter[str] = collections.Counter()
        self.uploads: collections.Counter[str] = collections.Counter()

    def __sub__(self, earlier: "Waits") -> "Waits":
        since = Waits()
        since.reads, since.uploads = self.reads - earlier.reads, self.uploads - earlier.uploads
        return since

    def copy(self) -> "Waits":
        return self - Waits()


WAITS = Waits()
_pinned: dict[int, torch.Tensor] = {}  # by the address of their storage; kept, so that no address is used twice


def _asker() -> str:
    """The innermost line of the package on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            return f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside the package"


def _uploaded(source: torch.Tensor, non_blocking: bool) -> None:
    if not (non_blocking and source.untyped_storage().data_ptr() in _pinned):
        WAITS.uploads[_asker()] += 1


class Pretend(torch.Tensor):
    """A tensor on the pretend device; `inner` holds its values."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Pretend":
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as a tensor of the host, as files are read."""
        return self.detach().inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet, there, here = function.overloadpacket, {}, []

        def unwrapped(value: Any) -> Any:
            if isinstance(value, Pretend):
                there[id(value.inner)] = value
                return value.inner
            if isinstance(value, torch.Tensor):
                here.append(value)
            return type(value)(map(unwrapped, value)) if type(value) in (list, tuple) else value

        def wrapped(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return there[id(value)] if id(value) in there else Pretend(value)
            return type(value)(map(wrapped, value)) if type(value) in (list, tuple) else value

        inner, options = unwrapped(args), {name: unwrapped(value) for name, value in kwargs.items()}
        to_host = _type(kwargs.get("device")) == "cpu"
        if packet is aten._to_copy and here:
            _uploaded(here[0], kwargs.get("non_blocking", False))
        elif packet in (aten.copy_, aten._foreach_copy_) and here:
            to_host = not isinstance(args[0] if packet is aten.copy_ else args[0][0], Pretend)
            if not to_host:
                _uploaded(here[0], len(args) > 2 and args[2])
        elif packet in _INDEXING and isinstance(args[0], Pretend):
            indices = [index for index in args[1] if index is not None]
            WAITS.reads.update(_asker() for index in indices if index.dtype is torch.bool)
            for index in here:  # torch puts indices on the device; of values it takes a scalar
                if index.dim() and not any(index is known for known in indices):
                    raise _mixed(function)
                _uploaded(index, False)
        elif any(tensor.dim() for tensor in here):
            raise _mixed(function)
        if packet is aten._local_scalar_dense or packet in _SIZED_BY_VALUES or to_host and there:
            WAITS.reads[_asker()] += 1
        if options.get("device") is not None:
            options["device"] = torch.device("cpu")
        result = function(*inner, **options)
        return result if to_host else wrapped(result)


def _type(device: Any) -> str | None:
    return None if device is None else torch.device(device).type


def _mixed(function: Any) -> RuntimeError:
    return RuntimeError(f"{function}: tensors of two devices, at {_asker()}")


class _Creation(TorchDispatchMode):
    """Sends to the device what names it, and pins pretended memory."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = function.overloadpacket
        if packet is aten.is_pinned:
            return args[0].untyped_storage().data_ptr() in _pinned
        if packet is aten._pin_memory:
            copy = args[0].clone()
            _pinned[copy.untyped_storage().data_ptr()] = copy
            return copy
        if Pretend in types or kwargs and _type(kwargs.get("device")) == "gpu":
            return Pretend.__torch_dispatch__(function, types, args, kwargs)
        return function(*args, **kwargs)


class _Lists(TorchFunctionMode):
    """Lists of numbers to tensors of the device and back, where torch asks no class but its own."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.tolist and isinstance(args[0], Pretend):
            return args[0].cpu().tolist()
        if function in (torch.tensor, torch.as_tensor) and _type(kwargs.get("device")) == "gpu":
            return function(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        return function(*args, **kwargs)


@contextlib.contextmanager
def pretend_device() -> Iterator[Waits]:
    """Tensors may be put on DEVICE inside; yields the count of waits."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with _Creation(), _Lists():
        yield WAITS
