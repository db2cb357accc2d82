"""Checkpoints that are complete or absent, exact resume, and the final export.

A checkpoint is a folder of safetensors, JSON and the optimizers' state (torch.save, read with `weights_only`), with the
resolved configuration and the SHA-256 of every file. It
holds no state of a random generator: the data's order and all noise are functions of (seed, step), and torch's
generators are seeded from them when an iteration begins, so that the step is all there is to store about them.
"""

import contextlib
import hashlib
import itertools
import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError  # of torch.load, which runs no code
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..backbones.pretrained import trained_parameters
from ..common.config import Config
from ..common.errors import InputError
from ..common.files import publish, sync, write_text
from ..common.load import save_config
from ..common.version import __version__
from ..experts.artefact import TemporalExperts

CONFIG = "config.yaml"
UNWRITTEN = (OSError, SafetensorError)  # what a full disk raises
_CHECKSUMS = "checksums.json"
_OPTIMIZERS = "optimizers.pt"
_PARTIAL = ".partial-"
_PREFIX = "step-"


def save_checkpoint(folder: Path, step: int, config: Config, tensors: dict[str, dict[str, Tensor]],
                    optimizers: dict[str, Any], state: dict[str, Any], experts: TemporalExperts | None) -> Path:
    """Write `folder`/step-NNNNNN in full under another name, then rename; drop all but the newest `checkpoint.keep`.

    tensors: one safetensors file per name. optimizers: state dicts. state: JSON. experts: once they are frozen.

    Raises:
        OSError, SafetensorError: if it could not be written; no trace of it is left, and nothing was dropped.
    """
    folder.mkdir(exist_ok=True)
    sync(folder.parent)
    for left in folder.glob(f"{_PARTIAL}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    final = folder / f"{_PREFIX}{step:06d}"
    partial = folder / f"{_PARTIAL}{final.name}"
    versions = {"alter": __version__, "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "diffusers", "accelerate")}}
    try:
        partial.mkdir()
        for name, group in tensors.items():
            save_file(_storable(group), partial / f"{name}.safetensors")
        try:
            torch.save(optimizers, partial / _OPTIMIZERS)
        except RuntimeError as error:  # so torch reports a full disk
            raise OSError(str(error)) from error
        write_text(partial / "state.json", json.dumps({"step": step, **state, "versions": versions}))
        save_config(config, partial / CONFIG)
        if experts is not None:
            experts.save_pretrained(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        checksums = {str(file.relative_to(partial)): _sha256(file) for file in files}
        write_text(partial / _CHECKSUMS, json.dumps(checksums, indent=1))
        publish(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):  # the new one is there; what is left over goes with the next
        for old in checkpoints(folder)[: -config.checkpoint.keep]:
            shutil.rmtree(old.rename(folder / f"{_PARTIAL}{old.name}"), ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted((path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()),
                  key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def set_aside(checkpoint: Path, why: str) -> Path:
    """Rename to `why`-step-NNNNNN-K, which is kept but never taken for the latest; returns the new path."""
    names = (checkpoint.with_name(f"{why}-{checkpoint.name}-{number}") for number in itertools.count(1))
    return checkpoint.rename(next(path for path in names if not path.exists()))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, every byte of which is read; None if it is as it was written."""
    try:
        checksums = json.loads((checkpoint / _CHECKSUMS).read_text(encoding="utf-8"))
        return next((f"{name} is not as it was written" for name, written in checksums.items()
                     if _sha256(checkpoint / name) != written), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, AttributeError):
        return f"{_CHECKSUMS} is not as it was written"


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any]]:
    """What `save_checkpoint` wrote: tensors, optimizers, state."""
    state = load_state(folder)
    with _reading(folder):
        tensors = {file.stem: load_file(file) for file in folder.glob("*.safetensors")}
        return tensors, torch.load(folder / _OPTIMIZERS, map_location="cpu", weights_only=True), state


def load_state(folder: Path) -> dict[str, Any]:
    """The state alone."""
    with _reading(folder):
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"resume: {folder} cannot be read ({reason}): name another checkpoint") from None


def _storable(group: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors takes them."""
    own: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, tensor in group.items():
        tensor = tensor.detach().contiguous()
        own[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in used else tensor
        used.add(tensor.untyped_storage().data_ptr())
    return own


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def load_parameters(backbone: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy `values` into the trained parameters, which have the same names."""
    parameters = trained_parameters(backbone)
    if parameters.keys() != values.keys():
        raise InputError("resume: the checkpoint holds another backbone: use the configuration it was made with")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


