"""Encodes images to the moments of their latents, and captions to text states, in shards that `EncodedShards` reads."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..backbones.pretrained import DTYPES, condition_of, load_vae, local_folder, set_tf32
from ..backbones.text import TextEncoder
from ..common.config import Config
from ..common.errors import InputError
from ..common.files import sync, write_text
from ..common.process import on_main_process
from .images import Unreadable
from .open import INDEX, Source, open_source, shard_name, weights_hash

_PLAN = "encoding.json"  # until the index is there
_DATA = ("source", "path", "split", "stream", "image_column", "caption_column", "label_column", "prompt", "prior_path",
         "prior_prompt")


def encode(config: Config, out: Path, shard_size: int, batch_size: int, state: PartialState) -> dict[str, Any]:
    """Encode a configuration's images (and captions) into the folder `out`, on all processes.

    Shards that exist already are kept. VAE and text encoder run in the precision of training, so that what is stored,
    as float16, is what training would have computed.

    Args:
        shard_size: samples per file. batch_size: images per forward of the VAE.

    Returns: the content of index.json.

    Raises:
        InputError: if there is nothing to encode, `out` was begun with other settings, or too many samples are
            unusable.
    """
    folder = local_folder(str(config.backbone.pretrained), config.backbone.revision)
    source = _images(config, folder)
    dtype = DTYPES[config.train.mixed_precision]
    set_tf32(config.train.tf32)
    vae = load_vae(folder, state.device, dtype)
    text = TextEncoder(folder, state.device, dtype) if source.num_classes == 0 else None
    plan = {
        "alter_latents": 1, "model": config.backbone.pretrained, "vae": weights_hash(folder / "vae"),
        "scaling_factor": vae.config.scaling_factor, "shift_factor": getattr(vae.config, "shift_factor", None) or 0.0,
        "text_encoder": weights_hash(folder / "text_encoder") if text else None,
        "resolution": config.data.resolution, "crop": config.data.crop, "mirrored": config.data.flip,
        "precision": config.train.mixed_precision, "num_classes": source.num_classes, "count": len(source),
        "shard_size": shard_size, "data": {name: getattr(config.data, name) for name in _DATA},
    }
    missing, unusable = on_main_process(lambda: _begin(out, plan))
    if text is not None and state.is_main_process:
        _save(out / "empty_text.safetensors", {"text": text([""])[0].half()})

    mine = missing[state.process_index :: state.num_processes]
    shards = [range(number * shard_size, min((number + 1) * shard_size, len(source))) for number in mine]
    batches = [list(rows[first : first + batch_size]) for rows in shards for first in range(0, len(rows), batch_size)]
    loaded = iter(DataLoader(_Whole(source), batch_sampler=batches, num_workers=config.data.workers,  # type: ignore
                             collate_fn=list))
    encoded = (sample for raw in loaded for sample in _encode(raw, vae, text, config.data.flip))
    with tqdm(total=sum(map(len, shards)), unit="image", disable=not state.is_main_process, dynamic_ncols=True) as bar:
        for number, rows in zip(mine, shards, strict=True):
            samples = []
            for _ in rows:
                samples.append(next(encoded))
                bar.update()
            reasons = {row: sample["reason"] for row, sample in zip(rows, samples, strict=True) if "reason" in sample}
            _save(out / shard_name(number), _join(samples), {"unreadable": json.dumps(reasons)})
            unusable += len(reasons)
            if reasons:
                _bound(unusable, config, len(source), list(reasons.values())[-1])
    state.wait_for_everyone()
    unreadable = _unreadable(out, range(-(-len(source) // shard_size)))
    if unreadable:
        _bound(len(unreadable), config, len(source), list(unreadable.values())[-1])
    index = {**plan, "classes": source.classes, "unreadable": unreadable}
    if state.is_main_process:
        write_text(out / INDEX, json.dumps(index, indent=1) + "\n")
        (out / _PLAN).unlink(missing_ok=True)
    state.wait_for_everyone()
    return index


def _bound(unusable: int, config: Config, count: int, example: str) -> None:
    if unusable > config.data.max_unreadable * count:
        raise InputError(f"data.max_unreadable={config.data.max_unreadable}: at least {unusable} of {count} samples "
                         f"cannot be encoded, one is {example}: mend the data and choose another folder, or allow more")


def _images(config: Config, folder: Path) -> Source:
    """The configured data set, without mirroring, with the condition of the backbone in `folder`."""
    data = config.data
    if data.crop == "random":
        raise InputError("data.crop='random': one crop of each image is stored: set data.crop=center")
    source = open_source(dataclasses.replace(config, data=dataclasses.replace(data, flip=False)), condition_of(folder))
    if source.encoded:
        raise InputError(f"data.source={data.source!r} gives latents already: name images")
    return source


def _begin(out: Path, plan: dict[str, Any]) -> tuple[list[int], int]:
    """The numbers of the shards to be made, and how many samples of the others are unusable; creates or continues
    `out`."""
    for file in (out / _PLAN, out / INDEX):
        if file.is_file():
            before = json.loads(file.read_bytes())
            for name, value in plan.items():
                if before.get(name) != value:
                    raise InputError(f"--out {out}: was encoded with {name}={before.get(name)!r}, not {value!r}: "
                                     "choose another folder")
            break
    else:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out {out}: is not empty: choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / _PLAN, json.dumps(plan, indent=1) + "\n")
    missing, unusable = [], 0
    for shard in range(-(-plan["count"] // plan["shard_size"])):
        try:
            unusable += len(_unreadable(out, [shard]))
        except (OSError, SafetensorError):  # not there, or damaged
            missing.append(shard)
    return missing, unusable


def _unreadable(out: Path, shards: Iterable[int]) -> dict[str, str]:
    """Why samples of these shards could not be encoded, by index."""
    reasons: dict[str, str] = {}
    for shard in shards:
        with safe_open(out / shard_name(shard), framework="pt") as content:
            reasons |= json.loads(content.metadata()["unreadable"])
    return reasons


class _Whole:
    """A source's images, each with all its captions; {"reason"} in place of an unusable sample."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            sample = self.source[0, index]
            return sample if "labels" in sample else {**sample, "captions": self.source.captions(index)}
        except Unreadable as error:
            return {"reason": f"{self.source.describe(index)}: {error}"}


