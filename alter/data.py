"""Data sets and their order: sample i of epoch e is a function of (seed, e, i), for any number of processes.

A data set maps (epoch, index) to {"images" float32 [C, H, W] in [-1, 1], or "latents" float32 [C, H, W]} and
{"labels" int, or "encoder_hidden_states" float32 [tokens, D]}. The stream of global batches is the concatenation
of the epochs' permutations, of which each process and micro-batch takes its slice; a resumed run starts the stream
at its step.
"""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from .config import Config, DataConfig
from .errors import InputError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Source(Protocol):
    """A data set of `len()` samples, addressed by (epoch, index)."""

    num_classes: int  # 0 where the condition is text
    encoded: bool  # True: samples are latents; False: images for the VAE
    empty_text: Tensor | None  # where the condition is text: that of a dropped prompt

    def __len__(self) -> int: ...
    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]: ...


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


class ImageFolder:
    """Class folders of images: resized so that the short side fits, centre-cropped, mirrored if asked."""

    encoded = False
    empty_text: Tensor | None = None

    def __init__(self, config: DataConfig, seed: int) -> None:
        folder = Path(str(config.path))
        classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
        self.files = [
            (file, label) for label, entry in enumerate(classes)
            for file in sorted(entry.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not self.files:
            raise InputError(f"data.path={config.path!r}: no images in class sub-folders: "
                             "expected <path>/<class>/<image>")
        self.num_classes = len(classes)
        self.resolution, self.flip, self.seed = config.resolution, config.flip, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        file, label = self.files[key[1]]
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except OSError as error:
            raise InputError(f"data.path: {file} cannot be read ({error}): remove or replace it") from None
        scale = self.resolution / min(image.size)
        width, height = (max(self.resolution, round(side * scale)) for side in image.size)
        left, top = (width - self.resolution) // 2, (height - self.resolution) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        if self.flip and _coin(self.seed, *key):
            pixels = pixels.flip(-1)
        return {"images": pixels, "labels": label}


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

    def _condition(self, file: Path) -> Any:
        content = torch.from_numpy(_load_npy(self.conditions / file.name))
        return int(content.reshape(-1)[0]) if self.empty_text is None else content.float()


def open_source(config: Config) -> Source:
    """The data set that the configuration names.

    Raises:
        InputError: if its folder is missing, empty or not laid out as expected.
    """
    data = config.data
    if data.source == "digits":
        return Digits()
    if not Path(str(data.path)).is_dir():
        raise InputError(f"data.path={data.path!r}: no such folder: set it to your data set "
                         f"(data.source={data.source!r})")
    return ImageFolder(data, config.seed) if data.source == "image_folder" else Latents(data, config.seed)


def split(source: Source, holdout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and the `holdout` held-out ones, drawn with `seed`."""
    if holdout >= len(source):
        raise InputError(f"data.holdout={holdout}: the data set has only {len(source)} samples: hold out fewer")
    order = np.random.default_rng([seed, 1]).permutation(len(source))
    return np.sort(order[holdout:]), np.sort(order[:holdout])


class GlobalBatches:
    """A batch sampler: the micro-batches of one process, from `first_step` to `last_step`.

    indices: training indices. batch_size: global. rank, processes: this process and their number.
    """

    def __init__(self, indices: np.ndarray, batch_size: int, micro_batches: int, rank: int, processes: int,
                 seed: int, first_step: int, last_step: int) -> None:
        self.indices, self.batch_size, self.seed = indices, batch_size, seed
        self.steps = range(first_step, last_step)
        size = batch_size // (micro_batches * processes)
        self.slices = [slice((rank * micro_batches + k) * size, (rank * micro_batches + k + 1) * size)
                       for k in range(micro_batches)]

    def __len__(self) -> int:
        return len(self.steps) * len(self.slices)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, self.indices
        for step in self.steps:
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // len(self.indices) != epoch:
                    epoch = position // len(self.indices)
                    order = np.random.default_rng([self.seed, 2, epoch]).permutation(self.indices)
                batch.append((epoch, int(order[position % len(self.indices)])))
            for rows in self.slices:
                yield batch[rows]


def make_loader(source: Source, batches: Any, workers: int) -> DataLoader:
    """Load the samples that `batches` names, in `workers` processes."""
    dataset: Any = source
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available(),
                      worker_init_fn=_leave_interrupts_to_the_trainer)


def _leave_interrupts_to_the_trainer(worker: int) -> None:
    """A terminal's Ctrl-C reaches the workers too; the trainer still needs them to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _coin(seed: int, epoch: int, index: int) -> bool:
    return bool(np.random.default_rng([seed, 3, epoch, index]).integers(2))


def _load_npy(file: Path) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"data.path: {file} cannot be read ({error})") from None
