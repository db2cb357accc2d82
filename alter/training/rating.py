"""By which numbers an ablation ranks its runs: those that follow what is sampled.

Fréchet distance to real images, with its own noise; drift from the dense model's samples of the same seeds; and the
held-out error weighted by the response of samples. All in the features of one classifier, the same for all runs.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..common.config import Config
from ..data.latents import weights_hash
from ..evaluation.classifier import SmallClassifier, accuracy
from ..evaluation.distances import frechet_distance
from ..evaluation.pairs import drift
from ..experts.artefact import TemporalExperts
from .demo_images import DemoReference, demo_reference, kept_classifier
from .probe import Probe
from .search.measuring import measure_response
from .setup.parts import Parts

MANY_STEPS = 50  # of the dense samples from which drift is measured
_BINS = 20  # in which the response is measured
_RESAMPLES = 50


class Rating:
    """Rates samples of runs of one configuration, whose seed is that of the samples.

    Args:
        config, parts: of the dense model, with a teacher. folder: where what was computed once is kept.

    Attributes:
        yardstick: digest of the dense model and of the classifier: numbers by another one cannot be compared.
    """

    def __init__(self, config: Config, parts: Parts, folder: Path) -> None:
        reference = demo_reference(config, parts.source)
        budget = config.budget.sampler, config.budget.sampling_steps  # in which samples answer to errors
        dense = weights_hash(parts.folder / parts.component)
        made_of = repr((config.evaluate, config.demo, config.data, config.backbone, config.flow, budget,
                        config.train.mixed_precision, dense))
        self.key = hashlib.sha256(made_of.encode()).hexdigest()[:8]
        assert reference is not None, "a demo's run"
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.parts, self.folder, self.reference = config, parts, folder, reference
        self.classifier = demo_classifier(config, reference)
        weights = [hashlib.sha256(value.numpy().tobytes()).digest() for value in self.classifier.state_dict().values()]
        self.yardstick = hashlib.sha256(b"".join([*weights, str(dense).encode()])).hexdigest()[:16]
        self.real = self.classifier.features(reference.images).numpy()
        self.batch: dict[str, Any] = {name: value.to(parts.backbone.device) if isinstance(value, Tensor) else value
                                      for name, value in reference.batch.items()}

    def dense(self, steps: int, chosen: Sequence[int] | None = None) -> Tensor:
        """Samples of the dense model, float32 [N, C, H, W]; `chosen` of the steps: as of `Parts.drawn`."""
        def draw() -> dict[str, Tensor]:
            with self.parts.dense() as backbone:
                return {"images": self.parts.draw(backbone, self.batch, steps, self.config.seed, chosen=chosen)}

        taken = "" if chosen is None else f"-{'-'.join(map(str, chosen))}"
        return self._once(f"dense-{self.config.seed}-{steps}{taken}", draw)["images"]

    def drawn(self, parts: Parts, experts: TemporalExperts, steps: int, chosen: Sequence[int] | None = None) -> Tensor:
        """Samples of a run with its experts, as `dense`."""
        with experts.serving(parts.simulator):
            return parts.draw(parts.backbone.eval(), self.batch, steps, self.config.seed, chosen=chosen)

    def rate(self, images: Tensor) -> dict[str, float]:
        """Fréchet distance with the standard deviation of bootstrapped samples, accuracy, and drift with its error."""
        features = self.classifier.features(images)
        source, count = np.random.default_rng(0), len(features)
        resampled = [frechet_distance(features.numpy()[source.integers(count, size=count)], self.real)
                     for _ in range(_RESAMPLES)]
        moved = drift(features, self.classifier.features(self.dense(MANY_STEPS)))
        return {"fd": frechet_distance(features.numpy(), self.real), "fd_noise": float(np.std(resampled, ddof=1)),
                "accuracy": accuracy(self.classifier, images, self.reference.asked), "drift": moved.value,
                "drift_noise": moved.error}

    def weighted(self, error_B: np.ndarray, edges: np.ndarray | None = None) -> float:
        """Errors of the output as the squared displacement of features that they cause, if it follows them linearly.

        Args:
            error_B: in bins of timesteps, [B]. edges: their borders [B+1]; None: equal ones, as in summary.json.
        """
        equal = self._equal(_BINS)

        def measure() -> dict[str, Tensor]:
            mask_ML = (np.arange(len(self.parts.simulator.sites)) % 3 != 1)[None]
            always = mask_ML, np.zeros(self.parts.noising.num_timesteps, dtype=np.int64)
            probe = Probe(dataclasses.replace(self.config, seed=0), self.parts, 32)  # the same for runs of every seed
            caused_B = probe.against_teacher(mask_ML, equal).mean(axis=2)[0]
            response, _, _ = measure_response(self.config, self.parts, probe, always, equal, caused_B,
                                              {"features": self._features})
            return {"response": torch.from_numpy(response["features"])}

        response_B = self._once("response-marginal", measure)["response"].numpy()
        density_T = np.repeat(response_B / np.diff(equal), np.diff(equal))
        return float(density_T @ np.repeat(error_B, np.diff(self._equal(len(error_B)) if edges is None else edges)))

    def _equal(self, bins: int) -> np.ndarray:
        return np.linspace(0, self.parts.noising.num_timesteps, bins + 1).round().astype(int)

    def _features(self, latents: Tensor, *_: Any) -> Tensor:
        return self.classifier.features(self.parts.images(latents))

    def _once(self, name: str, compute: Any) -> Mapping[str, Tensor]:
        file = self.folder / f"{name}-{self.key}.safetensors"
        if not file.is_file():
            partial = file.with_name(f".{os.getpid()}-{file.name}")  # others may rate beside it
            save_file({key: value.contiguous() for key, value in compute().items()}, partial)
            partial.replace(file)
        return load_file(file)


def demo_classifier(config: Config, reference: DemoReference) -> SmallClassifier:
    """The classifier by which a demo's samples are rated: of the real images, the same for runs of every seed.

    It is trained once, and kept beside the run's pretrained model.
    """
    file = Path(str(config.backbone.pretrained)).with_name(f"classifier-{digest(reference)}.safetensors")
    return kept_classifier(reference.images, reference.targets, 0, file)


def digest(reference: DemoReference) -> str:
    """Of the real images and their classes. Drawn letters depend on the versions of matplotlib and Pillow."""
    return hashlib.sha256(reference.images.numpy().tobytes() + reference.targets.numpy().tobytes()).hexdigest()[:16]
