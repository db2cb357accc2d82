"""A DiT's timestep and label, embedded once a forward instead of once a block.

Every diffusers block has its own copy of one and the same embedder. While the copies are equal, the first block's
result serves all others, to the bit.
"""

import functools
import operator
from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from .sites import embedders, embedding_blocks

_version = operator.attrgetter("_version")
_PLAIN = (nn.Linear, nn.Embedding, nn.SiLU, Timesteps)  # no adapter, no quantised layer


class SharedEmbedding:
    """Lets the embedders of `backbone` share their result, until `remove`; does nothing to a UNet.

    Weights that are changed, replaced or given adapters later end the sharing: `begin`, which every forward must
    call first, notices it by their versions (which writes through `.data` do not change). Nothing is shared in training
    mode, where blocks may drop different labels, or while gradients are recorded, which belong to every copy.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.embedders = embedders(backbone)
        self.arguments: tuple[Any, ...] | None = None
        self.result: Tensor | None = None
        if not _are_equal(self.embedders):
            self.embedders = []
        # The output layer uses the first block's, whether that block runs or not.
        users = [backbone, *embedding_blocks(backbone)[1:]]
        self._copies = [(user, _Copy(own)) for user, own in zip(users, self.embedders, strict=False)]
        for embedder in self.embedders:
            embedder._alter_shared = self
            embedder.__class__ = _sharing(embedder.__class__)

    def begin(self) -> None:
        """Forget the last forward's embedding. Copies in blocks that the simulator has settled to skip may differ."""
        self.arguments = self.result = None
        for user, copy in self._copies:
            if vars(user).get("_alter_settled") is not False and not copy.is_unchanged():
                self.remove()
                break

    def remove(self) -> None:
        """Let every block embed for itself again."""
        for embedder in self.embedders:
            embedder.__class__ = type(embedder).__mro__[1]
            del embedder._alter_shared
        self.embedders, self._copies = [], []


class _Copy:
    """What an embedder was made of."""

    def __init__(self, embedder: nn.Module) -> None:
        modules = list(embedder.modules())
        self.entries = [entries for module in modules for entries in (module._modules, module._parameters) if entries]
        self.kept = [dict(entries) for entries in self.entries]
        self.weights = list(embedder.parameters())
        self.versions = [*map(_version, self.weights)]

    def is_unchanged(self) -> bool:
        try:  # by identity, in one call, since a compiled step of a small model takes less than a millisecond
            return self.entries == self.kept and [*map(_version, self.weights)] == self.versions
        except RuntimeError:  # a weight has been replaced, and where two tensors are equal is not one answer
            return False


def _are_equal(copies: list[Any]) -> bool:
    leaves = [[leaf for leaf in copy.modules() if not any(leaf.children())] for copy in copies]
    if not all(type(leaf) in _PLAIN for own in leaves for leaf in own):
        return False
    weights = [list(copy.parameters()) for copy in copies]
    places = {weight.device for own in weights for weight in own}
    if len(places) != 1 or any(weight.is_meta or weight.is_inference() for own in weights for weight in own):
        return False  # offloaded or spread over devices, or made without versions
    return all(torch.equal(first, weight) for own in weights[1:] for first, weight in zip(weights[0], own, strict=True))


@functools.cache
def _sharing(cls: Any) -> Any:
    def call(self: Any, *arguments: Any, **kwargs: Any) -> Tensor:
        shared: SharedEmbedding = self._alter_shared
        asked = (*arguments, *kwargs.values())
        known = shared.arguments
        if self.training or torch.is_grad_enabled():
            return super(sharing, self).__call__(*arguments, **kwargs)
        if known is None or len(known) != len(asked) or any(a is not b for a, b in zip(known, asked, strict=True)):
            shared.result = super(sharing, self).__call__(*arguments, **kwargs)
            shared.arguments = asked
        assert shared.result is not None
        return shared.result

    sharing: Any = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
    return sharing
