"""The prunable layers ("sites") of a diffusers backbone, and what each gives when it is skipped.

Transformers: every block of the model's own lists that returns what it was given, changed; a skipped one returns it
unchanged. Which arguments these are is read in the block's return statement.

UNet, as in ALTER's paper (arXiv 2505.21817): every transformer block, and every resnet whose *hidden* input has as many
channels as its output. A down or mid resnet's hidden input is its input; an up-block resnet receives the concatenation
of the hidden state and a skip feature, hidden state first, so its bypass is the first channels of its input and
skipping it drops the skip feature.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..common.errors import InputError
from .family import backbone_class, family_of, parameters

_LISTS = ("blocks", "layers", "refiner")  # how the names of a transformer's lists of blocks end
# Blocks whose return statement names no arguments.
_STREAMS = {"Cosmos3VLTextMoTDecoderLayer": ("und_seq", "gen_seq")}


@dataclass(frozen=True)
class Site:
    """One prunable layer ("site"), and what its output is when it is skipped.

    Attributes:
        name: its module path.
        channels: C of its output [B, C, H, W], for a UNet's resnet; None for a layer of tokens.
        streams: name and place of the arguments that it returns, in this order; several are returned as a tuple.
        batched: the batch is on their first axis, so that the layer can run on some samples alone.
        arguments: the names of all that it takes.
    """

    name: str
    channels: int | None
    streams: tuple[tuple[str, int], ...] = (("hidden_states", 0),)
    batched: bool = True
    arguments: tuple[str, ...] = ()

    def bypass(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """x_in of every stream, the layer's output when it is skipped; of a resnet its first channels."""
        given = tuple(kwargs[name] if name in kwargs else args[place] for name, place in self.streams)
        return given if self.channels is None else (given[0][:, : self.channels],)

    def pack(self, outputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """The streams as the layer returns them."""
        return outputs if len(self.streams) > 1 else outputs[0]

    def unpack(self, output: Any) -> tuple[Tensor, ...]:
        """The streams of what the layer returned."""
        return output if len(self.streams) > 1 else (output,)

    def image(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """The stream that becomes the image."""
        names = [name for name, _ in self.streams]
        return outputs[names.index("hidden_states") if "hidden_states" in names else -1]


class Removed(nn.Module):
    """Stands in a site whose layer was taken out of memory; it is still a site, which no expert may run.

    It keeps the layer's plain settings, which some models read in their blocks.
    """

    def __init__(self, site: Site, layer: nn.Module) -> None:
        super().__init__()
        self.site = site
        for name, value in vars(layer).items():
            if not name.startswith("_") and isinstance(value, int | float | str):
                setattr(self, name, value)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise InputError("experts: this backbone was trimmed and has no dense form: apply its experts first")


def find_sites(backbone: nn.Module, field: str = "backbone.pretrained") -> tuple[Site, ...]:
    """The sites of `backbone`, in the order of its modules.

    Raises:
        InputError: about `field`, if it has no prunable layer.
    """
    is_unet = "UNet" in backbone_class(backbone).__name__
    sites = [] if is_unet else _block_sites(backbone)
    if isinstance(backbone, UNet2DConditionModel):
        sites = _unet_sites(backbone)
    if not sites:
        raise InputError(f"{field}: this {type(backbone).__name__} has no layers known to be prunable (a transformer's "
                         "blocks that return what they were given, changed): use another backbone")
    return tuple(sites)


def named_sites(backbone: nn.Module, names: Sequence[str], field: str = "experts") -> tuple[Site, ...]:
    """The sites of `backbone`, which must have these names.

    Raises:
        InputError: about `field`, if they have not.
    """
    sites = find_sites(backbone)
    if tuple(site.name for site in sites) != tuple(names):
        raise InputError(f"{field}: their {len(names)} sites are not the {len(sites)} of this "
                         f"{type(backbone).__name__} (they begin with {names[0] if names else None!r}): use the "
                         "backbone that they were trained on")
    return sites


def remove_layer(backbone: nn.Module, site: Site) -> None:
    """Take the site's layer out of `backbone`, in place, except for what others read in it."""
    layer: Any = backbone.get_submodule(site.name)
    removed: Any = Removed(site, layer)
    if site.name == "transformer_blocks.0" and isinstance(backbone, DiTTransformer2DModel):
        removed.norm1 = nn.Module()  # the output head embeds the timestep with the first block's embedder
        removed.norm1.emb = layer.norm1.emb
    parent, _, child = site.name.rpartition(".")
    setattr(backbone.get_submodule(parent), child, removed)


def feature_points(backbone: nn.Module) -> tuple[str, ...]:
    """Modules whose outputs L_featKD compares. UNet: each down, mid and up block. Transformer: the middle block."""
    if not isinstance(backbone, UNet2DConditionModel):
        sites = find_sites(backbone)
        return (sites[len(sites) // 2].name,)
    down = [f"down_blocks.{i}" for i in range(len(backbone.down_blocks))]
    up = [f"up_blocks.{i}" for i in range(len(backbone.up_blocks))]
    return (*down, *(["mid_block"] if backbone.mid_block is not None else []), *up)


def _block_sites(backbone: nn.Module) -> list[Site]:
    """The blocks of a diffusers transformer."""
    sites, batched = [], family_of(backbone).batched
    for name, blocks in backbone.named_children():
        if isinstance(blocks, nn.ModuleList) and name.endswith(_LISTS):
            for index, block in enumerate(blocks):
                path = f"{name}.{index}"
                if [child for child, _ in block.named_children()] == ["block"]:  # a wrapper, as in HiDream
                    path, block = f"{path}.block", block.get_submodule("block")
                if isinstance(block, Removed):
                    sites.append(block.site)
                elif streams := _streams(backbone_class(block)):
                    sites.append(Site(path, None, streams, batched, parameters(backbone_class(block))))
    return sites


@functools.cache
def _streams(cls: Any) -> tuple[tuple[str, int], ...]:
    """Name and place of the arguments that a block returns, changed, by its last return statement; () if of others.

    What is returned alone under another name is the first argument.
    """
    places = parameters(cls)
    names = _STREAMS.get(cls.__name__) or _returned(cls) or places[:1]
    return tuple((name, places.index(name)) for name in names) if set(names) <= set(places) else ()


def _returned(cls: Any) -> tuple[str, ...]:
    """What the last return statement of a class's forward names, if it returns a tuple."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    last = max((node for node in ast.walk(tree) if isinstance(node, ast.Return)), key=lambda node: node.lineno)
    return tuple(map(ast.unparse, last.value.elts)) if isinstance(last.value, ast.Tuple) else ()


def _unet_sites(unet: UNet2DConditionModel) -> list[Site]:
    hidden_channels = _hidden_channels(unet)
    sites = []
    for path, module in unet.named_modules():
        if isinstance(module, Removed):
            sites.append(module.site)
        elif isinstance(module, BasicTransformerBlock):
            sites.append(Site(path, None))
        elif isinstance(module, ResnetBlock2D) and not (module.up or module.down):
            if hidden_channels.get(path) == module.out_channels:
                sites.append(Site(path, module.out_channels, (("input_tensor", 0),)))
    return sites


def _hidden_channels(unet: UNet2DConditionModel) -> dict[str, int]:
    """Channels of the hidden state that enters each resnet, without concatenated skip features."""
    hidden = {}
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D) and not name.startswith("up_blocks."):
            hidden[name] = module.in_channels
    channels = unet.config.block_out_channels[-1]
    for i, block in enumerate(unet.up_blocks):
        for j, resnet in enumerate(block.resnets):
            hidden[f"up_blocks.{i}.resnets.{j}"] = channels
            channels = resnet.out_channels
    return hidden
