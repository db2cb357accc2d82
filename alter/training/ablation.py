"""Experts found otherwise than by a search, to compare it with; and the rows of an ablation."""

import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..backbones.family import predict
from ..backbones.noising import Betas
from ..backbones.schedules import hands_sigmas, make_solver, visited_rows
from ..backbones.sites import Site
from ..common.config import Config
from ..common.errors import InputError
from ..common.load import load_config
from ..experts.artefact import TemporalExperts
from ..experts.load import load_dense
from ..experts.plan import Planner
from ..method.budget import Budget
from ..method.hypernetwork import Logits
from .demo_images import own_weights
from .probe import Probe
from .rating import Rating
from .search.elastic import costs, ordered
from .setup.parts import Parts, build

UNSEARCHED = ("dense_tuned", "random", "every_second", "block_influence", "one_mask")
_SHARES = (0.25, 0.35, 0.5, 0.65, 0.8)  # of the MACs of all dense steps, at which fronts are drawn
_PLANNED_ON = 24  # images drawn to plan


def unsearched_experts(variant: str, config: Config, parts: Parts, seed: int) -> TemporalExperts:
    """Experts to tune without a search, at the configuration's keep ratio (every_second and dense_tuned: at their own).

    dense_tuned: every layer, so that what tuning alone brings is seen. random: one mask, drawn with `seed`.
    every_second: the layers with even numbers. block_influence: the layers with the highest ShortGPT score
    (arXiv 2403.03853). one_mask: the layers that the order measured on the dense model leaves.

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
    elif variant == "one_mask":
        search, alone = dataclasses.replace(config.search, least=0.0), dataclasses.replace(config.experts, count=1)
        family = ordered(dataclasses.replace(config, search=search, experts=alone), parts).mask_ML
        masks = family[np.abs(costs(parts, family) - budget.keep_ratio).argmin()][None], routes
    else:
        raise InputError(f"variant {variant!r}: choose one of {', '.join(UNSEARCHED)}")
    return TemporalExperts.build(*masks, parts.cost, min(budget.measured(*masks), 1.0), budget.over, budget.timesteps,
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


def dense_rows(rating: Rating, steps: int) -> Iterator[dict[str, Any]]:
    """Of the dense model, in as many denoising steps as take each share of the MACs of `steps`."""
    total = rating.parts.cost.macs_total
    for count in sorted({max(2, round(share * steps)) for share in (*_SHARES, 1.0)}):
        yield {"variant": "dense", "rung": round(count / steps, 3), "steps": count, "macs": count * total,
               "keep_ratio": 1.0,
               **rating.rate(rating.dense(count))}


def run_rows(rating: Rating, run: Path, variant: str, steps: int) -> Iterator[dict[str, Any]]:
    """Of a finished run: its experts in `steps` denoising steps; of a ladder several tuned rungs, and plans of steps
    and depth, for _SHARES of the MACs of that many dense steps."""
    config = own_weights(load_config(run / "config.yaml"), run / "final")
    parts = build(config, device=rating.parts.backbone.device)
    experts = parts.experts
    assert experts is not None
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    tuned = [rung for rung in experts.ladder if rung.tuned]
    for rung in (rung for rung in tuned if len(tuned) == 1 or rung.keep_ratio_target in _SHARES):
        row = {"variant": variant, "steps": steps, **_cost(experts.choose(rung), parts, steps),
               "switches": int((np.diff(rung.expert_T) != 0).sum())}
        if rung == experts.rung and summary["output_error"] is not None:
            errors = np.array(summary["output_error_by_timestep"])
            row |= {"output_error": summary["output_error"], "weighted_error": rating.weighted(errors)}
        if experts.measured is not None:
            edges = np.array(experts.measured.edges)
            error_B = experts.measured.error_MB[rung.expert_T[edges[:-1]], np.arange(len(edges) - 1)]
            row["rung_error"] = rating.weighted(error_B, edges)
        if len(tuned) > 1:
            row["rung"] = rung.keep_ratio_target
        yield row | rating.rate(rating.drawn(parts, experts.choose(rung), steps))
    if len(tuned) > 1:
        yield from _planned_rows(rating, run, parts, steps)


def _planned_rows(rating: Rating, run: Path, parts: Parts, steps: int) -> Iterator[dict[str, Any]]:
    experts = parts.experts
    assert experts is not None
    pipes: list[Any] = [load_dense(folder).to(parts.backbone.device) for folder in (run / "final", rating.parts.folder)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        if isinstance(parts.noising, Betas):
            pipe.scheduler = make_solver(parts.scheduler, parts.tokens)
    call: dict[str, Any] = {"guidance_scale": parts.guidance_scale}
    some = {name: value[:_PLANNED_ON] for name, value in rating.batch.items()}
    call |= {"class_labels": some["labels"].tolist()} if "labels" in some else {"prompt": some["captions"]}
    planner = Planner(experts, pipes[0], call, steps, dense=pipes[1])
    for count, taken in planner.chosen.items():
        if taken is not None and count in {round(share * steps) for share in _SHARES}:
            yield {"variant": "dense_chosen", "rung": round(count / steps, 3), "steps": count, "chosen": taken,
                   "macs": count * experts.macs_total, "keep_ratio": 1.0, **rating.rate(rating.dense(steps, taken))}
    for share in _SHARES:
        plan = planner.plan(macs=share * steps * experts.macs_total)
        images = rating.dense(plan.asked, plan.chosen) if plan.dense else rating.drawn(
            parts, experts.only(plan.rung), plan.asked, plan.chosen)
        depths = [int(experts.mask_EL[expert].sum()) for expert in plan.rung.expert_T[planner.visited[plan.steps]]]
        yield {"variant": "planned", "rung": share, "steps": plan.steps, "macs": plan.macs, "depths": depths,
               "keep_ratio": plan.macs / plan.steps / experts.macs_total, "predicted": plan.error, "dense": plan.dense,
               "chosen": plan.chosen,
               "discretisation": plan.discretisation, "measured": planner.check(plan), **rating.rate(images)}


def _cost(experts: TemporalExperts, parts: Parts, steps: int) -> dict[str, float]:
    visited = visited_rows(make_solver(parts.scheduler, parts.tokens), steps, parts.tokens,
                           hands_sigmas(parts.folder))
    return {"macs": float(experts.macs_T[visited].sum()), "keep_ratio": experts.keep_ratio}


def ablation_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over the seeds of every variant at every budget, the least drift first."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        settings = row["run"].partition(" ")[2]
        groups.setdefault((row["budget"], " ".join(filter(None, (row["variant"], settings))), row.get("rung")), []
                          ).append(row)
    heads = ("MACs asked", "variant", "steps", "seeds", "MACs", "Fréchet distance", "its noise", "drift",
             "weighted error", "output error ×10³", "accuracy")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]

    def cell(group: list[dict[str, Any]], name: str, scale: float, digits: int) -> str:
        values = [scale * row[name] for row in group if name in row]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}" if values else ""

    for budget, variant, rung in sorted(groups, key=lambda key: (-key[0], statistics.mean(
            row["drift"] for row in groups[key]))):
        group = groups[budget, variant, rung]
        steps = sorted({row["steps"] for row in group})
        cells = (budget, variant + ("" if rung is None else f" at {rung:g}"), "-".join(map(str, {
            steps[0]: 0, steps[-1]: 0})), len(group), *(cell(group, *of) for of in (
                ("share", 1, 3), ("fd", 1, 2), ("fd_noise", 1, 1), ("drift", 1, 3), ("weighted_error", 1, 2),
                ("output_error", 1e3, 2), ("accuracy", 1, 3))))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
