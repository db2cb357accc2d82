"""Low-rank adapters (LoRA, arXiv 2106.09685) on a backbone, through peft: added, read, written, merged; and the record
of the pipeline that they belong to."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..common.errors import InputError
from ..common.files import publish, write_text

FILE_NAME = "pytorch_lora_weights.safetensors"
BASE = "base.json"
_PARTS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Base:
    """The pipeline that adapters belong to, as base.json beside them says.

    Attributes:
        pretrained: absolute path of a folder, or a hub id. revision: of a hub id.
        component: what the pipeline calls the backbone.
        arguments: further ones of diffusers' `from_pretrained`.
    """

    pretrained: str
    revision: str | None
    component: str
    arguments: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> "Base":
        """Raises InputError if the file is none."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} cannot be read ({type(error).__name__}: {error}): fetch it again") from None

    @classmethod
    def beside(cls, folder: str | Path) -> "Base | None":
        """Of the adapters in a folder; None where it holds none, or merged weights."""
        return cls.read(Path(folder) / BASE) if (Path(folder) / BASE).is_file() else None

    def place(self, source: str | Path) -> str:
        """Its folder or hub id.

        Raises:
            InputError: naming `source`, where the adapters are, if the folder is not there.
        """
        if Path(self.pretrained).is_absolute() and not Path(self.pretrained).is_dir():
            raise InputError(f"{source}: its base pipeline {self.pretrained} is not there: give "
                             f"load_pipeline(..., base=FOLDER), or write its new place into {BASE}")
        return self.pretrained


def add_adapters(backbone: nn.Module, rank: int, alpha: int | None, targets: tuple[str, ...]) -> None:
    """Add adapters to the linear layers that `targets` names; only they are trainable afterwards.

    Args:
        rank: >= 1. alpha: the adapters' scale is alpha / rank; None: alpha = rank.

    Raises:
        InputError: if no layer has such a name.
    """
    from peft import LoraConfig, inject_adapter_in_model  # optional

    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets), init_lora_weights=True)
    try:
        inject_adapter_in_model(config, backbone)
    except ValueError as error:
        raise InputError(f"lora.targets={list(targets)}: {' '.join(str(error).split())[:200]}") from None
    for layer in _adapted(backbone).values():  # in whatever precision the weights are
        for part in _PARTS:
            getattr(layer, part).float()


@contextmanager
def without_adapters(backbone: nn.Module) -> Iterator[None]:
    """The weights as they were before training, for forwards inside the block.

    peft's own switch would also take the adapters' gradients away, which wrappers of parallel training watch.
    """
    layers = list(_adapted(backbone).values())
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merge_adapters(backbone: nn.Module) -> None:
    """Add every adapter into the weights that it adapts, and take it out; every weight can be trained then."""
    for name, layer in _adapted(backbone).items():
        layer.merge()
        backbone.set_submodule(name, layer.get_base_layer())
    backbone.requires_grad_(True)


def adapter_state(backbone: nn.Module, component: str) -> dict[str, Tensor]:
    """The adapters as diffusers' `load_lora_weights` reads them, with the scale alpha / rank folded in.

    component: as the pipeline calls the backbone.
    """
    state, prefix = {}, _prefix(component)
    for name, layer in _adapted(backbone).items():
        (adapter,) = layer.scaling
        for part in _PARTS:
            weight = getattr(layer, part)[adapter].weight.detach()
            scale = layer.scaling[adapter] if part == "lora_B" else 1.0
            state[f"{prefix}.{name}.{part}.weight"] = (weight * scale).cpu().contiguous()
    return state


def load_adapters(backbone: nn.Module, state: dict[str, Tensor], component: str) -> None:
    """Set the adapters of a backbone that has some to an `adapter_state`.

    Raises:
        InputError: about lora.rank and lora.targets, if it is one of other adapters.
    """
    own = adapter_state(backbone, component)
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in state.items()}:
        rank = next((len(value) for name, value in state.items() if name.endswith("lora_A.weight")), None)
        raise InputError(f"lora.rank, lora.targets: they give {len(own) // 2} adapters, and backbone.pretrained holds "
                         f"{len(state) // 2} others, of rank {rank}: set both as in the run that trained those")
    for name, layer in _adapted(backbone).items():
        (adapter,) = layer.scaling
        for part in _PARTS:
            scale = layer.scaling[adapter] if part == "lora_B" else 1.0
            weight = getattr(layer, part)[adapter].weight
            with torch.no_grad():
                weight.copy_(state[f"{_prefix(component)}.{name}.{part}.weight"] / scale)


def put_adapters(backbone: nn.Module, state: dict[str, Tensor], component: str) -> None:
    """Add the adapters of an `adapter_state` to a backbone without any."""
    from peft import LoraConfig, inject_adapter_in_model

    own = {name.removeprefix(f"{_prefix(component)}."): value for name, value in state.items()}
    ranks = {name.removesuffix(".lora_A.weight"): len(value) for name, value in own.items() if ".lora_A." in name}
    rank = max(ranks.values())
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(ranks))
    inject_adapter_in_model(config, backbone, state_dict=own)
    load_adapters(backbone, state, component)


def export_adapters(folder: Path, state: dict[str, Tensor], base: Base) -> None:
    """Write an `adapter_state` and what it belongs to; `folder` is replaced if it exists."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(state, partial / FILE_NAME, {"format": "pt"})
    write_text(partial / BASE, json.dumps(dataclasses.asdict(base), indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    publish(partial, folder)


def _prefix(component: str) -> str:
    """Of the names of adapters: the loaders of diffusers know one for both of two transformers."""
    return component.removesuffix("_2")


def _adapted(backbone: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in backbone.named_modules() if hasattr(module, "lora_A")}
