"""Data sets, each a map from (epoch, index) to a sample.

A sample is {"images" float32 [C, H, W] in [-1, 1], or "latents" float32 [C, H, W]} and {"labels" int, or "captions"
str, or "encoder_hidden_states" float32 [tokens, D]}; what is random about it is a function of (seed, epoch, index).
"""

import dataclasses
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .config import Config, DataConfig
from .errors import InputError
from .images import Unreadable, load_pixels

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
METADATA = "metadata.jsonl"


class Source(Protocol):
    """A data set of `len()` samples, addressed by (epoch, index)."""

    num_classes: int  # 0 where the condition is text
    encoded: bool  # True: samples are latents; False: images for the VAE
    empty_text: Tensor | None  # where the condition is text: that of a dropped prompt

    def __len__(self) -> int: ...
    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]: ...  # Unreadable: if it cannot be used
    def describe(self, index: int) -> str: ...  # the sample's name in reports


class Digits:
    """scikit-learn's 1797 grey 8x8 digits in ten classes, as the backbone's latents."""

    num_classes = 10
    encoded = True
    empty_text: Tensor | None = None

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
        self.labels = torch.from_numpy(digits.target).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return {"latents": self.images[key[1]], "labels": int(self.labels[key[1]])}

    def describe(self, index: int) -> str:
        return f"digit {index}"


class Framing:
    """The square of an image that is shown at (epoch, index), mirrored or not."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.resolution, self.crop, self.flip, self.seed = config.resolution, config.crop, config.flip, seed

    def __call__(self, content: Path | bytes, epoch: int, index: int) -> Tensor:
        """float32 [3, resolution, resolution]."""
        across, down = 0.5, 0.5
        if self.crop == "random":
            across, down = np.random.default_rng([self.seed, 6, epoch, index]).random(2)
        mirror = self.flip and _coin(self.seed, epoch, index)
        return load_pixels(content, self.resolution, (across, down), mirror)


class ImageFolder:
    """Class folders of images."""

    encoded = False
    empty_text: Tensor | None = None

    def __init__(self, config: DataConfig, seed: int) -> None:
        folder = Path(str(config.path))
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        labels = {name: label for label, name in enumerate(classes)}
        self.files = [(folder / name, labels[name.split("/")[0]]) for name in _list_images(folder) if "/" in name]
        if not self.files:
            raise InputError(f"data.path={config.path!r}: no images in class sub-folders: expected "
                             f"<path>/<class>/<image>, or a {METADATA} with captions, or data.prompt")
        self.num_classes = len(classes)
        self.framing = Framing(config, seed)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        file, label = self.files[key[1]]
        return {"images": self.framing(file, *key), "labels": label}

    def describe(self, index: int) -> str:
        return str(self.files[index][0])


class CaptionedFolder:
    """A folder of images with captions, by Hugging Face's convention: each line of its metadata.jsonl is an object
    with `file_name`, relative to the folder, and one caption or a list of them in `data.caption_column`.

    With `data.prompt`, that is the caption of every image anywhere below the folder instead.
    """

    num_classes = 0
    encoded = False
    empty_text: Tensor | None = None

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.folder, self.seed, self.framing = Path(str(config.path)), seed, Framing(config, seed)
        if config.prompt is None:
            self.samples = _read_metadata(self.folder, config.caption_column)
        else:
            self.samples = [(name, config.prompt, "data.prompt") for name in _list_images(self.folder)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        caption = self.caption(key)
        return {"images": self.framing(self.folder / self.samples[key[1]][0], *key), "captions": caption}

    def caption(self, key: tuple[int, int]) -> str:
        """The sample's condition alone, without reading its image."""
        _, captions, where = self.samples[key[1]]
        return _draw_caption(captions, where, self.seed, *key)

    def describe(self, index: int) -> str:
        return str(self.folder / self.samples[index][0])


