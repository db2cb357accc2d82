"""How many steps, and which mask at each: what the samples of a plan are predicted to differ from many dense steps'.

Two displacements are added: that of the solver with fewer steps, dense, and that of the masks, at each step the share
of `Measured.loss_MB` that falls to the timesteps which the step covers.
"""

from dataclasses import dataclass, replace

import numpy as np

from .allocation import Frontier
from .budget import nearest


def covered(visited: np.ndarray, num_timesteps: int) -> np.ndarray:
    """Which step covers each training timestep, int64 [T]: the last one that visits it or one above.

    Those above the first visited timestep belong to the first step.

    Args:
        visited: decreasing training timesteps of the steps, [N].
    """
    return np.searchsorted(-visited, -np.arange(num_timesteps), side="right").clip(1) - 1


def step_losses(loss_MB: np.ndarray, edges: tuple[int, ...], visited: np.ndarray) -> np.ndarray:
    """What each step has of the squared displacement of final samples when mask m is in force there, float64 [M, N].

    Args:
        loss_MB: in bins of timesteps between `edges`. visited: as of `covered`.
    """
    density_MT = np.repeat(loss_MB / np.diff(edges), np.diff(edges), axis=1)
    step_T = covered(visited, edges[-1])
    return np.stack([np.bincount(step_T, density_T, len(visited)) for density_T in density_MT])


def choose_steps(gram_NN: np.ndarray, weight_N: np.ndarray) -> dict[int, np.ndarray]:
    """Which of a fine sampler's N steps to take, for each number of steps n: int64 [n], ascending from 0.

    At a step that is left out, a solver goes on with what it makes of the outputs of the last two steps taken. What no
    two numbers times these two explain of the output there, times `weight_N`, is lost. The least sum over all steps
    that are left out is found by dynamic programming over the last two steps taken.

    Args:
        gram_NN: inner products of the outputs at the N steps, mean over samples. weight_N: of errors of the output.
    """
    count = len(gram_NN)
    lost = np.full((count + 1, count, count + 1), np.inf)  # [former + 1, last, next]; former is -1 where last is 0
    for last in range(count):
        for former in range(last) if last else (-1,):
            left_out = np.arange(last + 1, count)
            errors = weight_N[left_out] * _unexplained(gram_NN, left_out, [last] if former < 0 else [last, former])
            lost[former + 1, last, last + 1 :] = np.concatenate([[0.0], errors.cumsum()])
    best, origins, found = np.full((count + 1, count), np.inf), list[np.ndarray](), {}
    best[0, 0] = 0.0
    for steps in range(1, count + 1):
        ends = best + lost[:, :, count]
        row, end = divmod(int(ends.argmin()), count)
        taken, state = [end], row - 1
        for origin in reversed(origins):
            taken.append(state)
            state = int(origin[state, taken[-2]]) - 1
        found[steps] = np.array(taken[::-1])
        options = best[:, :, None] + lost[:, :, :count]
        origins.append(options.argmin(axis=0))
        best = np.concatenate([np.full((1, count), np.inf), options.min(axis=0)])
    return found


def _unexplained(gram_NN: np.ndarray, steps: np.ndarray, known: list[int]) -> np.ndarray:
    """The squared rest of the outputs at `steps` after their best fit by those at `known`, float64 [steps]."""
    own, cross = gram_NN[known][:, known], gram_NN[known][:, steps]
    fit = np.linalg.solve(own + 1e-6 * np.trace(own) * np.eye(len(known)), cross)
    rest = gram_NN[steps, steps] - 2 * (fit * cross).sum(axis=0) + (fit * (own @ fit)).sum(axis=0)
    return rest.clip(0)


def routes(mask_N: np.ndarray, visited: np.ndarray, num_timesteps: int) -> np.ndarray:
    """The mask of each training timestep, that of the nearest visited one, int64 [T]."""
    place = {int(timestep): step for step, timestep in enumerate(visited)}
    return np.array([mask_N[place[int(timestep)]] for timestep in nearest(num_timesteps, visited)])


@dataclass(frozen=True)
class Option:
    """A number of steps N with the mask of each, int64 [N]; their cost; and the predicted squared displacement, of
    which `discretisation` is the solver's own. dense: with the dense model's own weights. cached: layers that a step
    skips add what they added at the step before that ran them; `error` is without that."""

    mask_N: np.ndarray
    cost: float
    error: float
    discretisation: float
    dense: bool = False
    cached: bool = False

    @property
    def steps(self) -> int:
        """N."""
        return len(self.mask_N)


