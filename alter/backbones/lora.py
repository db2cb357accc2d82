"""Low-rank adapters (LoRA, arXiv 2106.09685) on a backbone, through peft: added, taken out alone, merged."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..common.errors import InputError

FILE_NAME = "pytorch_lora_weights.safetensors"


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


def plain_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The backbone's state under diffusers' names, without adapters (merge them first to keep their effect)."""
    return {name.replace(".base_layer.", "."): value for name, value in backbone.state_dict().items()
            if ".lora_" not in name}


def merge_adapters(backbone: nn.Module) -> None:
    """Add every adapter into the weights it adapts, in place."""
    for layer in _adapted(backbone).values():
        layer.merge()


def save_adapters(backbone: nn.Module, component: str, folder: Path) -> None:
    """Write the adapters as diffusers' `load_lora_weights` reads them, with the scale alpha / rank folded in.

    component: "unet" or "transformer", as the pipeline calls the backbone.
    """
    state = {}
    for name, layer in _adapted(backbone).items():
        (adapter,) = layer.scaling
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part)[adapter].weight.detach()
            scale = layer.scaling[adapter] if part == "lora_B" else 1.0
            state[f"{component}.{name}.{part}.weight"] = (weight * scale).cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / FILE_NAME)


def _adapted(backbone: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in backbone.named_modules() if hasattr(module, "lora_A")}
