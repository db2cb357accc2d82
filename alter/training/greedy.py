"""Masks without a search: layers are removed one after the other, each time the one that the samples miss least."""

import numpy as np
from tqdm import tqdm

from ..common.config import Config
from ..method.budget import TOLERANCE
from .probe import Probe
from .sensitivity import Sensitivity, allocate
from .setup.parts import Parts


def remove_greedily(config: Config, parts: Parts, table: Sensitivity, experts: int,
                    samples: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Masks bool [E, L] and the expert of each timestep int64 [T] at the budget of `parts`.

    The experts' intervals are `allocate`'s. Among all layers of all experts, the next to go has the least increase of
    the output's mean squared error, weighted by the samples' response to it, per cost saved; measured with what that
    expert has lost already, since errors need not add up. Removals that would fall short of the budget come last, and
    only where they bring the keep ratio nearer to it. Takes up to E·L²/2 forwards of `samples` samples.
    """
    _, expert_T = allocate(table, parts.budget, experts)
    probe, budget = Probe(config, parts, samples), parts.budget
    timesteps_E, response_T = np.bincount(expert_T), np.repeat(table.response_B, np.diff(table.edges))
    averaged = budget.averaged(expert_T)
    counted_E = np.bincount(averaged, minlength=len(timesteps_E))
    cost_EL = counted_E[:, None] / len(averaged) * budget.share_L / budget.scale
    mask_EL, worth_EL = np.ones(cost_EL.shape, dtype=bool), np.zeros(cost_EL.shape)
    error_E = np.zeros(len(mask_EL))

    def look(e: int) -> None:
        """Measure what each layer that expert e still has is worth."""
        served, kept = np.flatnonzero(expert_T == e), np.flatnonzero(mask_EL[e])
        without = np.repeat(mask_EL[e][None], len(kept), axis=0)
        without[np.arange(len(kept)), kept] = False
        errors, _ = probe.errors(without, int(served[0]), int(served[-1]) + 1, response_T)
        worth_EL[e, kept] = timesteps_E[e] * (errors - error_E[e])

    stale = set(range(len(mask_EL)))  # experts to look at again
    with tqdm(unit="layer", desc="greedy removal", dynamic_ncols=True) as bar:
        while True:
            surplus = budget.measured(mask_EL, expert_T) - budget.keep_ratio
            removable = mask_EL & (mask_EL.sum(1, keepdims=True) > 1) & (cost_EL > 0)
            fitting, nearer = removable & (cost_EL <= surplus + TOLERANCE), removable & (cost_EL < 2 * surplus)
            if surplus <= TOLERANCE or not nearer.any():
                return mask_EL, expert_T
            for e in stale:
                look(e)
            chosen = fitting if fitting.any() else nearer
            first = np.where(chosen, worth_EL / np.where(chosen, cost_EL, 1.0), np.inf).argmin()
            e, layer = divmod(int(first), mask_EL.shape[1])
            mask_EL[e, layer] = False
            error_E[e] += worth_EL[e, layer] / timesteps_E[e]
            stale = {e}
            bar.update()
