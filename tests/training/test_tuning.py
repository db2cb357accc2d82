"""Tuning a finished run further: with its experts on, from its weights or from those it began with."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config_factory
from safetensors.torch import load_file

from alter import InputError, TemporalExperts, load_config, train
from alter.backbones.lora import Base
from alter.common.load import CONFIGS
from alter.data.shapes import write_shapes
from alter.training.setup.parts import build
from alter.training.setup.plan import check


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished run of the tiny Stable Diffusion."""
    return train(config_factory(tmp_path_factory.mktemp("searched"))("sd")).run_dir


@pytest.mark.parametrize("kind", ["full", "lora", "dreambooth"])
def test_a_finished_run_is_tuned_further_with_its_experts_on(small_config, tmp_path, searched, kind):
    if kind == "lora":
        pytest.importorskip("peft")
    final = str(searched / "final")
    changes = {"backbone": {"pretrained": final}, "experts": {"pretrained": final},
               "loss": {"denoise": 1.0, "output_kd": 0.0, "feature_kd": 0.0}}
    if kind == "lora":
        changes["lora"] = {"rank": 2}
    if kind == "dreambooth":
        write_shapes(tmp_path / "subject", 3, 1)
        changes["data"] = {"path": "subject", "prompt": "a red circle", "prior_path": "shapes",
                           "prior_prompt": "a circle", "holdout": 0}
    run = train(small_config("sd", **changes)).run_dir
    before, after = (TemporalExperts.from_pretrained(folder / "final") for folder in (searched, run))
    assert np.array_equal(before.mask_EL, after.mask_EL) and np.array_equal(before.expert_T, after.expert_T)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and not any(name.startswith("search/") for line in lines for name in line)
    if kind == "lora":
        assert Base.beside(run / "final").pretrained == final and not (run / "final/unet").exists()
    else:
        weights = [load_file(folder / "final/unet/diffusion_pytorch_model.safetensors") for folder in (searched, run)]
        assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("absolute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_experts_of_latest_are_those_from_before_the_run(small_config, tmp_path, absolute):
    """The new run moves the link outputs/<name>/latest, and goes on from a checkpoint all the same."""
    first = train(small_config("sd", output_dir=None, name="x")).run_dir
    latest = str(tmp_path / "outputs/x/latest/final") if absolute else "outputs/x/latest/final"
    changes = {"output_dir": None, "name": "x", "backbone": {"pretrained": latest}, "experts": {"pretrained": latest},
               "loss": {"denoise": 1.0, "output_kd": 0.0, "feature_kd": 0.0}, "checkpoint": {"every": 4},
               "train": {"steps": 6, "search_steps": 100}}
    second = train(small_config("sd", **changes)).run_dir
    assert Path("outputs/x/latest").resolve() == second.resolve() != first.resolve()
    assert json.loads((second / "summary.json").read_text())["output_error"] is None
    weights = (second / "final/unet/diffusion_pytorch_model.safetensors").read_bytes()
    train(small_config("sd", **changes, resume=str(second / "checkpoints/step-000004")))
    assert (second / "final/unet/diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_a_finished_run_is_no_dense_teacher(small_config, searched):
    final = str(searched / "final")
    with pytest.raises(InputError, match="is a finished run: set teacher.pretrained to the original model"):
        build(small_config("sd", backbone={"pretrained": final}, experts={"pretrained": final}))


def test_the_documented_recipes_are_valid(tmp_path):
    """Every command of docs/training.md that starts from a finished run, as bash splits it into arguments."""
    text = (CONFIGS.parent / "docs/training.md").read_text().partition("## Going on")[2]
    (tmp_path / "train_sd21.sh").write_text(f'"{sys.executable}" -c "import json, sys; '
                                            'print(json.dumps(sys.argv[1:]))" "$@"')
    shown = subprocess.run(["bash", "-c", text.split("```")[1].removeprefix("bash")], capture_output=True, text=True,
                           check=True, cwd=tmp_path).stdout
    commands = [json.loads(line) for line in shown.splitlines()]
    assert len(commands) == 4
    for overrides in commands:
        config = load_config("configs/sd21.yaml", overrides)
        assert config.experts.pretrained == config.backbone.pretrained == "outputs/sd21/latest/final"
        assert config.validate.every <= config.train.steps
        assert config.loss.distils == (config.teacher.pretrained is not None)


def test_a_warm_start_from_a_run_searches_nothing_and_keeps_the_masks(small_config, searched):
    """From the pretrained weights: the experts of a former run, tuned with distillation."""
    run = train(small_config("sd", experts={"pretrained": str(searched / "final")})).run_dir
    before, after = (TemporalExperts.from_pretrained(folder / "final") for folder in (searched, run))
    assert np.array_equal(before.mask_EL, after.mask_EL) and before.keep_ratio == after.keep_ratio


def test_merged_adapters_are_not_exported_a_second_time(small_config):
    pytest.importorskip("peft")
    final = str(train(small_config("sd", output_dir="adapted", lora={"rank": 2, "merge": True})).run_dir / "final")
    run = train(small_config("sd", backbone={"pretrained": final}, experts={"pretrained": final},
                             loss={"denoise": 1.0, "output_kd": 0.0, "feature_kd": 0.0})).run_dir
    assert (Path(final) / "pytorch_lora_weights.safetensors").exists()
    assert not (run / "final/pytorch_lora_weights.safetensors").exists()


def test_given_experts_bring_their_budget_and_take_the_costs_of_this_resolution(small_config, searched):
    changes = {"budget": {"keep_ratio": 0.9, "over": "prunable"}, "experts": {"pretrained": str(searched / "final")}}
    former = TemporalExperts.from_pretrained(searched / "final")
    run = train(small_config("sd", data={"resolution": 48}, **changes)).run_dir
    experts = TemporalExperts.from_pretrained(run / "final")
    assert experts.keep_ratio_target == 0.65 and experts.budget_over == "total"
    assert experts.macs_total > 2 * former.macs_total
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["keep_ratio"] == pytest.approx(experts.keep_ratio) for line in lines)


def test_experts_that_cannot_be_tuned_are_refused(small_config, searched, tmp_path):
    experts = TemporalExperts.from_pretrained(searched / "final")
    rungs = tuple(dataclasses.replace(rung, cached=True) for rung in experts.ladder)
    cached = dataclasses.replace(experts, ladder=rungs)
    cached.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has a cached rung, and training sees no steps before its own"):
        build(small_config("sd", experts={"pretrained": str(tmp_path)}))
    with pytest.raises(InputError, match=r"experts.pretrained=.*: their 26 sites are not the 4"):
        build(small_config("dit", experts={"pretrained": str(searched / "final")}))
    for given, message in ((str(searched), "holds no experts.json"), ("./nowhere", "no such folder, and the hub")):
        with pytest.raises(InputError, match=message):
            check(small_config("sd", experts={"pretrained": given}), 1)
