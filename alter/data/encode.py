"""Encodes images to moments of latents, and captions to conditioning, in shards that `EncodedShards` reads."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError  # of torch.load, which runs no code
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..backbones import latents
from ..backbones.conditioning import Conditioner
from ..backbones.pretrained import DTYPES, condition_of, load_vae, local_folder, set_tf32
from ..backbones.sizes import check_bucket_step, latent_frames, pixel_size
from ..common.config import Config
from ..common.errors import InputError
from ..common.files import sync, write_text
from ..common.process import on_main_process
from .base import Framing, with_usual
from .encoded import BUCKETS, COMMON, INDEX, VAE_SETTINGS, VERSION, shard_name
from .images import Unreadable
from .latents import text_hashes, weights_hash
from .open import Source, open_source

_PLAN = "encoding.json"  # until the index is there
_DATA = ("source", "path", "split", "stream", "image_column", "caption_column", "label_column", "prompt", "prior_path",
         "prior_prompt")


def encode(config: Config, out: Path, shard_size: int, batch_size: int, state: PartialState) -> dict[str, Any]:
    """Encode a configuration's images (and captions) into the folder `out`, on all processes.

    Shards that exist already are kept. VAE and text encoders run in the precision of training, so that what is stored,
    as float16, is what training would have computed. The backbone is not loaded.

    Args:
        shard_size: samples per file. batch_size: images per forward of the VAE.

    Returns: the content of index.json.

    Raises:
        InputError: if there is nothing to encode, `out` was begun with other settings, or too many samples are
            unusable.
    """
    folder = local_folder(str(config.backbone.pretrained), config.backbone.revision)
    source = _images(config, folder)
    latent_frames(folder, config.data.frames)
    if config.data.bucket_step is not None:
        check_bucket_step(folder, config.data.bucket_step)
    set_tf32(config.train.tf32)
    models = _Models(config, folder, state.device, source.num_classes == 0)
    plan = {
        "alter_latents": VERSION, "model": config.backbone.pretrained, **models.described(folder),
        "resolution": config.data.resolution, "crop": config.data.crop, "mirrored": config.data.flip,
        "precision": config.train.mixed_precision, "num_classes": source.num_classes, "count": len(source),
        "shard_size": shard_size, "data": {name: getattr(config.data, name) for name in _DATA},
    }
    missing, unusable = on_main_process(lambda: _begin(out, plan))
    conditioner = models.conditioner
    if conditioner is not None:
        sizes = Framing(config.data, config.seed).sizes
        on_main_process(lambda: _save_common(out / COMMON, conditioner, sizes))

    mine = missing[state.process_index :: state.num_processes]
    shards = [range(number * shard_size, min((number + 1) * shard_size, len(source))) for number in mine]
    batches = [list(rows[first : first + batch_size]) for rows in shards for first in range(0, len(rows), batch_size)]
    loaded = iter(DataLoader(_Whole(source), batch_sampler=batches, num_workers=config.data.workers,  # type: ignore
                             collate_fn=list))
    encoded = (sample for raw in loaded for sample in _encode(raw, models, config.data.flip))
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
    numbers = range(-(-len(source) // shard_size))
    unreadable = _unreadable(out, numbers)
    if unreadable:
        _bound(len(unreadable), config, len(source), list(unreadable.values())[-1])
    index = {**plan, "classes": source.classes, "bfloat16": _bfloat16(out, numbers), "unreadable": unreadable}
    if state.is_main_process:
        if config.data.bucket_step is not None:
            np.save(out / BUCKETS, with_usual(np.concatenate([_buckets(out, number) for number in numbers])))
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


def _buckets(out: Path, number: int) -> np.ndarray:
    with safe_open(out / shard_name(number), framework="np") as content:
        return content.get_tensor("bucket")


def _bfloat16(out: Path, shards: Iterable[int]) -> list[str]:
    """The names of the tensors that some shard holds as bfloat16."""
    found = set()
    for shard in shards:
        with safe_open(out / shard_name(shard), framework="pt") as content:
            found |= {name for name in content.keys() if content.get_slice(name).get_dtype() == "BF16"}
    return sorted(found)


class _Models:
    """What encodes: a pipeline's VAE and, of captions, its `Conditioner`."""

    def __init__(self, config: Config, folder: Path, device: torch.device, captioned: bool) -> None:
        dtype, data = DTYPES[config.train.mixed_precision], config.data
        self.bucket_step, self.frames = data.bucket_step, data.frames
        size = pixel_size(folder, data.resolution, data.frames)
        self.conditioner = Conditioner(folder, device, dtype, size, config.evaluate.guidance_scale,
                                       data.max_tokens) if captioned else None
        self.pipe: Any = (self.conditioner.pipe if self.conditioner is not None
                          else SimpleNamespace(vae=load_vae(folder, device, dtype)))

    def described(self, folder: Path) -> dict[str, Any]:
        """For the index."""
        config = {**self.pipe.vae.config, "shift_factor": self.pipe.vae.config.get("shift_factor") or 0.0}
        settings = {name: json.loads(json.dumps(config.get(name))) for name in VAE_SETTINGS}
        told: dict[str, Any] = {}
        conditioner = self.conditioner
        if conditioner is not None:
            told |= {"max_tokens": conditioner.max_tokens, "bucket_step": self.bucket_step,
                     "frames": self.frames}
            if conditioner.is_told_guidance:
                told["guidance_scale"] = conditioner.guidance
        return {"pipeline": type(self.pipe).__name__ if conditioner else None, "vae": weights_hash(folder / "vae"),
                "vae_settings": {name: value for name, value in settings.items() if value is not None},
                "text_encoders": text_hashes(folder) if conditioner else {}, "told": told}


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
def _encode(samples: list[dict[str, Any]], models: _Models, mirror: bool) -> Iterator[dict[str, Any]]:
    """For each sample "moments" float32 [V, 2C, ...] and "labels", or "sizes" and "rows", a list of each caption's; or
    a reason."""
    usable = [sample for sample in samples if "reason" not in sample]
    moments: Iterator[Tensor] = iter(())
    rows: Iterator[dict[str, Any]] = iter(())
    if usable:
        found: dict[int, Tensor] = {}
        for places in _of_one_shape(usable):
            images = torch.stack([usable[place]["images"] for place in places])
            views = [torch.cat(latents.encode(models.pipe, view), dim=1)
                     for view in ([images, images.flip(-1)] if mirror else [images])]
            found |= zip(places, torch.stack(views, dim=1).cpu(), strict=True)
        moments = iter([found[place] for place in range(len(usable))])
    if usable and models.conditioner is not None:
        rows = iter(models.conditioner.each([caption for sample in usable for caption in sample["captions"]]))
    for sample in samples:
        if "reason" in sample:
            yield sample
            continue
        encoded = {"moments": next(moments)}
        if models.conditioner is None:
            encoded["labels"] = sample["labels"]
        else:
            encoded |= {name: sample[name] for name in ("sizes", "bucket") if name in sample}
            encoded["rows"] = tree_map_only(Tensor, Tensor.cpu, list(islice(rows, len(sample["captions"]))))
        finite = all(value.isfinite().all() for value in tree_leaves(encoded) if isinstance(value, Tensor))
        yield encoded if finite else {"reason": "its latents or text states are not finite"}


