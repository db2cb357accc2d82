"""Every option of the trainer does what it says, on tiny real models."""

import gc
import importlib.util
import json
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_stable_diffusion
from diffusers import DPMSolverMultistepScheduler
from helpers import changed, make_trainer, metrics_of_updates, prepared, snapshot
from safetensors.torch import load_file, save_file

from alter import InputError, TemporalExperts, train
from alter.backbones.gates import SoftRows
from alter.training.readout import NonFiniteLoss
from alter.training.setup.parts import build
from alter.training.setup.plan import check


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def updated(config, tmp_path):
    """The trainer after one update of each part, and what they printed."""
    trainer = make_trainer(config, tmp_path)
    batches = prepared(trainer)
    return trainer, metrics_of_updates(trainer, batches)


@pytest.mark.parametrize("option, tolerance", [
    ({"optim": {"fused": True}}, 1e-6), ({"backbone": {"channels_last": True}}, 1e-5),
    ({"teacher": {"offload": True}}, 0.0),
], ids=str)
def test_options_of_speed_and_memory_change_nothing_else(small_config, tmp_path, option, tolerance):
    """Metrics alone are compared closely: AdamW's first step has the size of the rate whatever the gradient's."""
    (plain, expected), (other, metrics) = (updated(small_config("unet", **change), tmp_path)
                                           for change in ({}, option))
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    if "optim" in option:
        for a, b in zip(plain.parameters, other.parameters, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=tolerance)
    if "backbone" in option:
        assert any(p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
                   for p in other.parameters)


