"""Latents in the layouts of fast-DiT and REPA, and the hashes by which encoded data know their models."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.config import DataConfig
from ..common.errors import InputError
from .base import Encoding, SourceDefaults, coin, is_inside, read_label
from .images import Unreadable

_REPA = 0.18215  # the factor of the VAE that REPA's preprocessing uses


class FastDiT(SourceDefaults):
    """Latents in fast-DiT's layout: <path>/*_features/N.npy, <path>/*_labels/N.npy.

    Features are [1, C, h, w] or [variants, C, h, w], already multiplied by the VAE's scaling factor; with
    several variants (the image and its mirror) `flip` draws one of the first two, else the first is used. For a model
    conditioned on text, <path>/*_text/N.npy holds the text encoder's states [tokens, D] in place of labels,
    and <path>/empty_text.npy those of the empty prompt, which dropped prompts become.
    """

    encoded = True
    num_classes = None

    def __init__(self, config: DataConfig, seed: int) -> None:
        folder = Path(str(config.path))
        features, texts = sorted(folder.glob("*_features")), sorted(folder.glob("*_text"))
        conditions = texts or sorted(folder.glob("*_labels"))
        if len(features) != 1 or len(conditions) != 1:
            raise InputError(f"data.path={config.path!r}: expected index.json (`alter encode`), dataset.json "
                             "(REPA), or one *_features folder and one *_labels or *_text folder (fast-DiT)")
        self.files = sorted(features[0].glob("*.npy"), key=lambda file: (len(file.stem), file.stem))
        if not self.files:
            raise InputError(f"data.path={config.path!r}: no .npy files in {features[0].name}")
        self.conditions, self.flip, self.seed = conditions[0], config.flip, seed
        if texts:
            self.num_classes = 0
            try:
                self.empty_text = _load_npy(folder / "empty_text.npy").float()
            except Unreadable as error:
                raise InputError(f"data.path: {folder / 'empty_text.npy'} {error}: dropped prompts need it") from None
        with contextlib.suppress(Unreadable):
            if self.flip and len(_variants(self.files[0])) < 2:
                raise no_mirror_images(config, "set false")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        file = self.files[key[1]]
        variants = _variants(file)
        if self.flip and len(variants) < 2:
            raise Unreadable("no mirror image, which data.flip=true needs")
        latents = variants[int(self.flip and coin(self.seed, *key))]
        condition = _load_npy(self.conditions / file.name)
        if self.empty_text is not None:
            return {"latents": latents, "encoder_hidden_states": condition.float()}
        if condition.numel() != 1:
            raise Unreadable(f"label of shape {tuple(condition.shape)}: expected one whole number")
        return {"latents": latents, "labels": read_label(condition.item(), self.conditions.name)}

    def describe(self, index: int) -> str:
        return str(self.files[index])


class Repa(SourceDefaults):
    """Moments as REPA's preprocessing writes them: dataset.json with "labels", a list of [file, class], and files
    [2C, h, w] of means and standard deviations before scaling. `data.path` is that folder or the one above vae-sd/."""

    encoded = True
    encoding: Encoding | None = Encoding("REPA", {"scaling_factor": _REPA, "shift_factor": 0.0})

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.folder = repa_folder(Path(str(config.path)))
        labels: Any = read_json(self.folder / "dataset.json").get("labels")
        try:
            self.samples = [(str(file), read_label(label, str(file))) for file, label in labels]
            if not all(is_inside(file) for file, _ in self.samples):
                raise ValueError
        except (TypeError, ValueError, Unreadable):
            raise InputError(f"data.path: {self.folder / 'dataset.json'}: expected \"labels\", a list of "
                             "[file in the folder, class]") from None
        if config.flip:
            raise no_mirror_images(config, "set false")
        self.num_classes = 1 + max((label for _, label in self.samples), default=-1)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        file, label = self.samples[key[1]]
        return {"moments": _load_npy(self.folder / file).float() * _REPA, "labels": label}

    def describe(self, index: int) -> str:
        return str(self.folder / self.samples[index][0])


def repa_folder(path: Path) -> Path:
    """The folder in which REPA's dataset.json would be: `path`, or vae-sd/ in it."""
    return path / "vae-sd" if (path / "vae-sd").is_dir() else path


def weights_hash(folder: Path) -> str | None:
    """sha256 of a model folder's safetensors, not counting variants such as *.fp16.safetensors; None without any."""
    files = sorted(file for file in folder.glob("*.safetensors") if file.name.count(".") == 1)
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() if files else None


def text_hashes(folder: Path) -> dict[str, str | None]:
    """`weights_hash` of a pipeline's text encoders, by name."""
    return {path.name: weights_hash(path) for path in sorted(folder.glob("text_encoder*"))}


def no_mirror_images(config: DataConfig, remedy: str) -> InputError:
    return InputError(f"data.flip=true: data.path={config.path!r} holds no mirror images: {remedy}")


def _variants(file: Path) -> Tensor:
    """float32 [variants, C, h, w] of a file of fast-DiT's features."""
    variants = _load_npy(file).float()
    if variants.dim() == 3:
        variants = variants[None]
    if variants.dim() != 4 or not len(variants):
        raise Unreadable(f"latents of shape {tuple(variants.shape)}: expected [C, h, w] or [variants, C, h, w]")
    return variants


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"data.path: {file} cannot be read ({error}): encode again") from None
    if not isinstance(content, dict):
        raise InputError(f"data.path: {file}: expected a JSON object")
    return content


def _load_npy(file: Path) -> Tensor:
    try:
        values = torch.from_numpy(np.load(file, allow_pickle=False))
        if values.is_complex():
            raise ValueError("complex numbers")
        return values
    except (OSError, ValueError, TypeError, EOFError, MemoryError) as error:
        raise Unreadable(f"cannot be read ({' '.join(str(error).split())[:200]})") from None
