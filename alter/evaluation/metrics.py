"""Which features each metric is made of, by which protocol."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .distances import (
    bootstrap_deviation,
    frechet,
    gaussian_mmd,
    gaussian_mmd_deviation,
    inception_score,
    kernel_distance,
    moments,
    precision_recall,
)


@dataclass(frozen=True)
class Metric:
    """How a value comes from the features [N, D] of the images and something to compare them with.

    Attributes:
        network, features: what is extracted.
        against: "statistics" (mean, covariance) or "features" of the reference, "texts" (embeddings of the prompts),
            or "" for nothing.
        measure: from features and those to a dictionary with "value".
        deviation: the standard deviation of its value, from features, those to compare with, the value and the number
            of bootstrap resamples.
    """

    network: str
    features: str
    against: str
    protocol: str
    measure: Callable[[np.ndarray, Any], dict[str, float]]
    deviation: Callable[[np.ndarray, Any, float, int], float]


def _bootstrap(measure: Callable[[np.ndarray, Any], dict[str, float]], paired: bool = False) -> Callable:
    """Of any measure; `paired` resamples what it is compared with alike."""
    def deviation(x: np.ndarray, y: Any, value: float, resamples: int) -> float:
        return bootstrap_deviation(lambda rows: measure(x[rows], y[rows] if paired else y)["value"], len(x), resamples)
    return deviation


def _frechet(x: np.ndarray, y: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    return {"value": frechet(*moments(x), *y)}


def _kid(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    value, deviation = kernel_distance(x, y)
    return {"value": value, "deviation_of_subsets": deviation}


def _inception_score(x: np.ndarray, _: None) -> dict[str, float]:
    value, deviation = inception_score(x)
    return {"value": value, "deviation_of_splits": deviation}


def _precision_recall(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    precision, recall = precision_recall(x, y)
    return {"value": precision, "precision": precision, "recall": recall}


def _clip_score(x: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """100 · mean max(0, cos) (Hessel et al., arXiv 2104.08718)."""
    a, b = x.astype(np.float64), texts.astype(np.float64)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {"value": float(100 * cosines.clip(min=0).mean())}


def _few_subsets(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    return {"value": kernel_distance(x, y, subsets=10)[0]}


def _share_deviation(x: np.ndarray, y: Any, value: float, resamples: int) -> float:
    """Of a share of N features: what a bootstrap with the manifold as it is tends to."""
    return float(np.sqrt(value * (1 - value) / len(x)))


def _mmd_deviation(x: np.ndarray, y: np.ndarray, value: float, resamples: int) -> float:
    return gaussian_mmd_deviation(x, y, resamples)


_FD = "Fréchet distance of pool features"
_SPREAD = _bootstrap(_frechet)
_KD = "100 subsets of at most 1000, cubic kernel, unbiased"
METRICS = {
    "fid": Metric("clean", "pool", "statistics", f"{_FD}, clean-fid's resizing", _frechet, _SPREAD),
    "fid_legacy": Metric("legacy", "pool", "statistics", f"{_FD}, TensorFlow 1's resizing (ADM)", _frechet, _SPREAD),
    "kid": Metric("clean", "pool", "features", f"{_KD}, clean-fid's resizing", _kid, _bootstrap(_few_subsets)),
    "kid_legacy": Metric("legacy", "pool", "features", f"{_KD}, TensorFlow 1's resizing", _kid,
                         _bootstrap(_few_subsets)),
    "is": Metric("legacy", "logits", "", "10 parts of a random order, logits without bias", _inception_score,
                 _bootstrap(_inception_score)),
    "prc": Metric("legacy", "pool", "features", "precision (value) and recall, 3 neighbours", _precision_recall,
                  _share_deviation),
    "sfid": Metric("legacy", "spatial", "statistics", "Fréchet distance of ADM's spatial features", _frechet, _SPREAD),
    "fd_dinov2": Metric("dinov2", "token", "statistics", "Fréchet distance of class tokens", _frechet, _SPREAD),
    "clip": Metric("clip", "embedding", "texts", "100 times the mean cosine, at least 0, of image and prompt",
                   _clip_score, _bootstrap(_clip_score, paired=True)),
    "cmmd": Metric("cmmd", "embedding", "features", "Gaussian kernel, sigma 10, biased, times 1000",
                   lambda x, y: {"value": gaussian_mmd(x, y)}, _mmd_deviation),
}
