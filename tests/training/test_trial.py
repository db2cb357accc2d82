import copy
import subprocess
import sys
import time

import pytest
import torch
from helpers import HANGING, make_trainer

from alter import InputError
from alter.data.batches import warn_while_waiting
from alter.training.run import make_accelerator
from alter.training.setup.parts import build
from alter.training.trainer import Trainer
from alter.training.trial import describe_memory, measure_memory


def state_of(trainer):
    return copy.deepcopy({
        "backbone": trainer.backbone.state_dict(), "search": trainer.search.tensors(),
        "counts": trainer.readout.counts, "own": trainer.readout.own,
        "ema": trainer.ema.state_dict() if trainer.ema else None,
        **{name: update.state_dict() for name, (update, _) in trainer.updates.items()},
        "skipped": [trainer.backbone_update.skipped, trainer.search.hyper_update.skipped],
    })


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def noted(function, trainer, calls):
    def call(*arguments):
        calls.append((function.__name__, len(trainer.backbone_update.optimizer.state)))
        return function(*arguments)
    return call


@pytest.mark.parametrize("changes, scaled, searching", [
    ({"train": {"ema_decay": 0.9}}, False, True), ({"train": {"ema_decay": 0.9}}, False, False),
    ({"train": {"schedule": "two_stage"}}, False, True), ({"train": {"gradient_accumulation": 2}}, True, True),
    ({"validate": {"every": 2, "labels": [1, 2]}, "train": {"ema_decay": 0.9}}, False, True),
    ({"lora": {"rank": 2}, "optim": {"lr_schedule": "cosine", "warmup_steps": 2}}, False, True),
], ids=["search", "tuning", "two stages", "scaled micro-batches", "images", "lora"])
def test_a_trial_changes_nothing(small_config, tmp_path, changes, scaled, searching):
    trainer = make_trainer(small_config("dit", optim={"weight_decay": 0.5, **changes.pop("optim", {})}, **changes),
                           tmp_path)
    if scaled:
        for update in (trainer.backbone_update, trainer.search.hyper_update):
            update.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before, updates = state_of(trainer), []
    for owner, name in ((trainer.search, "update"), (trainer, "update_backbone")):
        setattr(owner, name, noted(getattr(owner, name), trainer, updates))
    peaks = measure_memory(trainer, searching)
    assert same(state_of(trainer), before)
    assert all(parameter.grad is None for parameter in trainer.parameters)
    joint = [] if changes.get("train", {}).get("schedule") else ["update_backbone"]
    assert [name for name, _ in updates] == [*(["update", *joint] if searching else []), "update_backbone"]
    assert {held for _, held in updates} == {len(trainer.parameters)}  # AdamW's averages are counted in every peak
    drawn = ["validation images"] if "validate" in changes else []
    assert list(peaks) == [*(["search"] if searching else []), "tuning", *drawn]
    assert not (tmp_path / "run/samples").exists()
    assert "of one iteration, measured:" in describe_memory(trainer, peaks)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory: 20 GiB"),
])
def test_what_does_not_fit_is_one_line(small_config, tmp_path, monkeypatch, error):
    trainer = make_trainer(small_config("dit"), tmp_path)

    def too_much(*arguments):
        raise error

    monkeypatch.setattr(trainer, "update_backbone", too_much)
    with pytest.raises(InputError, match="train.batch_size=8: 8 samples at once do not fit into the .* GiB of main "
                                         "memory: set backbone.gradient_checkpointing=true, .*accumulation, .*bf16"):
        measure_memory(trainer, True)


def test_validation_images_that_do_not_fit_are_one_line(small_config, tmp_path, monkeypatch):
    trainer = make_trainer(small_config("dit", validate={"every": 2, "labels": [1]}), tmp_path)

    def too_much(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(trainer.validator, "images", too_much)
    with pytest.raises(InputError, match="validate.every=2: validation images do not fit into the .* GiB of main "
                                         "memory beside the training: set validate.every=null, or give fewer"):
        measure_memory(trainer, True)


_PEAKS = """
from alter.common.process import forget_peak, peak_memory
forget_peak()
before = peak_memory()[0]
bytearray(b"1") * 2**28
held = peak_memory()[0]
forget_peak()
print(before, held, peak_memory()[0])
"""


def test_the_peak_counts_what_was_freed_since():
    done = subprocess.run([sys.executable, "-c", _PEAKS], capture_output=True, text=True, check=True, timeout=HANGING)
    before, held, after = map(int, done.stdout.split())
    assert 2**28 - 2**22 <= held - before < 2**29
    if after < before + 2**27:  # where the system lets the peak be forgotten
        assert after <= before + 2**26


def test_a_slow_loader_is_reported_until_its_batch_arrives(capsys):
    lines = []

    def slow():
        yield 1
        deadline = time.monotonic() + HANGING
        while len(lines) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
            lines.extend(capsys.readouterr().err.splitlines())
        yield 2

    assert list(warn_while_waiting(slow(), "a batch of data.path='x'", every=0.05)) == [1, 2]
    assert len(lines) >= 2 and all(line.startswith("waiting for a batch of data.path='x' since ") for line in lines)
    time.sleep(0.1)  # a line that was under way
    capsys.readouterr()
    time.sleep(0.3)
    assert not capsys.readouterr().err


def test_an_error_of_the_loader_arrives(capsys):
    def broken():
        yield 1
        raise InputError("data.path: gone")

    items = warn_while_waiting(broken(), "a batch", every=0.05)
    assert next(items) == 1
    with pytest.raises(InputError, match="gone"):
        next(items)
    time.sleep(0.2)
    assert not capsys.readouterr().err


@pytest.mark.gpu
def test_the_peak_of_a_gpu_is_what_torch_counts(small_config, tmp_path):
    config = small_config("dit")
    (tmp_path / "run").mkdir()
    trainer = Trainer(config, build(config, device="cuda"), make_accelerator(config), tmp_path / "run")
    peaks = measure_memory(trainer, True)
    assert peaks["tuning"] == torch.cuda.max_memory_allocated()