class Front:
    """The least predicted displacement for every cost, over numbers of steps and masks.

    Args:
        losses: by number of steps, `step_losses` [M, N]. costs_M: of one step with mask m, float64 [M].
        discretisation: by number of steps, the displacement of that many dense steps. full: the mask that keeps every
            layer. dense: whether it may be had with the dense model's own weights, which lose nothing by it.
    """

    def __init__(self, losses: dict[int, np.ndarray], cost_M: np.ndarray, discretisation: dict[int, float], full: int,
                 dense: bool = False) -> None:
        self.losses, self.cost_M, self.discretisation = losses, cost_M, discretisation
        self.full, self.dense = full, dense
        self._frontiers = {steps: Frontier(loss, np.repeat(cost_M[:, None], steps, axis=1))
                           for steps, loss in losses.items()}

    def within(self, cost: float) -> Option:
        """The best at a cost of at most `cost`.

        Raises:
            ValueError: if every option costs more.
        """
        fitting = [self._option(steps, cost) for steps in self.losses if steps * self.cost_M.min() <= cost]
        if not fitting:
            raise ValueError(f"cost={cost}: the cheapest option costs {min(self.losses) * self.cost_M.min()}")
        control = self.fewer_steps(cost) if self.dense else None
        return min(filter(None, (*fitting, control)), key=lambda option: option.error)

    def fewer_steps(self, cost: float) -> Option | None:
        """The best number of steps of every layer that cost at most `cost`; None: there is none."""
        fitting = [steps for steps in self.losses if steps * self.cost_M[self.full] <= cost * (1 + 1e-9)]
        return min(map(self.everything, fitting), key=lambda option: option.error) if fitting else None

    def one_mask(self, cost: float) -> Option | None:
        """The best of one mask at all steps that costs at most `cost`; None: there is none."""
        options = (self.with_mask(steps, mask) for steps in self.losses for mask in range(len(self.cost_M)))
        fitting = [option for option in options if option.cost <= cost * (1 + 1e-9)]
        return min(fitting, key=lambda option: option.error) if fitting else None

    def cached(self, cost: float, period: int) -> Option | None:
        """Every layer at the first of every `period` steps, and at the others one other mask, whose skipped layers are
        cached: as many steps as cost at most `cost`, and the mask that loses least. None: there is none."""
        for steps in sorted(self.losses, reverse=True):
            others = np.arange(steps) % period > 0
            left = cost * (1 + 1e-9) - self.cost_M[self.full] * (~others).sum()
            fitting = np.flatnonzero((self.cost_M * others.sum() <= left) & (np.arange(len(self.cost_M)) != self.full))
            if others.any() and len(fitting):
                lost_M = self.losses[steps][:, others].sum(axis=1)
                mask = int(fitting[lost_M[fitting].argmin()])
                mask_N, solver = np.where(others, mask, self.full), self.discretisation[steps]
                lost = float(self.losses[steps][mask_N, np.arange(steps)].sum())
                return Option(mask_N, float(self.cost_M[mask_N].sum()), solver + lost, solver, cached=True)
        return None

    def everything(self, steps: int) -> Option:
        """Every layer at all of so many steps, by the dense model where it may be had."""
        option = self.with_mask(steps, self.full)
        return replace(option, error=option.discretisation, dense=True) if self.dense else option

    def with_mask(self, steps: int, mask: int) -> Option:
        """One mask at all of so many steps."""
        solver = self.discretisation[steps]
        return Option(np.full(steps, mask), steps * float(self.cost_M[mask]),
                      solver + float(self.losses[steps][mask].sum()), solver)

    def cheapest(self, error: float, tolerance: float = 1e-3) -> Option:
        """The cheapest whose predicted displacement is at most `error`, by bisection to a `tolerance` of its cost.

        Raises:
            ValueError: if none is that near.
        """
        high = max(steps for steps in self.losses) * float(self.cost_M.max())
        low, best = 0.0, self.within(high)
        if best.error > error:
            raise ValueError(f"error={error}: the least that is predicted is {best.error}")
        while high - low > tolerance * high:
            middle = (low + high) / 2
            try:
                option = self.within(middle)
            except ValueError:
                option = None
            if option is not None and option.error <= error:
                high, best = min(middle, option.cost), option
            else:
                low = middle
        return best

    def _option(self, steps: int, cost: float) -> Option:
        choice, solver = self._frontiers[steps].within(cost), self.discretisation[steps]
        return Option(choice.mask_B, choice.cost, solver + choice.loss, solver)


def between(measured: dict[int, float], steps: int) -> float:
    """The discretisation at `steps`, on straight lines in the logarithms between the numbers of steps measured."""
    known = sorted(measured)
    return float(np.exp(np.interp(np.log(steps), np.log(known), np.log([max(measured[n], 1e-30) for n in known]))))
