import json

import numpy as np
import pytest
import torch
from helpers import changed, make_trainer, prepared, snapshot

from alter.common.errors import InputError
from alter.method import losses
from alter.training.checkpoint import checkpoints, load_checkpoint
from alter.training.readout import NonFiniteLoss
from alter.training.run import train


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_each_update_changes_only_its_own_parameters(small_config, tmp_path, kind):
    trainer = make_trainer(small_config(kind), tmp_path)
    parts, batches = trainer.parts, prepared(trainer)
    hyper, backbone, teacher = map(snapshot, (parts.hypernetwork, parts.backbone, parts.teacher))
    trainer.search.update(batches)
    assert changed(parts.hypernetwork, hyper) and not changed(parts.backbone, backbone)
    assert all(parameter.grad is None for parameter in parts.backbone.parameters())
    hyper = snapshot(parts.hypernetwork)
    trainer.update_backbone(batches, *trainer.masks())
    assert changed(parts.backbone, backbone) and not changed(parts.hypernetwork, hyper)
    assert not changed(parts.teacher, teacher)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_the_teacher_is_the_pretrained_model_without_gates(small_config, tmp_path, kind):
    trainer = make_trainer(small_config(kind), tmp_path)
    before = prepared(trainer)[0]
    trainer.run()
    trainer.step = 0
    after = prepared(trainer)[0]
    assert not trainer.parts.teacher.training
    assert torch.equal(before.teacher_pred, after.teacher_pred)
    assert all(torch.equal(a, b) for a, b in zip(before.teacher_features, after.teacher_features, strict=True))


def test_the_student_starts_as_the_teacher(small_config, tmp_path):
    """With all sites on, every distillation loss is zero: same inputs, features, conditioning and weights."""
    trainer = make_trainer(small_config("unet"), tmp_path)
    sites = len(trainer.parts.cost.sites)
    trainer.update_backbone(prepared(trainer), np.ones((1, sites), bool), np.zeros(1000, np.int64))
    trainer.readout.read()
    metrics = trainer.readout.metrics
    assert metrics["train/output_kd"] == 0 and metrics["train/feature_kd"] == 0
    assert metrics["train/denoise"] > 0


