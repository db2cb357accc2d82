"""Opens a data set of any kind behind one interface, `Source`."""

import dataclasses

from ..common.config import Config, DataConfig
from ..common.errors import InputError
from .base import Encoding, Source, require_folder
from .digits import Digits
from .encoded import INDEX, EncodedShards, shard_name
from .folders import CaptionedFolder, ImageFolder, TextsBeside, open_folder
from .latents import FastDiT, Repa, repa_folder, weights_hash
from .prior import WithPrior
from .shards import TarShards
from .tables import OpenedTable, StreamedTable
from .videos import VideoFolder

__all__ = [
    "INDEX", "CaptionedFolder", "Digits", "EncodedShards", "Encoding", "FastDiT", "ImageFolder", "OpenedTable", "Repa",
    "Source", "StreamedTable", "TarShards", "TextsBeside", "VideoFolder", "WithPrior", "open_source", "shard_name",
    "weights_hash",
]


def open_source(config: Config, wanted: str | None = None) -> Source:
    """The data set that the configuration names.

    Args:
        wanted: "class" or "text", the condition to take where the data have both; None: as the data's kind says.

    Raises:
        InputError: if its folder is missing, empty or not laid out as expected.
    """
    data = config.data
    if data.prompt is not None and data.source != "image_folder":
        raise InputError(f"data.prompt={data.prompt!r} is for data.source=image_folder: remove it")
    if data.stream and data.source != "datasets":
        raise InputError("data.stream=true is for data.source=datasets: remove it")
    if data.frames > 1 and data.source not in ("video_folder", "latents"):
        raise InputError(f"data.frames={data.frames}: data.source={data.source!r} has images: use video_folder, or 1")
    source = _open(data, config.seed, wanted)
    if data.prior_path is None:
        return source
    if data.prior_prompt is None:
        raise InputError(f"data.prior_path={data.prior_path!r} needs a caption: set data.prior_prompt")
    if source.encoded or source.num_classes != 0 or source.shards is not None:
        raise InputError(f"data.prior_path={data.prior_path!r} is for images with captions, not in shards: remove it, "
                         "or set data.prompt")
    require_folder("prior_path", data.prior_path)
    prior = dataclasses.replace(data, path=data.prior_path, prompt=data.prior_prompt)
    return WithPrior(source, _with_samples("prior_path", data.prior_path, CaptionedFolder(prior, config.seed)))


def _open(config: DataConfig, seed: int, wanted: str | None) -> Source:
    if config.source == "digits":
        if config.flip:
            raise InputError("data.flip=true: the digits have no mirror images: set false")
        return Digits()
    source: Source
    if config.source == "datasets" and config.stream:
        source = StreamedTable(config, seed, wanted)
    else:
        require_folder("path", str(config.path))
        if config.source == "datasets":
            source = OpenedTable(config, seed, wanted)
        elif config.source == "webdataset":
            source = TarShards(config, seed, wanted)
        elif config.source == "video_folder":
            source = VideoFolder(config, seed)
        elif config.source == "latents":
            source = _open_latents(config, seed)
        else:
            source = open_folder(config, seed, wanted)
    return _with_samples("path", config.path, source)


def _open_latents(config: DataConfig, seed: int) -> Source:
    folder = require_folder("path", str(config.path))
    if config.crop == "random":
        raise InputError("data.crop='random': latents hold one crop of each image: use center")
    if (folder / INDEX).is_file():
        return EncodedShards(config, seed)
    if (repa_folder(folder) / "dataset.json").is_file():
        return Repa(config, seed)
    return FastDiT(config, seed)


def _with_samples(key: str, path: str | None, source: Source) -> Source:
    if not len(source):
        raise InputError(f"data.{key}={path!r}: no images: set it to a folder that has some")
    return source