def _of_one_shape(samples: list[dict[str, Any]]) -> list[list[int]]:
    """The places of the samples whose images have the same shape, for each shape."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, sample in enumerate(samples):
        places.setdefault(tuple(sample["images"].shape), []).append(place)
    return list(places.values())


def _join(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A shard's tensors; zeros, and no captions, in place of unusable samples."""
    usable = [sample for sample in samples if "reason" not in sample]
    tensors = {"bucket": torch.tensor([sample.get("bucket", -1) for sample in samples])}
    if not usable:
        return {**tensors, "captions": torch.zeros(len(samples), dtype=torch.long)}
    if "bucket" in usable[0]:
        for bucket in {sample["bucket"] for sample in usable}:
            tensors[f"moments.{bucket}"] = _compact(torch.stack([
                sample["moments"] for sample in usable if sample["bucket"] == bucket]))
    else:
        blank = torch.zeros_like(usable[0]["moments"])
        tensors = {"moments": _compact(torch.stack([sample.get("moments", blank) for sample in samples]))}
    if "labels" in usable[0]:
        return tensors | {"labels": torch.tensor([sample.get("labels", -1) for sample in samples])}
    tensors["captions"] = torch.tensor([len(sample.get("rows", ())) for sample in samples]).cumsum(0)
    blank = torch.zeros_like(usable[0]["sizes"])
    tensors["sizes"] = torch.stack([sample.get("sizes", blank) for sample in samples])
    captions = [rows for sample in usable for rows in sample["rows"]]
    for name in captions[0]:
        values = [rows[name][0] for rows in captions]
        if len({value.shape for value in values}) == 1:
            tensors[f"rows.{name}"] = _compact_text(torch.stack(values), values[0].dim())
        else:
            tensors[f"rows.{name}"] = _compact_text(torch.cat(values), values[0].dim())
            tensors[f"ends.{name}"] = torch.tensor([len(value) for value in values]).cumsum(0)
    return tensors


def _compact_text(values: Tensor, axes: int) -> Tensor:
    """States of tokens made small; what is no larger than one state of each sample stays whole."""
    if not values.is_floating_point():
        return values
    return _compact(values) if axes > 1 else values.float()


def _compact(values: Tensor) -> Tensor:
    """As float16, or bfloat16 where a value does not fit."""
    half = values.half()
    return half if half.isfinite().all() else values.bfloat16()


def _save_common(file: Path, conditioner: Conditioner, sizes: list[tuple[int, int]]) -> None:
    """Write what encoded captions have in common, for each size of images."""
    told = [conditioner([""], size=size) for size in sizes]
    (dropped,) = conditioner.each([""], torch.ones(1, dtype=torch.bool))
    common = {"shared": [each.shared for each in told], "dropped": dropped,
              "same": [{name: each.rows[name] for name in conditioner.same} for each in told],
              "listed": [name for name, value in dropped.items() if isinstance(value, list)]}
    partial = file.with_name(f".partial-{file.name}")
    torch.save(tree_map_only(Tensor, Tensor.cpu, common), partial)
    try:
        torch.load(partial, weights_only=True)
    except UnpicklingError as error:
        raise InputError(f"backbone.pretrained: what its {type(conditioner.pipe).__name__} tells its backbone cannot "
                         f"be stored ({' '.join(str(error).split())[:200]}): train from images") from None
    sync(partial)
    partial.replace(file)


def _save(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    partial = file.with_name(f".partial-{file.name}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    sync(partial)
    partial.replace(file)
