"""Checkpoints that are complete or absent, exact resume, and the final export.

Tensors of models are safetensors; optimizer states are read with `weights_only=True`. Everything random is a
function of (seed, step), so that the step is all there is to store about it.
"""

import json
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import InputError
from .experts import FILE_NAME as EXPERTS
from .experts import TemporalExperts
from .lora import FILE_NAME as ADAPTERS
from .lora import plain_state
from .sites import PIPELINE_COMPONENT, Backbone

_PREFIX = "step-"


def save_checkpoint(folder: Path, step: int, keep: int, tensors: dict[str, dict[str, Tensor]],
                    optimizers: dict[str, Any], state: dict[str, Any], experts: TemporalExperts | None) -> Path:
    """Write `folder`/step-NNNNNN in full under another name, then rename; drop all but the newest `keep`.

    tensors: one safetensors file a name. optimizers: state dicts. state: JSON. experts: once they are frozen.
    """
    final = folder / f"{_PREFIX}{step:06d}"
    partial = folder / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, group in tensors.items():
        save_file({part: tensor.detach().contiguous() for part, tensor in group.items()},
                  partial / f"{name}.safetensors")
    torch.save(optimizers, partial / "optimizers.pt")
    if experts is not None:
        experts.save_pretrained(partial)
    (partial / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
    for file in partial.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(folder.glob(f"{_PREFIX}*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any]]:
    """What `save_checkpoint` wrote: tensors, optimizers, state."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        optimizers = torch.load(folder / "optimizers.pt", map_location="cpu", weights_only=True)
        return {file.stem: load_file(file) for file in folder.glob("*.safetensors")}, optimizers, state
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, SafetensorError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"resume: {folder} cannot be read ({reason}): name another checkpoint") from None


def find_run(resume: str, output_dir: str | None, name: str) -> tuple[Path, Path]:
    """The run directory and the checkpoint that `resume` means.

    Raises:
        InputError: if there is none.
    """
    if resume != "latest":
        checkpoint = Path(resume)
        if not (checkpoint / "state.json").is_file() or not checkpoint.name.startswith(_PREFIX):
            raise InputError(f"resume={resume!r}: not a checkpoint: use latest, or a folder step-NNNNNN")
        return checkpoint.parent.parent, checkpoint
    run = Path(output_dir) if output_dir else Path("outputs") / name / "latest"
    found = checkpoints(run / "checkpoints")
    if not found:
        raise InputError(f"resume=latest: no checkpoint in {run / 'checkpoints'}: set output_dir to the run, "
                         "or leave resume unset")
    return run.resolve(), found[-1]


def trained_parameters(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter that is trained, tied ones once."""
    return {name: value for name, value in backbone.named_parameters() if value.requires_grad}


def load_parameters(backbone: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy `values` into the trained parameters, which have the same names."""
    parameters = trained_parameters(backbone)
    if parameters.keys() != values.keys():
        raise InputError("resume: the checkpoint holds another backbone: use the configuration it was made with")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def export(folder: Path, pretrained: Path, backbone: Backbone) -> None:
    """Write a diffusers pipeline folder: `pretrained` with the backbone's weights replaced.

    backbone: tied modules are written as equal copies; adapters must have been merged.
    """
    component = PIPELINE_COMPONENT[type(backbone)]
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    replaced = {component, "README.md", EXPERTS, ADAPTERS}  # the last three, where it is a run's final/ itself
    shutil.copytree(pretrained, partial, ignore=lambda _, names: replaced.intersection(names))
    plain = type(backbone).from_config(backbone.config)
    plain.load_state_dict(plain_state(backbone))
    plain.save_pretrained(partial / component)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