def test_micro_batches_give_the_same_update(small_config, tmp_path):
    results = []
    for accumulation in (1, 4):
        config = small_config("dit", train={"gradient_accumulation": accumulation})
        trainer = make_trainer(config, tmp_path)
        for module in (trainer.parts.backbone, trainer.parts.teacher, trainer.parts.hypernetwork):
            module.double()
        trainer.dtype = torch.float64
        batches = prepared(trainer)
        assert len(batches) == accumulation
        trainer.search.update(batches)
        trainer.update_backbone(batches, *trainer.masks())
        results.append([p.detach() for m in (trainer.parts.backbone, trainer.parts.hypernetwork)
                        for p in m.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_unused_layers_get_zero_gradients_so_that_weight_decay_acts_on_all(small_config, tmp_path):
    trainer = make_trainer(small_config("dit", optim={"weight_decay": 0.5}), tmp_path)
    mask = np.ones((1, 4), bool)
    mask[0, 2] = False
    weight = trainer.parts.backbone.transformer_blocks[2].ff.net[0].proj.weight
    before = weight.detach().clone()
    trainer.update_backbone(prepared(trainer), mask, np.zeros(1000, np.int64))
    assert torch.allclose(weight, before * (1 - 1e-3 * 0.5))


@pytest.mark.parametrize("keep", [0.4, 0.65, 0.9])
def test_the_frozen_masks_meet_the_budget(small_config, tmp_path, keep):
    config = small_config("unet", budget={"keep_ratio": keep, "over": "prunable"}, experts={"count": 4},
                          train={"steps": 3})
    trainer = make_trainer(config, tmp_path)
    experts = trainer.run()
    prunable = sum(experts.macs) / experts.macs_total
    assert abs((experts.keep_ratio - 1 + prunable) / prunable - keep) <= 0.005
    assert all(experts.mask_EL[e].any() for e in experts.used)


@pytest.mark.parametrize("changes", [
    {"experts": {"count": 1}}, {"experts": {"router": "uniform"}}, {"train": {"schedule": "two_stage"}},
    {"loss": {"denoise": 0.0}}, {"loss": {"output_kd": 0.0}}, {"loss": {"feature_kd": 0.0}},
    {"loss": {"feature_kd_outliers": 3.0}}, {"loss": {"ratio": 0.0, "balance": 0.0}},
    {"train": {"mixed_precision": "bf16"}}, {"backbone": {"gradient_checkpointing": True}},
    {"optim": {"lr_schedule": "cosine"}}, {"optim": {"lr_schedule": "polynomial"}},
    {"loss": {"min_snr_gamma": 5.0}}, {"train": {"noise_offset": 0.1}},
], ids=str)
def test_every_switch_trains(small_config, tmp_path, changes):
    trainer = make_trainer(small_config("dit", **changes), tmp_path)
    backbone = snapshot(trainer.parts.backbone)
    experts = trainer.run()
    assert changed(trainer.parts.backbone, backbone)
    if changes == {"experts": {"router": "uniform"}}:
        assert np.array_equal(experts.expert_T, np.arange(1000) * 3 // 1000)


def test_two_stage_leaves_the_backbone_alone_while_it_searches(small_config, tmp_path):
    trainer = make_trainer(small_config("dit", train={"schedule": "two_stage", "steps": 3}), tmp_path)
    backbone = snapshot(trainer.parts.backbone)
    trainer.run()
    assert not changed(trainer.parts.backbone, backbone)


@pytest.mark.parametrize("descent, targets", [(0.0, [0.6, 0.6, 0.6, 0.6]), (0.5, [1.0, 0.8, 0.6, 0.6]),
                                              (1.0, [1.0, 0.9, 0.8, 0.7])])
def test_the_target_descends_to_the_budget(small_config, tmp_path, monkeypatch, descent, targets):
    seen = []
    log_ratio = losses.log_ratio
    monkeypatch.setattr(losses, "log_ratio", lambda keep, target: seen.append(target) or log_ratio(keep, target))
    config = small_config("dit", train={"steps": 5, "search_steps": 4},
                          budget={"keep_ratio": 0.6, "over": "prunable", "descent": descent})
    experts = make_trainer(config, tmp_path).run()
    assert seen == pytest.approx(targets) and experts.keep_ratio_target == 0.6


def test_masks_do_not_change_after_the_search(small_config, tmp_path):
    trainer = make_trainer(small_config("dit"), tmp_path)
    frozen = []
    original = trainer.update_backbone
    trainer.update_backbone = lambda batches, *masks: (frozen.append(masks), original(batches, *masks))[1]
    trainer.run()
    assert all(np.array_equal(m, frozen[3][0]) and np.array_equal(e, frozen[3][1]) for m, e, _ in frozen[2:])


def test_a_run_repeats_bit_for_bit(small_config):
    runs = [train(small_config("dit", output_dir=None, name=f"a{i}")).run_dir for i in range(2)]
    a, b = [(run / "final/transformer/diffusion_pytorch_model.safetensors").read_bytes() for run in runs]
    assert a == b


@pytest.mark.parametrize("stop_after", [2, 3, 4], ids=["search", "T_end", "tuning"])
def test_an_interrupted_run_resumed_equals_the_uninterrupted_one(small_config, tmp_path, stop_after):
    changes = {"train": {"ema_decay": 0.9}, "checkpoint": {"every": stop_after}}
    whole = train(small_config("dit", output_dir="whole", **changes)).run_dir
    part = small_config("dit", output_dir="part", **changes)
    run = train(part).run_dir
    first = str(run / f"checkpoints/step-{stop_after:06d}")  # later ones are left there, and set aside
    resumed = train(small_config("dit", output_dir=None, resume=first, **changes)).run_dir
    names = {path.name.partition("-")[0] for path in (run / "checkpoints").iterdir()}
    assert names == {"step", "abandoned"}
    assert resumed.resolve() == run.resolve()
    for name in ("final/transformer/diffusion_pytorch_model.safetensors", "final/experts.json"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    lines = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (whole, resumed)]
    for a, b in zip(*lines, strict=True):
        a.pop("seconds_per_step"), b.pop("seconds_per_step")
        assert a == b


@pytest.mark.parametrize("every, last", [(1, "step-000004"), (2, "step-000004"), (3, "step-000003")])
def test_no_checkpoint_holds_what_came_of_a_non_finite_loss(small_config, tmp_path, every, last):
    """Whether it is read for the checkpoint of its step or in the next iteration."""
    trainer = make_trainer(small_config("dit", checkpoint={"every": every}, log={"every": 100}), tmp_path)
    prepare = trainer._prepare

    def poisoned(micro_batches):
        batches = prepare(micro_batches)
        if trainer.step == 4:
            batches[0].target[:] = torch.nan
        return batches

    trainer._prepare = poisoned
    with pytest.raises(NonFiniteLoss, match="step 5"):
        trainer.run()
    newest = checkpoints(tmp_path / "run/checkpoints")[-1]
    assert newest.name == last
    assert all(value.isfinite().all() for group in load_checkpoint(newest)[0].values() for value in group.values())


def test_a_non_finite_gradient_of_a_finite_loss_is_found(small_config, tmp_path):
    trainer = make_trainer(small_config("dit"), tmp_path)
    trainer.parts.backbone.proj_out_2.bias.register_hook(lambda gradient: gradient * torch.inf)
    trainer.update_backbone(prepared(trainer), *trainer.masks())
    with pytest.raises(NonFiniteLoss, match="gradient_norm"):
        trainer.readout.read()


def test_a_resumed_run_takes_the_new_rates_and_refuses_another_model(small_config, tmp_path):
    run = train(small_config("dit", output_dir="run", checkpoint={"every": 4})).run_dir
    changes = {"output_dir": "run", "resume": str(run / "checkpoints/step-000004")}
    for change, field in (({"experts": {"count": 2}}, "experts.count=2 differs from 3"),
                          ({"train": {"search_steps": 2}}, "train.search_steps=2 differs from 3"),
                          ({"output_dir": "elsewhere"}, "output_dir='elsewhere' is not the run")):
        with pytest.raises(InputError, match=field):
            train(small_config("dit", **{**changes, **change}))
    train(small_config("dit", **changes, optim={"backbone_lr": 5e-6}))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 6 and last["backbone_lr"] == pytest.approx(5e-6)


def test_only_the_newest_checkpoints_are_kept(small_config, tmp_path):
    make_trainer(small_config("dit", checkpoint={"every": 1, "keep": 2}), tmp_path).run()
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["step-000005", "step-000006"]


def test_a_damaged_checkpoint_is_refused(small_config, tmp_path):
    make_trainer(small_config("dit"), tmp_path).run()
    (checkpoint,) = checkpoints(tmp_path / "run/checkpoints")
    for file in ("optimizers.pt", "backbone.safetensors"):
        (checkpoint / file).write_bytes(b"\0" * 20)
        with pytest.raises(InputError, match="cannot be read") as caught:
            load_checkpoint(checkpoint)
        assert "\n" not in str(caught.value)
