"""The dense model that a run learns from, and is compared with."""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from torch import nn

from ...backbones.dit import tie_embedders
from ...backbones.family import Backbone
from ...backbones.lora import Base
from ...backbones.pretrained import DTYPES, load_backbone, local_folder, meta_backbone, told_component
from ...common.config import Config
from ...common.errors import InputError
from ...experts.artefact import FILE_NAME as EXPERTS


def load_teacher(config: Config, folder: Path, backbone: Backbone, device: torch.device | str,
                 frozen: bool = False) -> tuple[Backbone | None, Any]:
    """The dense model, without gradients: `backbone` as it is now or that of `teacher.pretrained`; and its offloading
    hook or None.

    frozen: `backbone` stays as it is now, so that no copy is needed.
    """
    if config.teacher.pretrained is not None:
        place = local_folder(config.teacher.pretrained, field="teacher.pretrained")
        check_teacher(config, place, backbone)
        teacher = load_backbone(place, "teacher.pretrained", component=config.backbone.component)
        tie_embedders(teacher, "teacher.pretrained")
    elif (frozen or config.lora.rank is not None) and not _tuned(config, folder):
        return backbone, None
    elif not _tuned(config, folder):
        teacher = copy.deepcopy(backbone)
    elif config.loss.distils:  # weights that were tuned under experts make no dense model
        raise InputError(f"backbone.pretrained={config.backbone.pretrained!r} is a finished run: set "
                         "teacher.pretrained to the original model, or loss.output_kd and loss.feature_kd to 0")
    else:
        return None, None
    nn.Module.to(teacher, DTYPES[config.teacher.precision])  # past diffusers' warning of modules to keep in fp32: none
    teacher.requires_grad_(False).eval()
    if config.teacher.offload or not config.loss.distils:
        return cpu_offload_with_hook(teacher, device)
    return teacher.to(device), None


def dense_folder(config: Config) -> Path:
    """The pipeline folder of a run's dense model: of `teacher.pretrained`, or else of `backbone.pretrained`.

    Raises:
        InputError: if it is not there, or its weights were tuned under experts.
    """
    if config.teacher.pretrained is not None:
        return local_folder(config.teacher.pretrained, field="teacher.pretrained")
    folder = local_folder(str(config.backbone.pretrained), config.backbone.revision)
    if _tuned(config, folder):
        raise InputError(f"backbone.pretrained={config.backbone.pretrained!r} is a finished run, whose weights are no "
                         "dense model: name the original pipeline")
    return folder


def _tuned(config: Config, folder: Path) -> bool:
    """Whether the weights were trained under experts; adapters that are trained further are not counted."""
    file = folder / (told_component(folder, config.backbone.component) or "") / EXPERTS
    if Base.beside(str(config.backbone.pretrained)) is not None:
        return config.lora.rank is None or file.is_file()
    return file.is_file() or config.experts.pretrained == config.backbone.pretrained


def check_teacher(config: Config, folder: Path, backbone: Backbone) -> None:
    """Refuse a teacher in `folder` of another architecture than the backbone's.

    Raises:
        InputError: about teacher.pretrained.
    """
    if Base.beside(str(config.teacher.pretrained)) is not None:
        raise InputError(f"teacher.pretrained={config.teacher.pretrained!r}: holds adapters of a run alone: name the "
                         "pipeline that they belong to")
    shapes = [{name: value for name, value in model.config.items() if not name.startswith("_")}
              for model in (meta_backbone(folder, "teacher.pretrained", config.backbone.component), backbone)]
    if shapes[0] != shapes[1]:
        raise InputError(f"teacher.pretrained={config.teacher.pretrained!r}: another architecture than the backbone's: "
                         "name a pipeline of the same one")
