"""Features of an image set under a network: extracted once, on all processes, and kept on disk by content."""

import hashlib
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..errors import InputError
from ..images import Unreadable
from .image_sets import ImageSet
from .networks import Network

PART = 1024  # images of one file of features, the unit of going on after an interruption


class _Prepared(Dataset):
    def __init__(self, images: ImageSet, network: Network, indices: list[int]) -> None:
        self.images, self.network, self.indices = images, network, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor | None, dict[str, Any]]:
        index = self.indices[i]
        try:
            image, found = self.images.load(index)
        except Unreadable as error:
            return None, {"unreadable": f"{self.images.names[index]}: {error}"}
        return self.network.prepare(image), found


def extract(images: ImageSet, network: Network, cache: Path, batch_size: int, workers: int,
            state: PartialState) -> tuple[dict[str, np.ndarray], list[str]]:
    """Features float32 [N, D] by name, in the order of the images, on every process; and what was odd.

    Each process computes its share of the parts; a part that is on disk already is not computed again.

    Raises:
        InputError: naming images that cannot be read, or whose features are not finite.
    """
    key = hashlib.sha256(f"{images.digest} {network.name} {network.digest}".encode()).hexdigest()[:32]
    done, parts = cache / f"{key}.safetensors", cache / f"{key}.parts"
    if not done.is_file():
        _extract_parts(images, network, parts, batch_size, workers, state)
        state.wait_for_everyone()
        if state.is_main_process:
            _merge(parts, done, len(images))
        state.wait_for_everyone()
    tensors = load_file(done)
    counts = {key: int(value) for key, value in tensors.items() if key.startswith(("mode ", "size "))}
    features = {key: value.numpy() for key, value in tensors.items() if key not in counts}
    for name, values in features.items():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise InputError(f"{images.source}: {network.name} gives {len(bad)} images features that are not finite, "
                             f"first {images.names[bad[0]]} ({name}): check the weights and that image")
    return features, _oddities(images, counts)


def _extract_parts(images: ImageSet, network: Network, parts: Path, batch_size: int, workers: int,
                   state: PartialState) -> None:
    parts.mkdir(parents=True, exist_ok=True)
    firsts = range(0, len(images), PART)[state.process_index :: state.num_processes]
    missing = [first for first in firsts if not (parts / f"{first:09d}.safetensors").is_file()]
    network.to(state.device)
    unreadable: list[str] = []
    count = sum(min(PART, len(images) - first) for first in missing)
    with tqdm(total=count, unit="image", desc=f"{network.name}: {images.source.name}",
              disable=not state.is_main_process, dynamic_ncols=True) as bar:
        for first in missing:
            indices = list(range(first, min(first + PART, len(images))))
            loader = DataLoader(_Prepared(images, network, indices), batch_size, num_workers=workers,
                                collate_fn=lambda items: items)
            rows: dict[str, list[Tensor]] = {}
            counts: Counter[str] = Counter()
            for items in loader:
                unreadable += [found["unreadable"] for _, found in items if "unreadable" in found]
                counts.update(f"{kind} {found[kind]}" for _, found in items for kind in ("mode", "size")
                              if kind in found)
                tensors = [tensor for tensor, _ in items if tensor is not None]
                if len(tensors) == len(items) and not unreadable:
                    with torch.no_grad():
                        for name, value in network.features(torch.stack(tensors).to(state.device)).items():
                            rows.setdefault(name, []).append(value.float().cpu())
                bar.update(len(items))
            if not unreadable:
                content = {name: torch.cat(values).contiguous() for name, values in rows.items()}
                content |= {name: torch.tensor(count) for name, count in counts.items()}
                partial = parts / f".{first:09d}"
                save_file(content, partial)
                partial.replace(parts / f"{first:09d}.safetensors")
    unreadable = gather_object(unreadable)
    if unreadable:
        shown = "; ".join(unreadable[:5]) + (" ..." if len(unreadable) > 5 else "")
        raise InputError(f"{images.source}: {len(unreadable)} images cannot be read ({shown}): mend or remove them")


def _merge(parts: Path, done: Path, count: int) -> None:
    contents = [load_file(parts / f"{first:09d}.safetensors") for first in range(0, count, PART)]
    names = {name for content in contents for name in content}
    merged: dict[str, Tensor] = {}
    for name in names:
        values = [content[name] for content in contents if name in content]
        merged[name] = torch.stack(values).sum() if values[0].dim() == 0 else torch.cat(values)
    partial = done.with_suffix(".partial")
    save_file(merged, partial)
    partial.replace(done)
    shutil.rmtree(parts)


def _oddities(images: ImageSet, counts: Mapping[str, int]) -> list[str]:
    """Counted: modes other than RGB, and sizes if there are several."""
    lines = [f"{images.source}: {count} images of mode {name.removeprefix('mode ')}, converted to RGB"
             for name, count in counts.items() if name.startswith("mode ") and name != "mode RGB"]
    sizes = {name.removeprefix("size "): count for name, count in counts.items() if name.startswith("size ")}
    if len(sizes) > 1:
        most = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
        lines.append(f"{images.source}: {len(sizes)} different sizes (" + ", ".join(
            f"{sizes[size]} of {size}" for size in most) + ")")
    return lines


def warn(lines: list[str]) -> None:
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
