"""Which mask of a family serves which timesteps, for every budget at once: exact, by dynamic programming.

Axes: M masks, B bins of timesteps (or steps of a sampler, in their order), S samples.
"""

from dataclasses import dataclass

import numpy as np

_GRAINS = 4000  # units of cost between 0 and the dearest choice


@dataclass(frozen=True)
class Choice:
    """The mask of each bin, int64 [B], with the sums of what they cost and lose."""

    mask_B: np.ndarray
    cost: float
    loss: float


class Frontier:
    """The least loss for every budget: min Σ_b loss[m_b, b] subject to Σ_b cost[m_b, b] <= budget.

    At most `intervals` runs of bins with one mask each, by dynamic programming over bins, runs, the present mask and
    costs in multiples of 1/4000 of the dearest choice; of every multiple the best loss, with its exact cost.

    Args:
        loss_MB, cost_MB: of mask m in bin b, float64, costs >= 0 and not all 0. intervals: >= 1; None: any number.
    """

    def __init__(self, loss_MB: np.ndarray, cost_MB: np.ndarray, intervals: int | None = None) -> None:
        masks, bins = loss_MB.shape
        self._free = intervals is None or intervals >= bins
        runs = 1 if intervals is None or self._free else intervals
        grain = cost_MB.max(axis=0).sum() / _GRAINS
        width_MB = np.rint(cost_MB / grain).astype(int)
        size = int(width_MB.max(axis=0).sum()) + 1
        kept = 1 if self._free else masks  # of free choices, what the present mask is does not matter
        loss_RMG = np.full((runs, kept, size), np.inf)
        spent_RMG = np.zeros((runs, kept, size))
        loss_RMG[0, :, 0] = 0
        # The former bin's mask; of free choices, this bin's.
        self._before = np.zeros((bins, runs, kept, size), dtype=np.int16)
        for b in range(bins):
            new, spent = np.full((runs, masks, size), np.inf), np.zeros((runs, masks, size))
            best_RG = loss_RMG.argmin(axis=1)
            for run in range(runs if b else 1):
                for m in range(masks):
                    width = width_MB[m, b]
                    own = 0 if self._free else m
                    before = loss_RMG[run, own], spent_RMG[run, own], np.full(size, m)
                    if run > 0:
                        g = np.arange(size)
                        switched = np.where(best_RG[run - 1] == m, np.inf, loss_RMG[run - 1, best_RG[run - 1], g])
                        better = switched < before[0]
                        before = (np.where(better, switched, before[0]),
                                  np.where(better, spent_RMG[run - 1, best_RG[run - 1], g], before[1]),
                                  np.where(better, best_RG[run - 1], before[2]))
                    left = size - width
                    new[run, m, width:] = before[0][:left] + loss_MB[m, b]
                    spent[run, m, width:] = before[1][:left] + cost_MB[m, b]
                    if not self._free:
                        self._before[b, run, m, width:] = before[2][:left]
            if self._free:
                best_RMG = new.argmin(axis=1, keepdims=True)
                new, spent = np.take_along_axis(new, best_RMG, 1), np.take_along_axis(spent, best_RMG, 1)
                self._before[b] = best_RMG
            loss_RMG, spent_RMG = new, spent
        self._loss_RMG, self._spent_RMG, self._width_MB = loss_RMG, spent_RMG, width_MB
        self._loss_MB, self._cost_MB = loss_MB, cost_MB

    def within(self, budget: float) -> Choice:
        """The least loss at a cost of at most `budget`.

        Raises:
            ValueError: if every choice costs more.
        """
        allowed = np.where(self._spent_RMG <= budget * (1 + 1e-9), self._loss_RMG, np.inf)
        run, m, g = map(int, np.unravel_index(int(allowed.argmin()), allowed.shape))
        if not np.isfinite(allowed[run, m, g]):
            return self._cheapest(budget)  # which shares its multiple of cost with a better one
        masks = []
        for b in reversed(range(self._loss_MB.shape[1])):
            before = int(self._before[b, run, m, g])
            masks.append(before if self._free else m)
            g -= int(self._width_MB[masks[-1], b])
            if not self._free:
                run -= int(before != m)
                m = before
        mask_B = np.array(masks[::-1], dtype=np.int64)
        return self._choice(mask_B)

    def _cheapest(self, budget: float) -> Choice:
        """Of free choices the cheapest mask of each bin, else the cheapest single one."""
        single = np.full(self._cost_MB.shape[1], self._cost_MB.sum(axis=1).argmin())
        choice = self._choice(self._cost_MB.argmin(axis=0) if self._free else single)
        if choice.cost > budget * (1 + 1e-9):
            raise ValueError(f"budget={budget}: the cheapest choice costs {choice.cost}")
        return choice

    def _choice(self, mask_B: np.ndarray) -> Choice:
        chosen = mask_B, np.arange(len(mask_B))
        return Choice(mask_B, float(self._cost_MB[chosen].sum()), float(self._loss_MB[chosen].sum()))