@pytest.mark.slow
def test_compiled_layers_train_as_eager_ones(small_config, tmp_path):
    (_, expected), (_, metrics) = (updated(small_config("dit", backbone={"compile": compiled}), tmp_path)
                                   for compiled in (False, True))
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_teacher_in_bf16_is_the_same_model_rounded(small_config, tmp_path):
    trainer, metrics = updated(small_config("unet", teacher={"precision": "bf16"}), tmp_path)
    assert {p.dtype for p in trainer.parts.teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    exact, rounded = (prepared(make_trainer(small_config("unet", teacher={"precision": precision}), tmp_path))[0]
                      for precision in ("fp32", "bf16"))
    gap = (exact.teacher_pred - rounded.teacher_pred.float()).abs().mean() / exact.teacher_pred.abs().mean()
    assert 0 < gap < 0.05
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_closed_trainer_holds_no_optimizer_or_average(small_config, tmp_path):
    trainer = make_trainer(small_config("dit", train={"ema_decay": 0.9}), tmp_path)
    kept = [weakref.ref(part) for part in (trainer.backbone_update, trainer.search.hyper_update, trainer.ema)]
    trainer.run()
    trainer.close()
    gc.collect()
    assert not any(part() for part in kept) and all(p.grad is None for p in trainer.parameters)


def test_an_offloaded_teacher_leaves_the_device_after_every_use(small_config, tmp_path):
    changes = {"teacher": {"offload": True}, "train": {"gradient_accumulation": 2}}
    trainer = make_trainer(small_config("dit", validate={"every": 4, "labels": [1]}, **changes), tmp_path)
    uses, left = [], []
    trainer.parts.teacher.register_forward_pre_hook(lambda *_: uses.append(1))
    trainer.parts.offload.offload = lambda: left.append(len(uses))
    trainer.run()
    assert left == [2, *range(3, 2 + 2 * 6 + 1)]  # the validation's two steps, then each micro-batch


def test_a_run_without_distillation_never_asks_the_teacher(small_config, tmp_path):
    trainer = make_trainer(small_config("dit", loss={"denoise": 1.0, "output_kd": 0.0, "feature_kd": 0.0}), tmp_path)

    def asked(*_):
        raise AssertionError("the teacher was asked")

    trainer.parts.teacher.register_forward_pre_hook(asked)
    trainer.run()


def with_scalers(trainer):
    """As mixed_precision=fp16 makes them, on the CPU in fp32."""
    for update in (trainer.backbone_update, trainer.search.hyper_update):
        update.scaler = torch.amp.GradScaler("cpu", enabled=True)
    return trainer


def test_a_loss_scaler_leaves_updates_as_they_are_and_skips_infinite_ones(small_config, tmp_path):
    """Scaling by powers of two changes no bit of a gradient."""
    plain, _ = updated(small_config("unet"), tmp_path)
    trainer = with_scalers(make_trainer(small_config("unet"), tmp_path))
    batches = prepared(trainer)
    trainer.search.update(batches)
    trainer.update_backbone(batches, *trainer.masks())
    for a, b in zip(plain.parameters, trainer.parameters, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)

    scaler = trainer.backbone_update.scaler
    before, scale = snapshot(trainer.parts.backbone), scaler.get_scale()
    trainer.parts.backbone.conv_out.bias.register_hook(lambda gradient: gradient * torch.inf)
    metrics = metrics_of_updates(trainer, batches, trainer.masks())
    assert not changed(trainer.parts.backbone, before) and scaler.get_scale() == scale / 2
    assert "train/gradient_norm" not in metrics and trainer.readout.counts["skipped_updates"] == 1
    with pytest.raises(NonFiniteLoss, match="not finite in 51 updates in a row"):
        for _ in range(60):
            trainer.update_backbone(batches, *trainer.masks())
            trainer.readout.read()


@pytest.mark.parametrize("poisoned", ["search", "backbone"])
def test_an_overflow_of_one_update_leaves_the_other_alone(small_config, tmp_path, poisoned):
    """NaN in the dense forward of the search alone, or in the backbone's own: the other goes on as in a clean run, and
    each counts its overflows, and lowers its scale, for itself."""
    clean, trainer = (with_scalers(make_trainer(small_config("dit"), tmp_path)) for _ in range(2))
    updates = {"search": trainer.search.hyper_update, "backbone": trainer.backbone_update}
    modules = {"search": trainer.parts.hypernetwork, "backbone": trainer.parts.backbone}
    spoilt, other = updates.pop(poisoned), updates.popitem()[1]
    spoilt_module, other_module = modules.pop(poisoned), modules.popitem()[1]
    terms, dense = trainer.terms, poisoned == "search"

    def spoil(model, batch, rows):
        found = terms(model, batch, rows)
        return {name: value * (torch.nan if isinstance(rows, SoftRows) == dense else 1.0)
                for name, value in found.items()}

    trainer.terms = spoil
    before, scales = snapshot(spoilt_module), (spoilt.scaler.get_scale(), other.scaler.get_scale())
    for count in (1, 2, 3):
        batches, masks = prepared(trainer), trainer.masks()
        found = metrics_of_updates(trainer, batches, masks)
        expected = metrics_of_updates(clean, prepared(clean), masks)
        assert not changed(spoilt_module, before)
        assert (spoilt.skipped, other.skipped) == (count, 0) and trainer.readout.counts["skipped_updates"] == count
        assert (spoilt.scaler.get_scale(), other.scaler.get_scale()) == (scales[0] / 2**count, scales[1])
        if poisoned == "search":  # whose result the backbone's update does not use here: the masks are given
            assert {name: value for name, value in found.items() if name.startswith("train/")} == {
                name: value for name, value in expected.items() if name.startswith("train/")}
    moved = changed(other_module, snapshot(clean.parts.backbone if poisoned == "search" else clean.parts.hypernetwork))
    if poisoned == "search":
        assert not moved
    assert all(value.isfinite().all() for value in other_module.state_dict().values())
    with pytest.raises(NonFiniteLoss, match=f"{'search' if dense else 'train'}: .* not finite in 51 updates in a row"):
        for _ in range(60):
            metrics_of_updates(trainer, batches, masks)
    assert other.skipped == 0 and other.scaler.get_scale() >= scales[1]


def test_fp16_is_refused_on_a_cpu(small_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="train.mixed_precision='fp16' needs a GPU: use no or bf16"):
        train(small_config("dit", train={"mixed_precision": "fp16"}))


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [
    {"train": {"mixed_precision": "fp16"}}, {"teacher": {"offload": True}},
    {"train": {"mixed_precision": "bf16"}, "teacher": {"precision": "bf16"}, "optim": {"fused": True}},
], ids=str)
def test_options_on_a_gpu(small_config, changes):
    summary = json.loads((train(small_config("sd", **changes)).run_dir / "summary.json").read_text())
    assert math.isfinite(summary["output_error"])


@pytest.mark.parametrize("changes, line", [
    ({"optim": {"optimizer": "adamw_8bit"}}, "optim.optimizer=adamw_8bit: the package bitsandbytes is not installed"),
    ({"lora": {"rank": 2}}, "lora.rank=2: the package peft is not installed"),
])
def test_a_missing_optional_package_is_named_before_anything_is_loaded(small_config, monkeypatch, changes, line):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=line):
        check(small_config("dit", **changes), 1)


