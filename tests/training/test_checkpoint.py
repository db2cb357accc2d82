"""Checkpoints hold all that a resumed run needs; damage is found and named, and so is what a run may not change."""

import json
import os
import shutil

import pytest
import torch
from helpers import assert_same_result, make_trainer

from alter import InputError, load_config, train
from alter.common.load import save_config
from alter.training.checkpoint import checkpoints, damage, load_checkpoint, save_checkpoint
from alter.training.resume import find_run
from alter.training.state import restore_state, save_state


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_states_of_optimizers_survive_bit_for_bit(small_config, tmp_path):
    torch.manual_seed(0)
    shared = torch.randn(256)
    last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    optimizer = {
        "state": {
            0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 4, dtype=torch.float64), "last": last},
            1: {"step": 7, "state1": torch.randint(0, 256, (5,), dtype=torch.uint8), "qmap1": shared,
                "half": torch.randn(3, dtype=torch.bfloat16), "flags": torch.tensor([True, False])},
            2: {"step": 7, "qmap1": shared, "tail": shared[200:], "none": torch.empty(0), "turned": last.mT,
                "odd": torch.tensor([float("nan"), float("inf"), -0.0])},
        },
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "fused": None, "maximize": False, "params": [0, 1],
                          "max_lr": float("inf"), "name": "a.b/c"}],
    }
    (tmp_path / "run").mkdir()
    saved = save_checkpoint(tmp_path / "run/checkpoints", 7, small_config(), {}, {"a": optimizer, "b": {}}, {}, None)
    _, found, _ = load_checkpoint(saved)

    def compare(a, b):
        assert type(a) is type(b)
        if isinstance(a, dict):
            assert list(a) == list(b) and [type(key) for key in a] == [type(key) for key in b]
            a, b = list(a.values()), list(b.values())
        if isinstance(a, (list, tuple)):
            for one, other in zip(a, b, strict=True):
                compare(one, other)
        elif isinstance(a, torch.Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
        else:
            assert a == b

    compare({"a": optimizer, "b": {}}, found)
    assert found["a"]["state"][0]["last"].is_contiguous(memory_format=torch.channels_last)


def test_a_checkpoint_holds_everything_and_no_code(small_config, tmp_path):
    config = small_config("dit", train={"ema_decay": 0.5})
    make_trainer(config, tmp_path).run()
    (saved,) = checkpoints(tmp_path / "run/checkpoints")
    files = {"backbone.safetensors", "ema.safetensors", "search.safetensors", "optimizers.pt",
             "state.json", "experts.json", "config.yaml"}
    assert {file.name for file in saved.iterdir()} == {*files, "checksums.json"}
    assert json.loads((saved / "checksums.json").read_text()).keys() == files
    _, optimizers, state = load_checkpoint(saved)
    assert optimizers.keys() == {"backbone_update", "hyper_update"}
    assert all(held.keys() == {"optimizer", "schedule", "scaler", "skipped"} for held in optimizers.values())
    assert (state["step"], state["frozen"], state["counts"]["skipped_samples"]) == (6, True, 0)
    assert state["versions"].keys() == {"alter", "python", "torch", "diffusers", "accelerate"}
    assert load_config(saved / "config.yaml") == config


def test_a_resumed_run_goes_on_counting_skipped_updates(small_config, tmp_path):
    first, second = (make_trainer(small_config("dit"), tmp_path) for _ in range(2))
    first.backbone_update.skipped, first.search.hyper_update.skipped = 49, 3
    restore_state(second, save_state(first, needed=True))
    assert (second.backbone_update.skipped, second.search.hyper_update.skipped) == (49, 3)


def truncate(checkpoint):
    os.truncate(checkpoint / "backbone.safetensors", 2000)


def flip_a_bit(checkpoint):
    with open(checkpoint / "optimizers.pt", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def lose_a_file(checkpoint):
    (checkpoint / "experts.json").unlink()


def empty(checkpoint):
    for file in checkpoint.iterdir():
        file.unlink()


def garble(checkpoint):
    (checkpoint / "state.json").write_bytes(b"\xff\0")


def garble_checksums(checkpoint):
    (checkpoint / "checksums.json").write_bytes(b'{"state.json": "\xff')


DAMAGES = {truncate: "backbone.safetensors is not as it was written", lose_a_file: "experts.json is missing",
           flip_a_bit: "optimizers.pt is not as it was written", empty: "checksums.json is missing",
           garble: "state.json is not as it was written", garble_checksums: "checksums.json is not as it was written"}


def test_every_damage_is_found_and_named(small_config, tmp_path, capsys):
    make_trainer(small_config("dit", checkpoint={"every": 2}), tmp_path).run()
    folder = tmp_path / "run/checkpoints"
    second, newest = checkpoints(folder)[1:]
    assert damage(newest) is None
    shutil.copytree(newest, "whole")
    for hurt, reason in DAMAGES.items():
        hurt(newest)
        with pytest.raises(InputError, match=f"resume='.*step-000006' is damaged .{reason}.: use latest") as caught:
            find_run(str(newest), None, "run")
        assert "\n" not in str(caught.value)
        capsys.readouterr()
        assert find_run("latest", "run", "run") == (tmp_path / "run", second)
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (f"warning: {newest} is damaged ({reason}): set aside, and step-000004 is "
                        "used")
        shutil.rmtree(newest)
        shutil.copytree("whole", newest)
    for path in checkpoints(folder):
        truncate(path)
    with pytest.raises(InputError, match=r"step-000006 is damaged .*step-000004 .*step-000002 .* no other") as caught:
        find_run("latest", "run", "run")
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.iterdir() if path not in checkpoints(folder)] == []


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(small_config, tmp_path, capsys):
    """The lines of metrics that a kill has torn are dropped."""
    run = train(small_config("dit", checkpoint={"every": 2})).run_dir
    shutil.copytree(run, "whole")
    for name in ("metrics.jsonl", "unreadable.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"step": 2, "sam')
    flip_a_bit(run / "checkpoints/step-000006")
    train(small_config("dit", checkpoint={"every": 2}, resume="latest"))
    assert capsys.readouterr().err.count("step-000006 is damaged") == 1
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "damaged-step-000006-1", "step-000002", "step-000004", "step-000006"]
    assert_same_result(run, tmp_path / "whole")
    assert (run / "unreadable.jsonl").read_text() == ""


def test_a_changed_model_is_refused_and_harmless_changes_are_named(small_config, tmp_path, capsys):
    run = train(small_config("dit", checkpoint={"every": 4})).run_dir
    changes = {"resume": str(run / "checkpoints/step-000004")}
    with pytest.raises(InputError) as caught:
        train(small_config("dit", **changes, seed=1, experts={"count": 2}, optim={"backbone_lr": 5e-6},
                           budget={"keep_ratio": 0.7}))
    assert str(caught.value) == (
        "seed=1 differs from 0, experts.count=2 differs from 3, budget.keep_ratio=0.7 differs from 0.65, with which "
        "the run began: keep that, or start a new run")
    assert "→" not in capsys.readouterr().out
    train(small_config("dit", **changes, optim={"backbone_lr": 5e-6}, checkpoint={"every": 2}))
    assert [line for line in capsys.readouterr().out.splitlines() if "→" in line] == [
        "optim.backbone_lr: 0.001 → 5e-06", "checkpoint.every: 4 → 2"]


def test_a_run_without_a_checkpoint_says_what_to_do(small_config, tmp_path):
    (tmp_path / "run").mkdir()
    save_config(small_config("dit", seed=1), tmp_path / "run/config.yaml")
    with pytest.raises(InputError, match="resume=latest: no checkpoint in .*start anew in an empty output_dir"):
        train(small_config("dit", resume="latest"))
    with pytest.raises(InputError, match="output_dir=.* is not empty: choose another, or empty it: it holds no check"):
        train(small_config("dit"))
