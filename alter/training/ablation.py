"""Experts found otherwise than by the search, to compare it with: random, by rule, by measured influence or error."""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backbones.family import predict
from ..backbones.sampling import sample_latents
from ..backbones.sites import Site
from ..common.config import Config
from ..common.errors import InputError
from ..common.load import load_config
from ..experts.artefact import TemporalExperts
from ..method.budget import Budget
from ..method.hypernetwork import Logits
from ..method.sensitivity import allocate
from .demo_images import demo_reference, own_weights
from .measure import measure_sensitivity
from .probe import Probe
from .setup.parts import Parts, build

UNSEARCHED = ("dense_tuned", "random", "every_second", "block_influence", "greedy", "greedy_static")


def unsearched_experts(variant: str, config: Config, parts: Parts, seed: int) -> TemporalExperts:
    """Experts to tune without a search, at the configuration's keep ratio (every_second and dense_tuned: at their own).

    dense_tuned: every layer, so that what tuning alone brings is seen. random: one mask, drawn with `seed`.
    every_second: the layers with even numbers. block_influence: the layers with the highest ShortGPT score
    (arXiv 2403.03853). greedy: `config.experts.count` masks by the measured errors of the dense model;
    greedy_static: one such mask.

    Raises:
        InputError: for another name.
    """
    budget, sites = parts.budget, len(parts.cost.sites)
    routes = np.zeros(parts.noising.num_timesteps, dtype=np.int64)
    if variant == "dense_tuned":
        masks = np.ones((1, sites), dtype=bool), routes
    elif variant == "every_second":
        masks = (np.arange(sites) % 2 == 0)[None], routes
    elif variant == "random":
        masks = _one_mask(np.random.default_rng([seed, 11]).standard_normal(sites), budget, routes)
    elif variant == "block_influence":
        masks = _one_mask(block_influence(config, parts), budget, routes)
    elif variant in ("greedy", "greedy_static"):
        count = 1 if variant == "greedy_static" else config.experts.count
        masks = allocate(measure_sensitivity(config, parts), budget, count)
    else:
        raise InputError(f"variant {variant!r}: choose one of {', '.join(UNSEARCHED)}")
    return TemporalExperts.build(*masks, parts.cost, budget.measured(*masks), budget.over, budget.timesteps,
                                 parts.latency)


@torch.no_grad()
def block_influence(config: Config, parts: Parts, samples: int = 64) -> np.ndarray:
    """BI of every layer, float64 [L]: 1 - cosine between what bypasses it and its output, over tokens and timesteps."""
    probe, scores_L = Probe(config, parts, samples), np.zeros(len(parts.simulator.sites))

    def observe(layer: int, site: Site) -> Any:
        def hook(module: Any, arguments: tuple, keywords: dict[str, Any], output: Any) -> None:
            output = site.image(site.unpack(output))
            dim = -1 if site.channels is None else 1
            around = site.image(site.bypass(arguments, keywords))
            alike = torch.cosine_similarity(around.float(), output.float(), dim=dim)
            scores_L[layer] += (1 - alike.mean().item()) * len(output) / samples
        return hook

    hooks = [parts.backbone.get_submodule(site.name).register_forward_hook(observe(layer, site), with_kwargs=True)
             for layer, site in enumerate(parts.simulator.sites)]
    for noisy, timesteps, conditioning, _ in probe.noised(0, parts.noising.num_timesteps):
        predict(parts.backbone, noisy, timesteps, conditioning)
    for hook in hooks:
        hook.remove()
    return scores_L


def _one_mask(worth_L: np.ndarray, budget: Budget, routes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mask of most worth that meets the budget."""
    logits = Logits(torch.from_numpy(worth_L)[None], torch.zeros(len(routes), 1, dtype=torch.float64))
    return budget.masks(logits, budget.keep_ratio)


def time_ratio(run: Path, device: torch.device, images: int = 32, rounds: int = 5) -> float:
    """Seconds of sampling with a demo run's experts over those with experts that keep every layer; medians, in turn."""
    config = own_weights(load_config(run / "config.yaml"), run / "final")
    parts = build(config, device=device)
    few = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, samples=images))
    reference = demo_reference(few, parts.source)
    assert parts.experts is not None and reference is not None, "a demo's run"
    everything_kept = dataclasses.replace(parts.experts, mask_EL=np.ones_like(parts.experts.mask_EL))
    batch: Any = {name: value.to(device) if isinstance(value, Tensor) else value
                  for name, value in reference.batch.items()}
    everything = torch.ones(images, dtype=torch.bool)
    given, nothing = parts.conditioning(batch, ~everything), parts.conditioning(batch, everything)
    parts.simulator.remove()
    parts.backbone.eval()

    def seconds(experts: TemporalExperts) -> float:
        with experts.apply(parts.backbone):
            started = time.perf_counter()
            sample_latents(parts.backbone, parts.scheduler, parts.latent_shape, given, nothing,
                           config.evaluate.sampling_steps, config.seed, config.evaluate.guidance_scale).cpu()
            return time.perf_counter() - started

    pairs = [(seconds(parts.experts), seconds(everything_kept)) for _ in range(rounds + 1)][1:]  # the first warms up
    ours, dense = (statistics.median(column) for column in zip(*pairs, strict=True))
    return ours / dense


def ablation_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over the seeds of every variant at every keep ratio, best output first."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["keep_ratio_target"], row["variant"], row["sampling_steps"]), []).append(row)
    heads = ("keep ratio asked", "variant", "steps", "seeds", "output error ×10³", "denoising error ×10³", "FD",
             "accuracy", "MACs kept", "time")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]

    def cell(group: list[dict[str, Any]], name: str, scale: float, digits: int) -> str:
        values = [scale * row[name] for row in group]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    order = sorted(groups, key=lambda key: (-key[0], statistics.mean(row["output_error"] for row in groups[key])))
    for keep, variant, steps in order:
        group = groups[keep, variant, steps]
        cells = (keep, variant, steps, len(group), cell(group, "output_error", 1e3, 2),
                 cell(group, "denoise_error", 1e3, 2), cell(group, "fd", 1, 2), cell(group, "accuracy", 1, 3),
                 cell(group, "keep_ratio", 1, 3), cell(group, "time_ratio", 1, 2))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