def likely(cost_M: np.ndarray, low: float, high: float, spread: float = 0.2) -> np.ndarray:
    """How often each mask is trained while budgets from low to high are searched for, float64 [M] of sum 1: those
    between alike, those beyond by a Gaussian of their distance in cost."""
    away_M = np.maximum(np.maximum(low - cost_M, cost_M - high), 0)
    likely_M = np.exp(-0.5 * (away_M / spread) ** 2)
    return likely_M / likely_M.sum()


@dataclass(frozen=True)
class Gain:
    """By what share several masks lower the loss of one, at equal cost: mean and 90% interval."""

    mean: float
    low: float
    high: float


def smoothed(loss_MBS: np.ndarray) -> np.ndarray:
    """Mean losses of samples, each drawn towards that of its neighbouring bins as far as noise explains how it differs.

    In logarithms: d_b is x_b minus the mean of x_{b-1} and x_{b+1}; v_b the variance of d_b that the samples' noise
    causes, c_b its covariance with x_b, and s, one for all, what d² has in the mean beyond v. The best linear estimate
    is then x_b - d_b·c_b / (v_b + s). Both ends stay, and masks that somewhere lose nothing.

    Args:
        loss_MBS: float64, >= 0; of each sample.

    Returns: float64 [M, B].
    """
    loss_MB, samples = loss_MBS.mean(axis=2), loss_MBS.shape[2]
    lossy_M = (loss_MB > 0).all(axis=1)
    if loss_MB.shape[1] < 3 or samples < 2 or not lossy_M.any():
        return loss_MB

    def bent(value: np.ndarray) -> np.ndarray:
        return value[:, 1:-1] - (value[:, :-2] + value[:, 2:]) / 2

    log_MB, part_MBS = np.log(loss_MB[lossy_M]), loss_MBS[lossy_M] / loss_MB[lossy_M][..., None] - 1
    bend_MB, bend_MBS = bent(log_MB), bent(part_MBS)
    noise_MB = (bend_MBS**2).sum(axis=2) / (samples - 1) / samples
    shared_MB = (part_MBS[:, 1:-1] * bend_MBS).sum(axis=2) / (samples - 1) / samples
    whole_MB = noise_MB + max(float((bend_MB**2 - noise_MB).mean()), 0.0)
    pull_MB = np.divide(shared_MB, whole_MB, out=np.zeros_like(whole_MB), where=whole_MB > 0).clip(0, 1)
    log_MB[:, 1:-1] -= pull_MB * bend_MB
    loss_MB[lossy_M] = np.exp(log_MB)
    return loss_MB


def interval(loss_S: np.ndarray, image_S: np.ndarray, seed: int = 0, rounds: int = 1000) -> tuple[float, float]:
    """Between what the mean loss of samples lies in 90% of resamples of their images, which may serve several."""
    place_S = _places(image_S)
    sum_I, count_I = np.bincount(place_S, loss_S), np.bincount(place_S)
    drawn_RI = np.random.default_rng(seed).integers(len(sum_I), size=(rounds, len(sum_I)))
    low, high = np.quantile(sum_I[drawn_RI].sum(axis=1) / count_I[drawn_RI].sum(axis=1), [0.05, 0.95])
    return float(low), float(high)


def _places(image_S: np.ndarray) -> np.ndarray:
    """The images counted from 0, int64 [S]; the samples, where all are of one image."""
    place_S = np.unique(image_S, return_inverse=True)[1]
    return place_S if place_S.any() else np.arange(len(image_S))


def gain(loss_MBS: np.ndarray, cost_MB: np.ndarray, budget: float, intervals: int, image_S: np.ndarray, seed: int = 0,
         rounds: int = 40) -> Gain:
    """What masks over time would gain over one, judged by images on which they were not chosen.

    In each round masks are chosen by the samples of one random half of the images, and compared on the others. The
    single mask may lie on either side of the budget, so its loss is interpolated, between its neighbours in cost, at
    the cost that the several masks have.

    Args:
        loss_MBS: float64; of each sample. cost_MB: as of `Frontier`. budget: of the sum of costs. image_S: which image
            each sample is of.
    """
    place_S, source = _places(image_S), np.random.default_rng(seed)
    images = int(place_S.max()) + 1
    gains = []
    for _ in range(rounds):
        chosen_S = np.isin(place_S, source.permutation(images)[: images // 2])
        half, other = smoothed(loss_MBS[..., chosen_S]), loss_MBS[..., ~chosen_S].mean(axis=2)
        chosen = Frontier(half, cost_MB, intervals).within(budget)
        lost = float(other[chosen.mask_B, np.arange(len(chosen.mask_B))].sum())
        single = _interpolated(half, other, cost_MB.sum(axis=1), chosen.cost)
        gains.append(1 - lost / single if single > 0 else 0.0)
    return Gain(float(np.mean(gains)), *map(float, np.quantile(gains, [0.05, 0.95])))


def _interpolated(half_MB: np.ndarray, other_MB: np.ndarray, cost_M: np.ndarray, cost: float) -> float:
    """The loss on the other half of the single masks that are best on the first, at this cost."""
    best = [m for m in np.argsort(cost_M, kind="stable")
            if half_MB[m].sum() <= half_MB[cost_M <= cost_M[m]].sum(axis=1).min()]
    return float(np.interp(cost, cost_M[best], other_MB[best].sum(axis=1)))
