"""The end of a run: final/ with its model card, summary.json, samples.png and experts.png."""

import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..backbones.dit import tie_embedders
from ..backbones.family import predict
from ..backbones.lora import FILE_NAME as ADAPTERS
from ..backbones.lora import Base, adapter_state, export_adapters, merge_adapters, put_adapters
from ..backbones.pretrained import base_of, export, load_backbone
from ..backbones.schedules import hands_sigmas, make_solver, visited_rows
from ..common.config import Config
from ..common.files import write_text
from ..data.batches import WithSubstitutes, collate, of_one_shape, split
from ..evaluation.classifier import accuracy, errors_by_timestep
from ..evaluation.distances import frechet_distance
from ..evaluation.report.card import model_card
from ..evaluation.report.figures import plot_experts, plot_samples
from ..evaluation.report.words import achieved, row_label
from ..experts.artefact import FILE_NAME as EXPERTS
from ..experts.artefact import TemporalExperts
from ..experts.load import pipeline_class
from .demo_images import DemoReference, demo_reference
from .rating import demo_classifier
from .setup.parts import Parts

_SHOWN = 12  # images per row of samples.png, at most


def finish(config: Config, parts: Parts, experts: TemporalExperts, processes: int, counts: dict[str, int],
           run_dir: Path, started: float) -> dict[str, Any]:
    """Export final/, measure it, and write summary.json, samples.png and experts.png; returns the summary."""
    final = run_dir / "final"
    parts.backbone.eval()
    _export(config, parts, final)
    experts.save_pretrained(final)

    summary = {**achieved(experts), "prunable_share": parts.cost.prunable_share, "free_guidance": parts.free_guidance,
               **counts}
    summary |= _held_out_errors(config, parts, experts, config.train.micro_batch(processes))
    reference = demo_reference(config, parts.source)
    if reference is not None:
        summary |= _sample_quality(config, parts, experts, reference, run_dir)
    summary["seconds_total"] = time.perf_counter() - started
    write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    plot_experts(experts, run_dir / "experts.png")
    pipeline = pipeline_class(parts.folder) if (parts.folder / "model_index.json").is_file() else "DiffusionPipeline"
    write_text(final / "README.md", model_card(config, experts, summary, pipeline, Base.beside(final)))
    return summary


def _export(config: Config, parts: Parts, final: Path) -> None:
    """The pipeline with the trained weights; of adapters, unless they are to be merged, these alone."""
    # Not those of an earlier run of this component, but those of another.
    left_out = ("README.md", ADAPTERS, *(() if parts.told_component else (EXPERTS,)))
    if config.lora.rank is None:
        export(final, parts.folder, parts.backbone, left_out, parts.component)
        return
    component = parts.component
    state = adapter_state(parts.backbone, component)
    if not config.lora.merge:
        base = base_of(str(config.backbone.pretrained), config.backbone.revision, parts.folder, component)
        export_adapters(final, state, base)
        return
    merged = load_backbone(parts.folder, component=component)  # in full precision
    tie_embedders(merged)
    put_adapters(merged, state, component)
    merge_adapters(merged)
    export(final, parts.folder, merged, left_out, component)
    save_file(state, final / ADAPTERS, {"format": "pt"})


def _held_out_errors(config: Config, parts: Parts, experts: TemporalExperts, batch_size: int,
                     most: int = 256) -> dict[str, Any]:
    """`errors_by_timestep` on at most `most` held-out samples, and their means; None without any, or a dense model."""
    _, held_out = split(parts.source, config.data.holdout, config.seed)
    if parts.teacher is None or not len(held_out):
        return {"output_error": None, "denoise_error": None}

    def student(*given: Any) -> Tensor:
        with experts.serving(parts.simulator):
            return predict(parts.backbone, *given)

    def teacher(*given: Any) -> Tensor:
        with parts.dense() as dense:
            return predict(dense, *given)

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
            student, teacher, parts.noising, latents, conditioning, config.seed + first))
        first += count
    parts.release_teacher()
    output, denoise = np.sum(errors, axis=0).tolist()
    return {"output_error": fmean(output), "denoise_error": fmean(denoise),
            "output_error_by_timestep": output, "denoise_error_by_timestep": denoise}


def _sample_quality(config: Config, parts: Parts, experts: TemporalExperts, demo: DemoReference,
                    run_dir: Path) -> dict[str, Any]:
    """Fréchet distances and accuracies, dense and experts, from the same seeds and conditions."""
    evaluate, device = config.evaluate, parts.backbone.device
    classifier = demo_classifier(config, demo)
    real = classifier.features(demo.images).numpy()
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in demo.batch.items()}
    steps = evaluate.sampling_steps
    summary: dict[str, Any] = {
        "sampling_steps": steps, "guidance_scale": evaluate.guidance_scale, "samples": evaluate.samples,
    }
    pictures = {}
    rows = [("dense_50", 50), ("dense", steps)] if evaluate.dense and parts.teacher is not None else []
    for name, count in [*rows, ("experts", steps)]:
        if name == "experts":
            with experts.serving(parts.simulator):
                images = parts.draw(parts.backbone, batch, count, config.seed)
        else:
            with parts.dense() as dense:
                images = parts.draw(dense, batch, count, config.seed)
        features = classifier.features(images).numpy()
        summary[f"fd_{name}"] = frechet_distance(features, real)
        summary[f"fd_halves_{name}"] = [frechet_distance(half, real) for half in np.array_split(features, 2)]
        summary[f"accuracy_{name}"] = accuracy(classifier, images, demo.asked)
        visited = visited_rows(make_solver(parts.scheduler, parts.tokens), count, parts.tokens,
                               hands_sigmas(parts.folder))
        per_step = experts.macs_T[visited] if name == "experts" else np.full(count, experts.macs_total)
        spent = float(per_step.sum()) * (1 if parts.free_guidance == 1 else 2)  # guidance runs the backbone twice
        pictures[row_label(name, count, spent, summary)] = images[:_SHOWN]
    parts.release_teacher()
    plot_samples(pictures, demo.titles[:_SHOWN], run_dir / "samples.png")
    return summary
