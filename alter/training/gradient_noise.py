"""How much of a gradient of the paper's search is signal: over many draws of data, timesteps, noise, masks and routes,
at the start of a search."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..common.config import Config
from .run import make_accelerator
from .search.hypernetwork import HypernetworkSearch
from .setup.parts import build
from .trainer import Trainer

_BLOCKS = 10  # of the jackknife


@dataclass(frozen=True)
class GradientNoise:
    """Signal to noise of one update's gradient of L_perf, ‖mean‖ / √(trace of the covariance), with its standard error,
    and the routes at the start.

    Attributes:
        masks: of the mask logits. router: of the router's parameters; None where it has none.
        expert_T: the most probable expert of each timestep, int64 [T]. share_E: of the budget's weights, float64 [E].
    """

    masks: tuple[float, float]
    router: tuple[float, float] | None
    expert_T: np.ndarray
    share_E: np.ndarray


def measure_gradient_noise(config: Config, draws: int) -> GradientNoise:
    """Takes a forward of the teacher, and forward and backward of the backbone, for each of `draws` global batches.

    Args:
        config: with `search.method=hypernetwork`, of one process.
        draws: 20 or more.
    """
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(config)
        parts = build(config, device=accelerator.device)
        trainer = Trainer(config, parts, accelerator, Path(folder))
        search = trainer.search
        assert isinstance(search, HypernetworkSearch)
        search.begin()
        logits, router = search.hypernetwork(), list(search.hypernetwork.temporal_router.parameters())
        found: list[list[np.ndarray]] = [[], []]
        micro_batches = trainer.micro_batches(draws)
        for trainer.step in tqdm(range(draws), unit="draw", desc="gradients", dynamic_ncols=True):
            roots, gradients, _ = search.gradients(logits, trainer._prepare(micro_batches))
            masks, *others = torch.autograd.grad(roots, [logits.mask_EL, *router], gradients, retain_graph=True)
            for kept, parts_of in zip(found, ([masks], others), strict=True):
                flat = [part.double().flatten().cpu().numpy() for part in parts_of]
                kept.append(np.concatenate(flat or [np.empty(0)]))
    expert_T = logits.router_TE.argmax(dim=1).cpu().numpy()
    weight_T = parts.budget.weight_T(len(expert_T))
    share_E = np.bincount(expert_T, weight_T, minlength=config.experts.count)
    return GradientNoise(signal_to_noise(np.array(found[0])), signal_to_noise(np.array(found[1])) if router else None,
                         expert_T, share_E / share_E.sum())


def signal_to_noise(draws_ND: np.ndarray) -> tuple[float, float]:
    """‖mean‖ / √(trace of the covariance) of N draws of D numbers, and its standard error (jackknife over blocks).

    The square is estimated without bias: what ‖mean of N draws‖² owes to their noise is subtracted; 0 where that leaves
    nothing.
    """
    def squared(draws_ND: np.ndarray) -> float:
        variance = draws_ND.var(axis=0, ddof=1).sum()
        return float((draws_ND.mean(axis=0) ** 2).sum() / variance - 1 / len(draws_ND))

    whole, blocks = squared(draws_ND), np.array_split(np.arange(len(draws_ND)), _BLOCKS)
    left_out = np.array([squared(np.delete(draws_ND, block, axis=0)) for block in blocks])
    error = float(np.sqrt((_BLOCKS - 1) / _BLOCKS * ((left_out - left_out.mean()) ** 2).sum()))
    ratio = max(whole, 0.0) ** 0.5
    return ratio, error / (2 * ratio) if ratio**2 > error else error**0.5
