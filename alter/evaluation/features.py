"""Features of an image set under a network: extracted once, on all processes, and kept on disk by content."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL.Image import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..common.errors import InputError
from ..data.images import Unreadable
from .image_sets import ImageSet
from .networks import Network

MOST = 1024  # images of one file of features, the unit of going on after an interruption


class _Prepared(Dataset):
    """For loader processes: what they are handed can be pickled, and holds no weights."""

    def __init__(self, images: ImageSet, prepare: Callable[[Image], Tensor], indices: list[int]) -> None:
        self.images, self.prepare, self.indices = images, prepare, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor | None, dict[str, Any]]:
        index = self.indices[i]
        try:
            image, found = self.images.load(index)
        except Unreadable as error:
            return None, {"unreadable": f"{self.images.names[index]}: {error}"}
        return self.prepare(image), found


def extract(images: ImageSet, network: Network, cache: Path, batch_size: int, workers: int,
            state: PartialState) -> tuple[dict[str, np.ndarray], list[str]]:
    """Features float32 [N, D] by name, in the order of the images, on every process; and what was odd.

    Each process computes its share of the parts; a part that is on disk already is not computed again.

    Raises:
        InputError: naming images that cannot be read, or whose features are not finite.
    """
    key = hashlib.sha256(f"{images.digest} {network.name} {network.digest}".encode()).hexdigest()[:32]
    done, size = cache / f"{key}.safetensors", min(MOST, max(8, math.ceil(len(images) / 32)))
    parts = {first: cache / f"{key}.parts" / f"{first:09d}-{size}.safetensors" for first in range(0, len(images), size)}
    missing = None if done.is_file() else [first for first, part in parts.items() if not part.is_file()]
    missing = broadcast_object_list([missing])[0]  # as the first process sees it: another run may be at work here
    if missing is not None:
        mine = {first: parts[first] for first in missing[state.process_index :: state.num_processes]}
        _extract_parts(images, network, mine, size, batch_size, workers, state)
        state.wait_for_everyone()
        if state.is_main_process and not done.is_file():
            _merge(list(parts.values()), done, len(images))
        state.wait_for_everyone()
    tensors = load_file(done)
    counts = {key: int(value) for key, value in tensors.items() if key.startswith(("mode ", "size "))}
    features = {key: value.numpy() for key, value in tensors.items() if key not in counts}
    return features, _oddities(images, counts)


def _extract_parts(images: ImageSet, network: Network, parts: dict[int, Path], size: int, batch_size: int,
                   workers: int, state: PartialState) -> None:
    """Write the parts that begin at the keys of `parts`."""
    network.to(state.device)
    unreadable: list[str] = []
    infinite: list[str] = []
    count = sum(min(size, len(images) - first) for first in parts)
    with tqdm(total=count, unit="image", desc=f"{network.name}: {images.source.name}",
              disable=not state.is_main_process, dynamic_ncols=True) as bar:
        for first, part in parts.items():
            indices = list(range(first, min(first + size, len(images))))
            loader = DataLoader(_Prepared(images, network.prepare, indices), batch_size, num_workers=workers,
                                collate_fn=list)
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
                bad = ~torch.stack([values.isfinite().all(dim=1) for values in content.values()]).all(dim=0)
                infinite += [images.names[first + i] for i in bad.nonzero().flatten().tolist()]
                if not bad.any():
                    _write(content | {name: torch.tensor(number) for name, number in counts.items()}, part)
    unreadable, infinite = gather_object(unreadable), gather_object(infinite)
    if infinite:
        raise InputError(f"{images.source}: {network.name} gives {len(infinite)} images features that are not finite, "
                         f"first {infinite[0]}: check the weights and that image")
    if unreadable:
        shown = "; ".join(unreadable[:5]) + (" ..." if len(unreadable) > 5 else "")
        raise InputError(f"{images.source}: {len(unreadable)} images cannot be read ({shown}): mend or remove them")


def _write(content: dict[str, Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}-{os.getpid()}")
    save_file(content, partial)
    partial.replace(file)


def _merge(parts: list[Path], done: Path, count: int) -> None:
    contents = [load_file(part) for part in parts]
    names = {name for content in contents for name in content}
    merged: dict[str, Tensor] = {}
    for name in names:
        values = [content[name] for content in contents if name in content]
        merged[name] = torch.stack(values).sum() if values[0].dim() == 0 else torch.cat(values)
    assert all(len(value) == count for value in merged.values() if value.dim())
    _write(merged, done)
    for part in parts:
        part.unlink(missing_ok=True)


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
