"""What each layer is worth at each timestep: how far the dense model's output moves when it alone is skipped."""

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from tqdm import tqdm

from .budget import Budget
from .build import Parts
from .config import Config
from .data import Tolerant, collate, split
from .diffusion import generator, training_target
from .errors import InputError
from .files import write_text
from .hypernetwork import Logits
from .losses import mse_per_sample
from .simulator import HardRows

FILE_NAME = "sensitivity.json"


@dataclass(frozen=True)
class Sensitivity:
    """A table of layers × bins of timesteps.

    sites: names [L]. edges: bin b holds the timesteps from edges[b] up to edges[b+1], [B+1]. samples: of each bin.
    error_LB: mean squared change of the output when layer l alone is skipped, float64 [L, B].
    denoise_B: mean squared error of the dense model against the scheduler's target, float64 [B].
    """

    sites: tuple[str, ...]
    edges: tuple[int, ...]
    samples: int
    error_LB: np.ndarray
    denoise_B: np.ndarray

    @property
    def relative_LB(self) -> np.ndarray:
        """The change in units of the dense model's own error at these timesteps."""
        return self.error_LB / self.denoise_B

    @property
    def agreement(self) -> float:
        """Mean Spearman correlation between the layer rankings of two bins: 1 where all bins rank layers alike."""
        bins = self.error_LB.shape[1]
        correlation = np.atleast_2d(np.corrcoef(rankdata(self.error_LB, axis=0), rowvar=False))
        return float(correlation[np.triu_indices(bins, 1)].mean()) if bins > 1 else 1.0

    def gain(self, budget: Budget, experts: int) -> float:
        """How many times more error one mask for all timesteps makes than `experts` masks, if errors added up."""
        one, several = (self.predicted_error(*allocate(self, budget, count)) for count in (1, experts))
        return one / several if several > 0 else 1.0

    def predicted_error(self, mask_EL: np.ndarray, expert_T: np.ndarray) -> float:
        """Mean over timesteps of the sum of the errors of the skipped layers."""
        error_LT = np.repeat(self.error_LB, np.diff(self.edges), axis=1)
        return float((error_LT * ~mask_EL[expert_T].T).sum(axis=0).mean())

    def save(self, file: Path) -> None:
        content = {name: value.tolist() if isinstance(value, np.ndarray) else value
                   for name, value in asdict(self).items()}
        write_text(file, json.dumps({"alter_sensitivity": 1, **content}) + "\n")

    @classmethod
    def load(cls, file: Path) -> "Sensitivity":
        """Raises InputError if it is no such file."""
        try:
            content = json.loads(file.read_bytes())
            if content.pop("alter_sensitivity") != 1:
                raise ValueError("another version")
            error_LB, denoise_B = (np.array(content[name], dtype=np.float64) for name in ("error_LB", "denoise_B"))
            return cls(tuple(content["sites"]), tuple(content["edges"]), content["samples"], error_LB, denoise_B)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise InputError(f"{file}: no sensitivity table ({type(error).__name__}: {error}): measure it with "
                             "scripts/sensitivity.py") from None


@torch.no_grad()
def measure_sensitivity(config: Config, parts: Parts, bins: int = 10, samples: int = 32,
                        batch_size: int = 16) -> Sensitivity:
    """One pass over `samples` held-out samples (or, without any, training samples) a bin: L + 1 forwards each.

    The same samples and noise in every bin, so that bins differ by their timesteps alone; those are spread evenly.
    """
    train, held_out = split(parts.source, config.data.holdout, config.seed)
    indices = np.resize(held_out if len(held_out) else train, samples)
    source = Tolerant(parts.source, indices, config.seed, parts.fit)
    steps = parts.scheduler.config.num_train_timesteps
    edges = np.linspace(0, steps, bins + 1).round().astype(int)
    sites, device = len(parts.simulator.sites), parts.backbone.device
    error_LB, denoise_B = np.zeros((sites, bins)), np.zeros(bins)
    was_training = parts.backbone.training
    parts.backbone.eval()
    with tqdm(total=samples * bins, unit="sample", desc="sensitivity", dynamic_ncols=True) as bar:
        for first in range(0, samples, batch_size):
            keys = [(k, int(indices[k])) for k in range(first, min(first + batch_size, samples))]
            batch = _to(collate([source[key] for key in keys]), device)
            random = generator(config.seed, first, 3)
            latents = parts.latents(batch, torch.randn(len(keys), *parts.latent_shape, generator=random))
            noise = torch.randn(latents.shape, generator=random).to(latents)
            conditioning = parts.conditioning(batch, torch.zeros(len(keys), dtype=torch.bool))
            for b, (low, high) in enumerate(pairwise(edges)):
                positions = np.arange(first, first + len(keys)) + 0.5
                timesteps = torch.from_numpy((low + positions / samples * (high - low)).astype(np.int64))
                error_LB[:, b] += _errors(parts, latents, noise, timesteps, conditioning, denoise_B[b : b + 1])
                bar.update(len(keys))
    parts.backbone.train(was_training)
    return Sensitivity(tuple(site.name for site in parts.simulator.sites), tuple(map(int, edges)), samples,
                       error_LB / samples, denoise_B / samples)


