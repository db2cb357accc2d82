"""Flow matching through the whole trainer, on a DiT (SiT, arXiv 2401.08740): search, tuning, resuming, processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import assert_same_result, make_trainer, metrics_of, prepared

from alter import TemporalExperts, train
from alter.backbones.dit import null_class
from alter.backbones.draws import draw
from alter.training.measure import measure_sensitivity
from alter.training.probe import Probe
from alter.training.setup.parts import build

CHANGES = {"train": {"steps": 10, "search_steps": 6}, "flow": {"density": "logit_normal", "weighting": "cosmap"}}


@pytest.fixture
def flow_config(small_config):
    """A factory: `small_config("dit")` on a pipeline of flow matching."""
    def make(shift=3.0, **changes):
        config = small_config("dit", **changes)
        FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(Path(config.backbone.pretrained) / "scheduler")
        return config

    return make


def test_search_and_tuning(flow_config):
    run = train(flow_config(validate={"every": 10, "labels": [3]}, **CHANGES)).run_dir
    losses = [value for line in metrics_of(run) for name, value in line.items() if "/" in name]
    assert len(metrics_of(run)) == 10 and np.isfinite(losses).all()
    assert {path.name for path in (run / "samples").iterdir()} == {"step-000000-dense.png", "step-000010-experts.png"}
    experts = TemporalExperts.from_pretrained(run / "final")
    solver = FlowMatchEulerDiscreteScheduler.from_pretrained(run / "final", subfolder="scheduler")
    solver.set_timesteps(20)
    assert list(experts.timesteps) == solver.timesteps.round().clamp(max=999).int().tolist()
    assert json.loads((run / "summary.json").read_text())["output_error"] > 0


def test_batches_are_those_of_the_scheduler(flow_config, tmp_path):
    """Latents come back from what the backbone sees, along its target, and rows are the nearest training timesteps."""
    trainer = make_trainer(flow_config(flow={"shift": 5.0}, data={"label_dropout": 0.5}), tmp_path)
    (raw,) = trainer.micro_batches(1)
    latents, labels = raw["latents"], raw["labels"]
    batch = trainer.prepare_batch({**raw}, draw(trainer.parts.noising, 8, 0.5, 0, 0))
    sigma = (batch.timesteps / 1000).view(-1, 1, 1, 1)
    assert batch.timesteps.dtype == torch.float32 and (batch.timesteps % 1 > 0).any()
    assert torch.allclose(batch.noisy_latents - sigma * batch.target, latents, atol=1e-5)
    assert (batch.rows - batch.timesteps).abs().max() <= 1 and batch.rows.dtype == torch.int64
    dropped = batch.conditioning["class_labels"] == null_class(trainer.parts.backbone)
    assert 0 < dropped.sum() < len(labels)
    assert torch.equal(batch.conditioning["class_labels"][~dropped], labels[~dropped])
    assert trainer.weight_T is None  # the shift draws more of the timesteps that samplers visit


def test_each_sample_runs_the_expert_of_its_row(flow_config, tmp_path):
    trainer = make_trainer(flow_config(), tmp_path)
    (batch,) = prepared(trainer)
    seen, original = [], trainer.terms
    trainer.terms = lambda model, batch, rows: (seen.append(rows.kept), original(model, batch, rows))[1]
    expert_T = (np.arange(1000) > batch.rows.median().item()).astype(np.int64)
    trainer.update_backbone([batch], np.array([[1, 0, 1, 1], [1, 1, 0, 1]], bool), expert_T)
    later = batch.timesteps.round().clamp(max=999) > batch.rows.median()
    everything, second, third, _ = seen[0]
    assert everything is True and second.tolist() == later.nonzero().flatten().tolist()
    assert third.tolist() == (~later).nonzero().flatten().tolist()


def test_an_interrupted_run_resumed_equals_the_uninterrupted_one(flow_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {**CHANGES, "checkpoint": {"every": 4}}
    whole = train(flow_config(output_dir="whole", **changes)).run_dir
    run = train(flow_config(output_dir="part", **changes)).run_dir
    first = str(run / "checkpoints/step-000004")
    assert_same_result(whole, train(flow_config(output_dir=None, resume=first, **changes)).run_dir)


def test_the_sensitivity_of_layers_is_measured(flow_config):
    config = flow_config()
    parts = build(config)
    table = measure_sensitivity(config, parts, bins=2, samples=4, trials=1)
    assert np.isfinite(table.error_LB).all() and (table.amplification_B > 0).all()
    for noisy, timesteps, _, target in Probe(config, parts, 4).noised(0, 1000):
        assert timesteps.tolist() == [125, 375, 625, 875] and noisy.shape == target.shape
