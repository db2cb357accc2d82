"""The demos' images as folders: drawn with a run's experts, and real ones; and the classifier that looks at them."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..backbones.family import Backbone
from ..backbones.latents import decoded
from ..backbones.pretrained import component_of, load_backbone
from ..common.config import Config
from ..common.errors import InputError
from ..common.files import write_text
from ..common.load import load_config
from ..common.process import on_main_process
from ..data import shapes
from ..data.base import Source
from ..data.glyphs import draw_glyphs
from ..data.open import Digits
from ..evaluation.classifier import SmallClassifier, train_classifier
from ..evaluation.networks import Demo, file_digest
from ..experts.artefact import TemporalExperts
from .demo import drawn_kind
from .setup.parts import Parts, build
from .setup.teacher import dense_folder

_SEED = 1_000_000  # of the drawings to compare with: the same for runs of every seed, none of them training data


@dataclass(frozen=True)
class DemoReference:
    """Real images [N, C, S, S] in [-1, 1] and what they show; conditions [M] to draw samples for, and what those ask.

    targets, asked: classes, long [N], or sets, float [N, K] of zeros and ones.
    """

    images: Tensor
    targets: Tensor
    batch: dict[str, Any]
    asked: Tensor
    titles: list[str]


def demo_reference(config: Config, source: Source) -> DemoReference | None:
    """What a demo's samples are compared with; None for other data."""
    count = config.evaluate.samples
    if isinstance(source, Digits):
        return _classes(source.images, source.labels, count)
    if config.demo.model is None:
        return None
    if drawn_kind(config) == "glyphs":
        return _classes(*draw_glyphs(8 * count, _SEED), count)
    if source.encoded:
        samples = [source[0, i] for i in range(len(source))]
        return _classes(torch.stack([sample["latents"] for sample in samples]),
                                torch.tensor([sample["labels"] for sample in samples]), count)
    images, captions = shapes.draw_shapes(8 * count, _SEED)
    _, prompts = shapes.draw_shapes(count, _SEED + 1)
    asked = [several[0] for several in prompts]
    return DemoReference(_pixels(images), torch.stack([shapes.kinds(several[0]) for several in captions]),
                {"captions": asked}, torch.stack([shapes.kinds(caption) for caption in asked]), asked)


def _classes(images: Tensor, labels: Tensor, count: int) -> DemoReference:
    asked = torch.arange(count) % len(labels.unique())
    return DemoReference(images, labels, {"labels": asked}, asked, [str(int(label)) for label in asked])


def draw_run(run: Path, out: Path, state: PartialState, dense: bool = False, keep: float | None = None) -> Path:
    """`evaluate.samples` images of a demo's run, and its real ones, in out/images and out/real; returns out.

    dense: draw those of the dense model too, of the same seeds and conditions, in out/dense.
    keep: the rung of the experts' ladder, as for `Experts.pick`.

    Raises:
        InputError: for a run that has not finished, or is no demo's, or whose dense model is not there, or a ladder
            without such a rung; on every process.
    """
    on_main_process(lambda: _draw_run(run, out, state.device, dense, keep))
    return out


def _draw_run(run: Path, out: Path, device: torch.device, dense: bool, keep: float | None) -> None:
    started = load_config(run / "config.yaml")
    config = own_weights(started, run / "final")
    experts = TemporalExperts.from_pretrained(run / "final")
    experts = experts.choose(experts.pick(keep))
    settings = repr((config.evaluate, config.seed))
    made_of = {"images": _key(run / "final", f"{settings} {experts.keep_ratio_target}")}
    original = dense_folder(started) if dense else None
    if original is not None:
        made_of["dense"] = _key(original / component_of(original)[1], settings)
    done = out / "drawn.json"
    if done.is_file() and made_of.items() <= json.loads(done.read_bytes()).items():
        return
    parts = build(config, 1, device)
    reference = demo_reference(config, parts.source)
    if reference is None:
        raise InputError(f"--run {run}: not a demo: draw its images with scripts/sample.py, then use --images")
    done.unlink(missing_ok=True)
    with experts.serving(parts.simulator):
        _draw(parts, parts.backbone.eval(), config, reference, out / "images")
    if original is not None:
        _draw(parts, load_backbone(original).to(device).eval(), config, reference, out / "dense")
    _write(reference.images, out / "real")
    (out / "prompts.txt").write_text("".join(f"{title}\n" for title in reference.titles), encoding="utf-8")
    write_text(done, json.dumps(made_of) + "\n")