def test_8bit_adam_trains_and_resumes(small_config, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    changes = {"optim": {"optimizer": "adamw_8bit"}, "checkpoint": {"every": 4}}
    trainer = make_trainer(small_config("unet", **changes), tmp_path)
    assert isinstance(trainer.backbone_update.optimizer, bitsandbytes.optim.AdamW8bit)
    run = train(small_config("unet", output_dir="whole", **changes)).run_dir
    first = str(run / "checkpoints/step-000004")
    weights = (run / "final/unet/diffusion_pytorch_model.safetensors").read_bytes()
    train(small_config("unet", output_dir=None, resume=first, **changes))
    assert (run / "final/unet/diffusion_pytorch_model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("lora", [{}, {"rank": 2}])
def test_a_run_resumes_on_the_weights_that_it_began_with(small_config, lora):
    changes = {"lora": lora, "checkpoint": {"every": 3}}
    config = small_config("dit", **changes)
    run = train(config).run_dir
    file = Path(str(config.backbone.pretrained)) / "transformer/diffusion_pytorch_model.safetensors"
    save_file({name: value + 1e30 for name, value in load_file(file).items()}, file, {"format": "pt"})  # nothing finite
    with pytest.raises(InputError, match="resume: .* other weights in backbone.pretrained"):
        train(small_config("dit", **changes, resume=str(run / "checkpoints/step-000003")))


def test_a_lora_target_that_names_no_layer(small_config):
    pytest.importorskip("peft")
    with pytest.raises(InputError, match=r"lora.targets=\['nope'\]"):
        build(small_config("dit", lora={"rank": 2, "targets": ["nope"]}))


def test_frozen_parts_stay_as_they_are(small_config, tmp_path):
    config = small_config("unet", backbone={"freeze": ["down_blocks.*", "*.norm*", "conv_in.*"]})
    trainer = make_trainer(config, tmp_path)
    before = snapshot(trainer.parts.backbone)
    trainer.run()
    moved = changed(trainer.parts.backbone, before)
    assert moved and not any(name.startswith(("down_blocks.", "conv_in.")) or ".norm" in name for name in moved)
    untouched = {name for name in before if name.startswith("up_blocks.") and ".norm" not in name} - moved
    assert not untouched


@pytest.mark.parametrize("patterns, message", [
    (["nope.*"], "backbone.freeze: 'nope.\\*' names no parameter"), (["*"], "leaves nothing to train"),
])
def test_freezing_nothing_or_everything_is_refused(small_config, patterns, message):
    with pytest.raises(InputError, match=message):
        build(small_config("unet", backbone={"freeze": patterns}))


def test_a_budget_over_a_samplers_timesteps(small_config):
    """The ratio is that of the MACs of every training timestep, which weighs as the visited one nearest to it."""
    config = small_config("unet", budget={"sampler": "DPMSolverMultistepScheduler", "sampling_steps": 7,
                                          "keep_ratio": 0.7}, experts={"count": 4})
    run = train(config).run_dir
    experts = TemporalExperts.from_pretrained(run / "final")
    solver = DPMSolverMultistepScheduler.from_pretrained(run / "final", subfolder="scheduler")
    solver.set_timesteps(7)
    visited = sorted(solver.timesteps.tolist())
    nearest = [min(visited, key=lambda step: (abs(step - t), step)) for t in range(1000)]
    spent = 0.0
    for timestep in range(1000):
        kept = experts.mask_EL[experts.expert_T[timestep]]
        skipped = sum(macs for macs, runs in zip(experts.macs, kept, strict=True) if not runs)
        spent += (experts.macs_total - skipped) / 7 / nearest.count(nearest[timestep])
    assert experts.keep_ratio == pytest.approx(spent / experts.macs_total)
    assert abs(experts.keep_ratio - 0.7) <= 0.005
    summary = json.loads((run / "summary.json").read_text())
    assert summary["macs_experts"] == pytest.approx(spent, abs=1)
    with pytest.raises(InputError, match="budget.sampler='NoSuchScheduler': diffusers has no such scheduler"):
        build(small_config("unet", budget={"sampler": "NoSuchScheduler"}))


def test_a_teacher_of_its_own(small_config, tmp_path):
    other = save_stable_diffusion(tmp_path / "other")
    file = other / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(file).items()}, file, {"format": "pt"})
    trainer = make_trainer(small_config("sd", teacher={"pretrained": str(other)}), tmp_path)
    sites = len(trainer.parts.cost.sites)
    trainer.update_backbone(prepared(trainer), np.ones((1, sites), bool), np.zeros(1000, np.int64))
    trainer.readout.read()
    assert trainer.readout.metrics["train/output_kd"] > 0
    with pytest.raises(InputError, match="teacher.pretrained=.*: another architecture"):
        build(small_config("dit", teacher={"pretrained": str(other)}))


def test_labels_for_validation_images_of_a_class_conditioned_model(small_config):
    run = train(small_config("dit", validate={"every": 6, "labels": [3, 7]})).run_dir
    assert {path.name for path in Path(run / "samples").iterdir()} == {
        "step-000000-dense.png", "step-000006-experts.png"}


@pytest.mark.parametrize("kind, validate, message", [
    ("dit", {"labels": []}, "set validate.labels, and not validate.prompts"),
    ("dit", {"labels": [1], "prompts": ["a"]}, "set validate.labels, and not"),
    ("dit", {"labels": [10]}, r"validate.labels=\[10\]: the backbone knows 0 to 9"),
    ("sd", {}, "set validate.prompts, and not validate.labels"),
])
def test_validation_that_the_conditioning_does_not_allow(small_config, kind, validate, message):
    with pytest.raises(InputError, match=message):
        check(small_config(kind, validate={"every": 2, **validate}), 1)