class HuggingFace:
    """A data set that `datasets` wrote with save_to_disk, or a folder with parquet or arrow files anywhere below.

    Parquet is unpacked once into the cache of `datasets` ($HF_DATASETS_CACHE). Without a caption column, an
    integer column `label` makes it a class-labelled data set. Nothing is downloaded, and no code in the folder runs.
    """

    encoded = False
    empty_text: Tensor | None = None

    def __init__(self, config: DataConfig, seed: int) -> None:
        from datasets import Image

        self.folder, self.image_column = Path(str(config.path)), config.image_column
        self.seed, self.framing = seed, Framing(config, seed)
        rows = _open_rows(self.folder, config.split)
        columns = ", ".join(rows.column_names)
        if self.image_column not in rows.column_names:
            raise InputError(f"data.image_column={self.image_column!r}: no such column: choose one of {columns}")
        captioned = config.caption_column in rows.column_names
        if not captioned and not _is_integer(rows.features.get("label")):
            raise InputError(f"data.caption_column={config.caption_column!r}: no such column: choose one of "
                             f"{columns}")
        self.condition = config.caption_column if captioned else "label"
        try:
            self.rows = (rows.with_format(None).select_columns([self.image_column, self.condition])
                         .cast_column(self.image_column, Image(decode=False)))
        except (TypeError, ValueError, NotImplementedError):
            raise InputError(f"data.image_column={self.image_column!r}: holds no images but "
                             f"{rows.features[self.image_column]}: choose one of {columns}") from None
        self.num_classes = 0 if captioned else _count_classes(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        try:
            row = self.rows[key[1]]
        except (OSError, ValueError) as error:
            raise Unreadable(f"row cannot be read ({error})") from None
        value, where = row[self.condition], f"column {self.condition!r}"
        condition: dict[str, Any]
        if self.num_classes == 0:
            condition = {"captions": _draw_caption(value, where, self.seed, *key)}
        elif value is None or value < 0:
            raise Unreadable(f"{where}: expected a label, found {value}")
        else:
            condition = {"labels": value}
        return {"images": self.framing(self._content(row[self.image_column]), *key), **condition}

    def _content(self, image: dict[str, Any] | None) -> Path | bytes:
        if image is not None and image["bytes"] is not None:
            return image["bytes"]
        if image is not None and image["path"] is not None:
            return self.folder / image["path"]
        raise Unreadable(f"column {self.image_column!r}: no image")

    def describe(self, index: int) -> str:
        return f"{self.folder} row {index}"


class WithPrior:
    """Instances of a subject and images of its class in turn, so that each is half of every epoch (DreamBooth).

    Even indices are instances and odd ones the prior; the fewer of the two are repeated.
    """

    num_classes = 0
    encoded = False
    empty_text: Tensor | None = None

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

    def describe(self, index: int) -> str:
        part = self.parts[index % 2]
        return part.describe(index // 2 % len(part))


class Latents:
    """Pre-encoded latents in fast-DiT's layout: <path>/*_features/N.npy, <path>/*_labels/N.npy.

    Features are [1, C, h, w] or [variants, C, h, w], already multiplied by the VAE's scaling factor; with
    several variants (the image and its mirror) `flip` draws one, else the first is used. For a model
    conditioned on text, <path>/*_text/N.npy holds the text encoder's states [tokens, D] in place of labels,
    and <path>/empty_text.npy those of the empty prompt, which dropped prompts become.
    """

    encoded = True
    num_classes = 0

    def __init__(self, config: DataConfig, seed: int) -> None:
        folder = Path(str(config.path))
        features, texts = sorted(folder.glob("*_features")), sorted(folder.glob("*_text"))
        conditions = texts or sorted(folder.glob("*_labels"))
        if len(features) != 1 or len(conditions) != 1:
            raise InputError(f"data.path={config.path!r}: expected one *_features folder and one *_labels or "
                             "*_text folder")
        self.files = sorted(features[0].glob("*.npy"), key=lambda file: (len(file.stem), file.stem))
        if not self.files:
            raise InputError(f"data.path={config.path!r}: no .npy files in {features[0].name}")
        self.conditions, self.flip, self.seed = conditions[0], config.flip, seed
        self.empty_text: Tensor | None = None
        if texts:
            self.empty_text = torch.from_numpy(_load_npy(folder / "empty_text.npy")).float()
        else:
            some = self.files[:: max(1, len(self.files) // 1000)]  # not a million small files
            self.num_classes = 1 + max(int(self._condition(file)) for file in some)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        file = self.files[key[1]]
        variants = torch.from_numpy(_load_npy(file)).float()
        if variants.dim() == 3:
            variants = variants[None]
        second = self.flip and len(variants) > 1 and _coin(self.seed, *key)
        name = "labels" if self.empty_text is None else "encoder_hidden_states"
        return {"latents": variants[int(second)], name: self._condition(file)}

    def describe(self, index: int) -> str:
        return str(self.files[index])

    def _condition(self, file: Path) -> Any:
        content = torch.from_numpy(_load_npy(self.conditions / file.name))
        return int(content.reshape(-1)[0]) if self.empty_text is None else content.float()


def open_source(config: Config) -> Source:
    """The data set that the configuration names.

    Raises:
        InputError: if its folder is missing, empty or not laid out as expected.
    """
    data = config.data
    if data.prompt is not None and data.source != "image_folder":
        raise InputError(f"data.prompt={data.prompt!r} is for data.source=image_folder: remove it")
    source = _open(data, config.seed)
    if data.prior_path is None:
        return source
    if data.prior_prompt is None:
        raise InputError(f"data.prior_path={data.prior_path!r} needs a caption: set data.prior_prompt")
    if source.encoded or source.num_classes:
        raise InputError(f"data.prior_path={data.prior_path!r} is for images with captions: remove it, or set "
                         "data.prompt")
    _require_folder("prior_path", data.prior_path)
    prior = dataclasses.replace(data, path=data.prior_path, prompt=data.prior_prompt)
    return WithPrior(source, _require_samples("prior_path", data.prior_path, CaptionedFolder(prior, config.seed)))


def _coin(seed: int, epoch: int, index: int) -> bool:
    return bool(np.random.default_rng([seed, 3, epoch, index]).integers(2))


def _draw_caption(value: Any, where: str, seed: int, epoch: int, index: int) -> str:
    """One of a sample's captions; `value` is what stands in the data, and `where` its place there."""
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not captions or not all(map(_is_caption, captions)):
        raise Unreadable(f"{where}: expected a caption or a list of them, found {value!r:.60}")
    return captions[np.random.default_rng([seed, 8, epoch, index]).integers(len(captions))]


def _is_caption(text: Any) -> bool:
    """Whether it is text that a tokenizer accepts: not blank, and without halves of surrogate pairs."""
    return isinstance(text, str) and bool(text.strip()) and not re.search(r"[\ud800-\udfff]", text)


def _open(config: DataConfig, seed: int) -> Source:
    if config.source == "digits":
        return Digits()
    folder = _require_folder("path", str(config.path))
    if config.source == "latents":
        return Latents(config, seed)
    if config.source == "datasets":
        return _require_samples("path", config.path, HuggingFace(config, seed))
    if config.prompt is not None or (folder / METADATA).is_file():
        return _require_samples("path", config.path, CaptionedFolder(config, seed))
    return ImageFolder(config, seed)


def _require_folder(key: str, path: str) -> Path:
    if not Path(path).is_dir():
        raise InputError(f"data.{key}={path!r}: no such folder: set it to your data set")
    return Path(path)


def _require_samples(key: str, path: str | None, source: Source) -> Source:
    if not len(source):
        raise InputError(f"data.{key}={path!r}: no images: set it to a folder that has some")
    return source


def _list_files(folder: Path) -> list[str]:
    """The paths, relative to the folder, of all files below it; links to folders are followed, once each."""
    names, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        place = os.path.relpath(root, folder)
        names += files if place == "." else [f"{place}/{file}" for file in files]
    return sorted(names)


def _list_visible(folder: Path, suffixes: set[str]) -> list[str]:
    return [name for name in _list_files(folder) if PurePosixPath(name).suffix.lower() in suffixes
            and not any(part.startswith(".") for part in name.split("/"))]


def _list_images(folder: Path) -> list[str]:
    return _list_visible(folder, IMAGE_SUFFIXES)


def _read_metadata(folder: Path, column: str) -> list[tuple[str, Any, str]]:
    """For each line of metadata.jsonl: the image's path in the folder, what the column holds, and where that is."""
    files = set(_list_files(folder))
    columns: set[str] = set()
    samples = []
    for number, line in enumerate((folder / METADATA).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"data.path: {folder / METADATA} line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not JSON ({error}): correct or remove it") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise InputError(f"{place}: no file_name: expected an object with file_name and {column}")
        path = PurePosixPath(entry["file_name"])
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"{place}: file_name={entry['file_name']!r} leaves the folder: name a file in it")
        if path.as_posix() not in files:
            raise InputError(f"{place}: file_name={entry['file_name']!r}: no such file: correct or remove the line")
        columns |= entry.keys()
        samples.append((path.as_posix(), entry.get(column), f"{METADATA} line {number}, {column!r}"))
    if samples and column not in columns:
        raise InputError(f"data.caption_column={column!r}: no such column in {folder / METADATA}: choose one of "
                         f"{', '.join(sorted(columns))}")
    return samples


def _open_rows(folder: Path, part: str | None) -> Any:
    """The `datasets.Dataset` in a folder, all of it or one part."""
    from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk

    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            found = load_from_disk(str(folder))
            if not isinstance(found, DatasetDict):
                return found
            if part is not None and part not in found:
                raise InputError(f"data.split={part!r}: the data set in {folder} has {', '.join(found)}: choose one")
            return concatenate_datasets(list(found.values())) if part is None else found[part]
        names = _choose_tables(folder, part)
        files = [str(folder / name) for name in names]
        if names[0].endswith(".parquet"):
            return Dataset.from_parquet(files)
        return concatenate_datasets([Dataset.from_file(file) for file in files])
    except InputError:
        raise
    except Exception as error:  # of pyarrow's, of datasets' and the system's many kinds
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError(f"data.path={str(folder)!r}: cannot be read as a data set ({reason}): "
                         "write it again") from None


def _choose_tables(folder: Path, part: str | None) -> list[str]:
    """Table files named after the part, or else in folders of its name; all of them for None."""
    names = _list_visible(folder, {".parquet", ".arrow"})
    if not names:
        raise InputError(f"data.path={str(folder)!r}: no .parquet or .arrow files, and not written by save_to_disk")
    if part is not None:
        chosen = ([name for name in names if PurePosixPath(name).name.startswith(part)]
                  or [name for name in names if part in name.split("/")[:-1]])
        if not chosen:
            some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise InputError(f"data.split={part!r}: no file's name starts with it: {folder} has {some}; "
                             "choose another, or null for all files")
        names = chosen
    if len({PurePosixPath(name).suffix for name in names}) > 1:
        raise InputError(f"data.path={str(folder)!r}: both .parquet and .arrow files: keep one kind")
    return names


def _is_integer(feature: Any) -> bool:
    from datasets import ClassLabel, Value

    return isinstance(feature, ClassLabel) or isinstance(feature, Value) and "int" in feature.dtype


def _count_classes(rows: Any) -> int:
    declared = getattr(rows.features["label"], "num_classes", None)
    return declared or 1 + max((label for label in rows.unique("label") if label is not None), default=0)


def _load_npy(file: Path) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"data.path: {file} cannot be read ({error})") from None