def _key(folder: Path, settings: str) -> str:
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".safetensors"))
    return hashlib.sha256(("".join(map(file_digest, files)) + settings).encode()).hexdigest()


def _draw(parts: Parts, backbone: Backbone, config: Config, reference: DemoReference, folder: Path) -> None:
    """Images, their latents, and a manifest.json as `alter sample` writes it."""
    batch = {name: value.to(backbone.device) if isinstance(value, Tensor) else value
             for name, value in reference.batch.items()}
    with decoded(parts.vae) as latents:
        images = parts.draw(backbone, batch, config.evaluate.sampling_steps, config.seed)
    files = _write(images, folder)
    for file, row in zip(files, latents or images, strict=True):  # a model without a VAE draws pixels
        np.save(file.with_suffix(".npy"), row.numpy())
    settings = {"steps": config.evaluate.sampling_steps, "guidance": config.evaluate.guidance_scale}
    listed = [{"file": file.name, "condition": title, "seed": config.seed}
              for file, title in zip(files, reference.titles, strict=True)]
    write_text(folder / "manifest.json", json.dumps({"settings": settings, "images": listed}, indent=1) + "\n")


def kept_classifier(images: Tensor, targets: Tensor, seed: int, file: Path) -> SmallClassifier:
    """The one in `file`, complete or not there at all; it is trained first (`train_classifier`) if it is not."""
    if not file.is_file():
        trained = train_classifier(images, targets, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{os.getpid()}-{file.name}")  # another may do the same beside it
        save_file(trained.state_dict(), partial)
        partial.replace(file)
        return trained
    classes = int(targets.max()) + 1 if targets.dim() == 1 else targets.shape[1]
    classifier = SmallClassifier(images.shape[1], images.shape[-1], classes)
    classifier.load_state_dict(load_file(file))
    return classifier.eval().requires_grad_(False)


def demo_network(cache: Path, state: PartialState, seed: int = 0) -> Demo:
    """A classifier of scikit-learn's digits, trained once, by the first process."""
    digits, file = Digits(), cache / f"digits-classifier-{seed}.safetensors"
    if state.is_main_process:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the same weights whatever the number of threads and processes
        kept_classifier(digits.images, digits.labels, seed, file)
        torch.set_num_threads(threads)
    state.wait_for_everyone()
    classifier = kept_classifier(digits.images, digits.labels, seed, file)
    return Demo(classifier, digits.images.shape[-1], digits.images.shape[1])


def own_weights(config: Config, final: Path) -> Config:
    """The run as it ended: its own weights and experts, and no teacher."""
    if not (final / "experts.json").is_file():
        raise InputError(f"--run {final.parent}: holds no final/experts.json: name a run that has finished")
    return dataclasses.replace(
        config, resume=None, backbone=dataclasses.replace(config.backbone, pretrained=str(final)),
        experts=dataclasses.replace(config.experts, pretrained=str(final)),
        loss=dataclasses.replace(config.loss, denoise=1.0, output_kd=0.0, feature_kd=0.0),
    )


def _write(images: Tensor, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.png"), *folder.glob("*.npy")]:
        old.unlink()
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    files = [folder / f"{i:06d}.png" for i in range(len(images))]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file)
    return files


def _pixels(images: list[Any]) -> Tensor:
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1
