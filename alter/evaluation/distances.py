"""Distances between two sets of features, and scores of one, each from its paper's formula, in float64.

None of them holds a matrix of all pairs: pairwise terms are summed block by block.
"""

from collections.abc import Callable, Iterator

import numpy as np
from scipy.linalg import eigvalsh

BLOCK = 2048  # rows of a block of pairs


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D, D] of features [N, D]."""
    features = features.astype(np.float64)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet(mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray) -> float:
    """|μ1 - μ2|² + tr(Σ1 + Σ2 - 2·(Σ1Σ2)^½) of two Gaussians (Heusel et al., arXiv 1706.08500)."""
    # tr (Σ1Σ2)^½ is the sum of the roots of the eigenvalues of the symmetric Σ1^½ Σ2 Σ1^½.
    values, vectors = np.linalg.eigh(covariance_1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(eigvalsh(root @ covariance_2 @ root).clip(min=0)).sum()
    return float(((mean_1 - mean_2) ** 2).sum() + np.trace(covariance_1) + np.trace(covariance_2) - 2 * cross)


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """`frechet` between the Gaussians fitted to features [N, D] and [M, D]."""
    return frechet(*moments(features), *moments(reference))


def kernel_distance(features: np.ndarray, reference: np.ndarray, subsets: int = 100, size: int = 1000,
                    seed: int = 0) -> tuple[float, float]:
    """KID (arXiv 1801.01401): the unbiased squared MMD with the kernel (x·y/D + 1)³, over random subsets.

    Args:
        features, reference: [N, D] and [M, D]. size: of a subset; at most N and M are taken.

    Returns: mean and standard deviation over subsets.
    """
    size = min(size, len(features), len(reference))
    source = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x, y = (_some(source, part, size) for part in (features, reference))
        xx, yy, xy = (_polynomial(*pair) for pair in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        values.append(within - 2 * xy.mean())
    return float(np.mean(values)), float(np.std(values))


def _some(source: np.random.Generator, features: np.ndarray, size: int) -> np.ndarray:
    return features[source.choice(len(features), size, replace=False)].astype(np.float64)


def _polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_mmd(features: np.ndarray, reference: np.ndarray, sigma: float = 10.0, block: int = BLOCK) -> float:
    """CMMD (arXiv 2401.09603): 1000 times the biased squared MMD with the kernel exp(-|x - y|²/2σ²).

    Args:
        features, reference: CLIP embeddings [N, D] and [M, D]; scaled to unit length here.
    """
    x, y = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in
            (features.astype(np.float64), reference.astype(np.float64)))

    def mean_kernel(a: np.ndarray, b: np.ndarray) -> float:
        total = sum(np.exp(-_squared(rows, b) / (2 * sigma**2)).sum() for rows in _blocks(a, block))
        return float(total) / (len(a) * len(b))

    return 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def gaussian_mmd_deviation(features: np.ndarray, reference: np.ndarray, resamples: int, sigma: float = 10.0,
                           block: int = BLOCK, seed: int = 0) -> float:
    """Standard deviation of `gaussian_mmd` over bootstrap resamples of the features, in one pass over the pairs."""
    x, y = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in
            (features.astype(np.float64), reference.astype(np.float64)))
    count, source = len(x), np.random.default_rng(seed)
    share_NR = np.stack([np.bincount(source.integers(count, size=count), minlength=count) / count
                         for _ in range(resamples)], axis=1)
    within, across, first = np.zeros(resamples), np.zeros(resamples), 0
    for rows in _blocks(x, block):
        weights = share_NR[first : first + len(rows)]
        within += (weights * (np.exp(-_squared(rows, x) / (2 * sigma**2)) @ share_NR)).sum(0)
        across += (weights * np.exp(-_squared(rows, y) / (2 * sigma**2)).mean(1)[:, None]).sum(0)
        first += len(rows)
    return float(1000 * np.std(within - 2 * across, ddof=1))


def precision_recall(features: np.ndarray, reference: np.ndarray, neighbours: int = 3,
                     block: int = BLOCK) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991).

    Precision: the share of features within the manifold of the reference, the union of the balls around its points
    that reach their `neighbours`-th neighbour; recall: the reverse.
    """
    x, y = features.astype(np.float64), reference.astype(np.float64)

    def radii(points: np.ndarray) -> np.ndarray:
        return np.concatenate([np.partition(_squared(rows, points), neighbours, axis=1)[:, neighbours]
                               for rows in _blocks(points, block)])

    def covered(points: np.ndarray, manifold: np.ndarray) -> float:
        radius = radii(manifold)
        inside = [(_squared(rows, manifold) <= radius).any(axis=1) for rows in _blocks(points, block)]
        return float(np.concatenate(inside).mean())

    return covered(x, y), covered(y, x)


def _blocks(points: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (points[first : first + size] for first in range(0, len(points), size))


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances of all pairs [len(a), len(b)], up to rounding, at least 0."""
    return ((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T).clip(min=0)


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """exp of the mean KL divergence of p(y|x) from p(y) (arXiv 1606.03498), in `splits` parts of a random order.

    Args:
        logits: [N, classes].

    Returns: mean and standard deviation over the parts.
    """
    order = np.random.default_rng(seed).permutation(len(logits))
    shifted = logits[order].astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    scores = []
    for part in np.array_split(log_p, min(splits, len(log_p))):
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(axis=0).clip(min=1e-300)))).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def bootstrap_deviation(measure: Callable[[np.ndarray], float], count: int, resamples: int, seed: int = 0) -> float:
    """Standard deviation of `measure(rows)` over draws of `count` row numbers with replacement.

    The deviation, not percentiles: a Fréchet distance of resampled rows is larger than that of the rows themselves.
    """
    source = np.random.default_rng(seed)
    return float(np.std([measure(source.integers(count, size=count)) for _ in range(resamples)], ddof=1))
