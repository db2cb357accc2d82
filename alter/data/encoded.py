"""Latents and conditioning that `alter encode` has written."""

from pathlib import Path
from pickle import UnpicklingError  # of torch.load, which runs no code
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..common.config import DataConfig
from ..common.errors import InputError
from .base import Common, Encoding, SourceDefaults, coin, draw_caption
from .images import Unreadable
from .latents import no_mirror_images, read_json

INDEX = "index.json"
COMMON = "conditioning.pt"  # a Common's fields, and the names of the rows that are lists
BUCKETS = "buckets.npy"  # the number of each sample's shape, where there are several
VERSION = 2
# Keys of a VAE's configuration by which pipelines normalise latents.
VAE_SETTINGS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "batch_norm_eps")


class EncodedShards(SourceDefaults):
    """Moments of latents and conditioning in safetensors shards, as `alter encode` writes them.

    A shard of N samples holds `moments` [N, V, 2C, ...], means and standard deviations, normalised and laid out as the
    pipeline's scheduler steps latents, of the image and, with V = 2, of its mirror image; and `labels` int64 [N], or
    `captions` int64 [N], where each sample's captions end, with the rows of all captions as `rows.NAME`: stacked, or,
    where their lengths differ, joined on the first axis with `ends.NAME` int64 [captions]; and `sizes` int64 [N, 4] as
    `load_pixels` gives them. Where images have several shapes, `bucket` int64 [N] numbers them, and `moments.B` holds
    those of bucket B alone. Moments and text states are float16, or bfloat16 where a value does not fit. Samples that
    could not be encoded keep their place.

    Version 1 has moments before scaling, and `text` float16 [captions, tokens, D] with `text_ends`.
    """

    encoded = True

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.folder, self.seed, self.flip = Path(str(config.path)), seed, config.flip
        index = read_json(self.folder / INDEX)
        try:
            self.version = index["alter_latents"]
            if self.version not in (1, VERSION):
                raise InputError(f"data.path: {self.folder / INDEX}: alter_latents={self.version!r}: this version "
                                 f"reads 1 and {VERSION}")
            self.size, self.count = int(index["shard_size"]), int(index["count"])
            self.unreadable = {int(i): str(reason) for i, reason in index["unreadable"].items()}
            self.num_classes = None if index["num_classes"] is None else int(index["num_classes"])
            encoding = _first_encoding(index) if self.version == 1 else _encoding(index)
            self.classes = {str(name): int(label) for name, label in index.get("classes", {}).items()}
            if self.size < 1 or self.count < 0:
                raise ValueError(f"shard_size={self.size}, count={self.count}")
            if self.num_classes == 0:
                self._read_common(encoding)
        except (OSError, LookupError, RuntimeError, TypeError, ValueError, AttributeError, SafetensorError,
                UnpicklingError) as error:
            raise InputError(f"data.path: {self.folder / INDEX}: {type(error).__name__}: "
                             f"{' '.join(str(error).split())[:200]}: encode again") from None
        self.encoding, self.settings = encoding, encoding.vae_settings
        if config.flip and not encoding.mirrored:
            raise no_mirror_images(config, "encode again with data.flip=true, or set false")

    def _read_common(self, encoding: Encoding) -> None:
        if self.version == 1:
            self.empty_text = load_file(self.folder / "empty_text.safetensors")["text"].float()
            return
        stored = torch.load(self.folder / COMMON, weights_only=True)
        self.listed = frozenset(stored.pop("listed"))
        self.common = [Common(shared, same, stored["dropped"])
                       for shared, same in zip(stored["shared"], stored["same"], strict=True)]
        if encoding.told["bucket_step"] is not None:
            self.buckets = np.load(self.folder / BUCKETS)
            if self.buckets.shape != (self.count,):
                raise ValueError(f"{BUCKETS} has {len(self.buckets)} of {self.count} samples")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index = key[1]
        if index in self.unreadable:
            raise Unreadable(f"was not encoded: {self.unreadable[index]}")
        try:
            with safe_open(self._file(index), framework="pt") as content:
                return self._sample(content, index % self.size, key)
        except (OSError, SafetensorError, IndexError) as error:
            raise Unreadable(f"cannot be read ({' '.join(str(error).split())[:200]})") from None

    def _sample(self, content: Any, row: int, key: tuple[int, int]) -> dict[str, Any]:
        name, place, bucket = "moments", row, {}  # type: str, int, dict[str, int]
        if self.buckets is not None:
            buckets = content.get_tensor("bucket")
            bucket = {"bucket": int(buckets[row])}
            name, place = f"moments.{buckets[row]}", int((buckets[:row] == buckets[row]).sum())
        moments = content.get_slice(name)[place][int(self.flip and coin(self.seed, *key))].float()
        if self.version == 1:
            mean, std = moments.chunk(2)
            moments = torch.cat([mean - self.settings["shift_factor"], std]) * self.settings["scaling_factor"]
        if self.num_classes != 0:
            return {"moments": moments, "labels": int(content.get_slice("labels")[row])}
        first, last = _part(content.get_tensor("text_ends" if self.version == 1 else "captions"), row)
        chosen = first + draw_caption(last - first, self.seed, *key)
        if self.version == 1:
            return {"moments": moments, "encoder_hidden_states": content.get_slice("text")[chosen].float()}
        rows = {name: self._row(content, name, chosen) for name in self.common[0].dropped}
        return {"moments": moments, "sizes": content.get_slice("sizes")[row], "conditioning": rows, **bucket}

    def _row(self, content: Any, name: str, chosen: int) -> Any:
        """[1, ...], or a list of one."""
        stored = content.get_slice(f"rows.{name}")
        if f"ends.{name}" in content.keys():
            first, last = _part(content.get_tensor(f"ends.{name}"), chosen)
            value: Tensor = stored[first:last]
        else:
            value = stored[chosen]
        value = value.float() if value.is_floating_point() else value
        return [value] if name in self.listed else value[None]

    def describe(self, index: int) -> str:
        return f"{self._file(index)} sample {index % self.size}"

    def _file(self, index: int) -> Path:
        return self.folder / shard_name(index // self.size)


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def _part(ends: Tensor, number: int) -> tuple[int, int]:
    """Where part `number` begins and ends."""
    return int(ends[number - 1]) if number else 0, int(ends[number])


def _encoding(index: dict[str, Any]) -> Encoding:
    return Encoding("alter encode", dict(index["vae_settings"]), index["vae"], dict(index["text_encoders"]),
                    index["pipeline"], int(index["resolution"]), bool(index["mirrored"]), dict(index["told"]))


def _first_encoding(index: dict[str, Any]) -> Encoding:
    """That of version 1."""
    settings = {name: float(index[name]) for name in ("scaling_factor", "shift_factor")}
    texts = {"text_encoder": index["text_encoder"]} if index["text_encoder"] else {}
    return Encoding("alter encode", settings, index["vae"], texts, None, int(index["resolution"]),
                    bool(index["mirrored"]))