def _errors(parts: Parts, latents: Tensor, noise: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor],
            denoise: np.ndarray) -> np.ndarray:
    """The batch's summed errors [L]; that of the dense model is added to `denoise` [1]."""
    there = timesteps.to(latents.device)
    noisy = parts.scheduler.add_noise(latents, noise, there)
    sites = len(parts.simulator.sites)

    def predict(mask: Tensor) -> Tensor:
        rows = HardRows(mask.expand(len(timesteps), sites), latents.device)
        with parts.simulator.use(rows):
            return parts.backbone(noisy, there, **conditioning).sample.float()

    dense = predict(torch.ones(sites, dtype=torch.bool))
    target = training_target(parts.scheduler, latents, noise, there)
    denoise += mse_per_sample(dense[:, : target.shape[1]], target).sum().item()
    keep = ~torch.eye(sites, dtype=torch.bool)
    return np.array([mse_per_sample(predict(mask), dense).sum().item() for mask in keep])


def allocate(table: Sensitivity, budget: Budget, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks bool [E, L] and the expert of each timestep int64 [T] that make little error, if errors added up.

    Each expert serves consecutive bins. For each of several prices of a unit of cost, dynamic programming finds the
    borders that are best at it; the masks come from the budget's integer programme, with the avoided errors as
    log-odds; the least predicted error wins.
    """
    lengths = np.diff(table.edges)
    weighted_LB = table.error_LB * lengths
    worth = weighted_LB / (budget.share_L[:, None] * lengths)
    found = {}
    for price in np.quantile(worth, np.linspace(0.02, 0.98, 25)):
        borders = _segments(weighted_LB, budget.share_L, lengths, min(experts, len(lengths)), float(price))
        if borders in found:
            continue
        segments = list(pairwise(borders))
        expert_T = np.repeat(np.arange(len(segments)), [lengths[first:last].sum() for first, last in segments])
        avoided_EL = np.array([weighted_LB[:, first:last].sum(1) for first, last in segments])
        router_TE = (expert_T[:, None] == np.arange(len(segments))).astype(float)
        logits = Logits(torch.from_numpy(avoided_EL / avoided_EL.max()), torch.from_numpy(router_TE))
        found[borders] = budget.masks(logits, budget.keep_ratio)
    return min(found.values(), key=lambda pair: table.predicted_error(*pair))


def _segments(weighted_LB: np.ndarray, share_L: np.ndarray, lengths: np.ndarray, experts: int,
              price: float) -> tuple[int, ...]:
    """The cheapest borders [E + 1] of consecutive bins, a layer costing its error or else its share at the price."""
    bins = len(lengths)
    error_LB, length_B = (np.concatenate([np.zeros_like(part[..., :1]), part.cumsum(-1)], axis=-1)
                          for part in (weighted_LB, lengths))
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, (0,))}
    for count in range(1, experts + 1):
        for last in range(count, bins + 1):
            options = []
            for first in range(count - 1, last):
                if (count - 1, first) in best:
                    before, borders = best[count - 1, first]
                    error_L = error_LB[:, last] - error_LB[:, first]
                    cost_L = price * share_L * (length_B[last] - length_B[first])
                    options.append((before + float(np.minimum(error_L, cost_L).sum()), (*borders, last)))
            best[count, last] = min(options)
    return best[experts, bins][1]


def verdict(table: Sensitivity, budget: Budget, experts: int) -> str:
    """What the table says about experts on this model, in plain words."""
    middle = [(low + high - 1) / 2 for low, high in pairwise(table.edges)]
    depth_B = table.relative_LB.mean(axis=0)
    deepest = int(depth_B.argmax())
    gain = table.gain(budget, experts)
    kind = ("nearly the same at all timesteps" if table.agreement > 0.9 else
            "similar at all timesteps" if table.agreement > 0.6 else "different at different timesteps")
    return (
        f"The ranking of the layers is {kind} (mean rank correlation {table.agreement:.2f}). Skipping a layer costs "
        f"most around t = {middle[deepest]:.0f}: {depth_B[deepest] / depth_B.mean():.1f} times the mean, in units of "
        f"the dense model's error there. At keep ratio {budget.keep_ratio}, if errors added up, one mask for all "
        f"timesteps would make {gain:.2f} times the error of {experts} experts' masks: "
        + ("experts have something to gain." if gain > 1.1 else "experts have little to gain over one mask."))


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
