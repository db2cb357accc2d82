"""DreamBooth's prior (arXiv 2208.12242): two data sets in turn."""

from typing import Any

from .base import Source, SourceDefaults


class WithPrior(SourceDefaults):
    """Images of a subject and images of its class in turn, so that each is half of every epoch.

    Even indices are the subject's and odd ones the prior's; the smaller set is repeated.
    """

    def __init__(self, instances: Source, prior: Source) -> None:
        self.parts = instances, prior
        self.pairs = max(len(instances), len(prior))

    def __len__(self) -> int:
        return 2 * self.pairs

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        part = self.parts[index % 2]
        repeat, repeats = index // 2 // len(part), -(-self.pairs // len(part))
        return part[epoch * repeats + repeat, index // 2 % len(part)]  # each repeat is cropped and mirrored anew

    def captions(self, index: int) -> list[str]:
        part = self.parts[index % 2]
        return part.captions(index // 2 % len(part))

    def describe(self, index: int) -> str:
        part = self.parts[index % 2]
        return part.describe(index // 2 % len(part))
