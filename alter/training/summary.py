"""The end of a run: final/ with its model card, summary.json, samples.png and experts.png."""

import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backbones.lora import FILE_NAME as ADAPTERS
from ..backbones.lora import merge_adapters, save_adapters
from ..backbones.pretrained import component_of, export
from ..backbones.schedules import make_solver, visited_rows
from ..common.config import Config
from ..common.files import write_text
from ..data.batches import WithSubstitutes, collate, of_one_shape, split
from ..evaluation.classifier import accuracy, errors_by_timestep, train_classifier
from ..evaluation.distances import frechet_distance
from ..evaluation.report.card import model_card
from ..evaluation.report.figures import plot_experts, plot_samples
from ..evaluation.report.words import achieved, row_label
from ..experts.artefact import FILE_NAME as EXPERTS
from ..experts.artefact import TemporalExperts
from ..experts.load import pipeline_class
from .demo_images import DemoReference, demo_reference
from .setup.parts import Parts

_SHOWN = 12  # images per row of samples.png, at most


def finish(config: Config, parts: Parts, experts: TemporalExperts, processes: int, counts: dict[str, int],
           run_dir: Path, started: float) -> dict[str, Any]:
    """Export final/, measure it, and write summary.json, samples.png and experts.png; returns the summary."""
    final, component = run_dir / "final", component_of(parts.folder)[1]
    parts.simulator.remove()
    parts.backbone.eval()
    if config.lora.rank is not None:
        merge_adapters(parts.backbone)
    export(final, parts.folder, parts.backbone, ("README.md", EXPERTS, ADAPTERS))  # not those of an earlier run
    experts.save_pretrained(final)
    if config.lora.rank is not None:
        save_adapters(parts.backbone, component, final)

    summary = {**achieved(experts), "prunable_share": parts.cost.prunable_share, **counts}
    experts.apply(parts.backbone)
    summary |= _held_out_errors(config, parts, config.train.micro_batch(processes))
    reference = demo_reference(config, parts.source)
    if reference is not None:
        summary |= _sample_quality(config, parts, experts, reference, run_dir)
    summary["seconds_total"] = time.perf_counter() - started
    write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    plot_experts(experts, run_dir / "experts.png")
    pipeline = pipeline_class(final) if (final / "model_index.json").is_file() else "DiffusionPipeline"
    card = model_card(config, experts, summary, pipeline, ADAPTERS if config.lora.rank else None)
    write_text(final / "README.md", card)
    return summary


def _held_out_errors(config: Config, parts: Parts, batch_size: int, most: int = 256) -> dict[str, Any]:
    """`errors_by_timestep` on at most `most` held-out samples, and their means; None without any, or a dense model."""
    _, held_out = split(parts.source, config.data.holdout, config.seed)
    if parts.teacher is None or not len(held_out):
        return {"output_error": None, "denoise_error": None}
    held_out, errors = held_out[:most], []
    source = WithSubstitutes(parts.source, held_out, config.seed, parts.fit)
    first = 0
    for some in of_one_shape(held_out, batch_size, source.source.buckets):
        batch = collate([source[0, int(i)] for i in some])
        count = len(some)
        batch = {name: value.to(parts.backbone.device) if isinstance(value, Tensor) else value
                 for name, value in batch.items()}
        latents = parts.latents(batch)
        conditioning = parts.conditioning(batch, torch.zeros(count, dtype=torch.bool))
        errors.append(count / len(held_out) * errors_by_timestep(
            parts.backbone, parts.teacher, parts.noising, latents, conditioning, config.seed + first))
        first += count
    parts.release_teacher()
    output, denoise = np.sum(errors, axis=0).tolist()
    return {"output_error": fmean(output), "denoise_error": fmean(denoise),
            "output_error_by_timestep": output, "denoise_error_by_timestep": denoise}


def _sample_quality(config: Config, parts: Parts, experts: TemporalExperts, demo: DemoReference,
                    run_dir: Path) -> dict[str, Any]:
    """Fréchet distances and accuracies, dense and experts, from the same seeds and conditions."""
    evaluate, device = config.evaluate, parts.backbone.device
    classifier = train_classifier(demo.images, demo.targets, 0)  # the same for runs of every seed
    real = classifier.features(demo.images).numpy()
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in demo.batch.items()}
    steps = evaluate.sampling_steps
    summary: dict[str, Any] = {
        "sampling_steps": steps, "guidance_scale": evaluate.guidance_scale, "samples": evaluate.samples,
    }
    pictures = {}
    for name, model, count in (("dense_50", parts.teacher, 50), ("dense", parts.teacher, steps),
                               ("experts", parts.backbone, steps)):
        if model is None or not evaluate.dense and model is parts.teacher:
            continue
        images = parts.draw(model, batch, count, config.seed)
        features = classifier.features(images).numpy()
        summary[f"fd_{name}"] = frechet_distance(features, real)
        summary[f"fd_halves_{name}"] = [frechet_distance(half, real) for half in np.array_split(features, 2)]
        summary[f"accuracy_{name}"] = accuracy(classifier, images, demo.asked)
        visited = visited_rows(make_solver(parts.scheduler, parts.tokens), count, parts.tokens)
        per_step = experts.macs_T[visited] if model is parts.backbone else np.full(count, experts.macs_total)
        spent = float(per_step.sum()) * (1 if evaluate.guidance_scale == 1 else 2)  # guidance runs the backbone twice
        pictures[row_label(name, count, spent, summary)] = images[:_SHOWN]
    parts.release_teacher()
    plot_samples(pictures, demo.titles[:_SHOWN], run_dir / "samples.png")
    return summary