@torch.no_grad()
def _encode(samples: list[dict[str, Any]], vae: AutoencoderKL, text: TextEncoder | None,
            mirror: bool) -> Iterator[dict[str, Any]]:
    """For each sample "moments" float16 [V, 2C, h, w] and "labels", or "text" float16 [captions, tokens, D]; or a
    reason."""
    usable = [sample for sample in samples if "reason" not in sample]
    moments: Iterator[Tensor] = iter(())
    states: Iterator[Tensor] = iter(())
    if usable:
        images = torch.stack([sample["images"] for sample in usable]).to(vae.device, vae.dtype)
        views = [vae.encode(view).latent_dist for view in ([images, images.flip(-1)] if mirror else [images])]
        moments = iter(torch.stack([torch.cat([view.mean, view.std], dim=1) for view in views], dim=1).half().cpu())
    if usable and text is not None:
        captions = [sample["captions"] for sample in usable]
        states = iter(text(sum(captions, [])).half().cpu().split([len(several) for several in captions]))
    for sample in samples:
        if "reason" in sample:
            yield sample
            continue
        condition = {"labels": sample["labels"]} if text is None else {"text": next(states)}
        encoded = {"moments": next(moments), **condition}
        finite = all(value.isfinite().all() for value in encoded.values() if isinstance(value, Tensor))
        yield encoded if finite else {"reason": "its latents or text states are not finite in float16"}


def _join(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A shard's tensors; zeros, and no text, in place of unusable samples."""
    usable = [sample for sample in samples if "reason" not in sample]
    if not usable:
        return {"text_ends": torch.zeros(len(samples), dtype=torch.long)}
    blank = torch.zeros_like(usable[0]["moments"])
    tensors = {"moments": torch.stack([sample.get("moments", blank) for sample in samples])}
    if "labels" in usable[0]:
        return tensors | {"labels": torch.tensor([sample.get("labels", -1) for sample in samples])}
    counts = torch.tensor([len(sample.get("text", ())) for sample in samples])
    return tensors | {"text": torch.cat([sample["text"] for sample in usable]), "text_ends": counts.cumsum(0)}


def _save(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    partial = file.with_name(f".partial-{file.name}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    sync(partial)
    partial.replace(file)
