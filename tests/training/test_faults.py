"""Kills, full disks and damaged files: what a run loses, and what it says."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import HANGING, ROOT, WEIGHTS, assert_same_result, full_disk, make_trainer, metrics_of, uneven_latency

import alter.training.checkpoint
import alter.training.run
import alter.training.state
import alter.training.summary
from alter import InputError, train
from alter.common.files import append_text, write_text
from alter.common.load import save_config
from alter.common.process import Interruption
from alter.training.checkpoint import checkpoints, damage, save_checkpoint

# Trains, and kills itself (as kill -9 does) when something happens for the n-th time. Arguments: config, what, n.
SUICIDAL = """
import os, signal, sys
import torch
import alter.backbones.pretrained, alter.experts.artefact, alter.training.checkpoint, alter.training.summary
from alter.training.trainer import Trainer
from alter import load_config
from alter import train

torch.set_num_threads(1)
event, number = sys.argv[2], int(sys.argv[3])
seen = 0

def watch(owner, name, known_as=None, torn=False):
    function = getattr(owner, name)
    def watched(*arguments, **options):
        global seen
        seen += event == (known_as or name)
        if event == (known_as or name) and seen == number:
            if torn:  # half of the file is written
                function(*arguments, **options)
                os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    setattr(owner, name, watched)

watch(Trainer, "iteration")
watch(alter.training.checkpoint, "save_file", torn=True)
watch(alter.training.checkpoint, "publish")
watch(alter.backbones.pretrained, "publish")
watch(alter.training.checkpoint, "checkpoints", "published")
watch(alter.experts.artefact.TemporalExperts, "save_pretrained")
watch(alter.training.summary, "write_text", "summary")
train(load_config(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_everything_is_on_the_disk_before_it_gets_its_name(small_config, tmp_path, monkeypatch):
    """A power cut leaves a name with a complete file or folder behind it, in the run and in final/."""
    synced, named = set(), []
    fsync = os.fsync

    def note_sync(handle):
        synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def noting(function):
        def replaced(source, target, **options):
            source, target = Path(source).resolve(), Path(target)
            if tmp_path / "run" in source.parents:
                unsynced = {source, *(source.rglob("*") if source.is_dir() else ())} - synced
                assert not unsynced, target
                synced.discard(target.parent.resolve())
                named.append(target.resolve())
            function(source, target, **options)
        return replaced

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", noting(os.rename))
    monkeypatch.setattr(os, "replace", noting(os.replace))
    monkeypatch.setattr(alter.training.run, "plan_latency", lambda config, device: uneven_latency())
    config = small_config("dit", budget={"cost": "latency", "keep_ratio": 0.95}, checkpoint={"every": 6})
    run = train(config).run_dir
    assert {path.parent for path in named if ".partial" not in str(path)} <= synced
    assert {path.relative_to(run).as_posix() for path in named if path.parent.name[0] != "."} == {
        "config.yaml", "latency.json", "checkpoints/step-000006", "final", "final/experts.json", "final/README.md",
        "summary.json"}
    assert [path.name for path in named if path.parent.name == ".partial-step-000006"] == [
        "state.json", "config.yaml", "experts.json", "checksums.json"]
    assert not list(run.rglob(".partial*"))


def test_a_full_disk_leaves_small_files_as_they_were(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")
    append_text(tmp_path / "b.jsonl", "1\n")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        for write, name in ((write_text, "a.json"), (append_text, "b.jsonl")):
            with pytest.raises(OSError, match="too large"):
                write(tmp_path / name, "x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "old", "b.jsonl": "1\n"}


def limited(function, size):
    """With a limit on the size of files in place of a full disk: safetensors and torch have errors of their own."""
    def run(*arguments, **options):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            return function(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return run


def fill_the_disk(monkeypatch, how, at):
    """While the checkpoint of step `at` is written. how: bytes that a file may have, or what fails, and how."""
    def replaced(folder, step, *arguments):
        if step == at and isinstance(how, int):
            return limited(save_checkpoint, how)(folder, step, *arguments)
        with pytest.MonkeyPatch.context() as patch:
            if step == at:
                patch.setattr(*how)
            return save_checkpoint(folder, step, *arguments)

    monkeypatch.setattr(alter.training.state, "save_checkpoint", replaced)


@pytest.mark.parametrize("how, reason", [
    (10_000, "File too large"), ((torch, "save", limited(torch.save, 10_000)), ""),
    *(((owner, name, full_disk), "No space left on device") for owner, name in (
        (alter.training.checkpoint, "save_file"), (os, "fsync"), (os, "mkdir"))),
], ids=["weights", "optimizers", "save_file", "fsync", "mkdir"])
def test_a_full_disk_costs_one_checkpoint_and_not_the_run(small_config, tmp_path, monkeypatch, capsys, how, reason):
    fill_the_disk(monkeypatch, how, at=4)
    folder = tmp_path / "run/checkpoints"
    seen = []
    trainer = make_trainer(small_config("dit", checkpoint={"every": 2, "keep": 1}), tmp_path)
    iteration = trainer.iteration
    trainer.iteration = lambda *args: (seen.append(sorted(p.name for p in folder.glob("*"))), iteration(*args))[1]
    trainer.run()
    assert seen[2] == seen[3] == seen[4] == seen[5] == ["step-000002"]
    assert [path.name for path in folder.iterdir()] == ["step-000006"] and damage(folder / "step-000006") is None
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith(f"warning: {folder}/step-000004 could not be written (") and "the run goes on" in line
    assert reason in line


def test_a_checkpoint_that_a_run_ends_with_must_be_written(small_config, tmp_path, monkeypatch):
    changes = {"checkpoint": {"every": 4}}
    whole = train(small_config("dit", output_dir="whole", **changes)).run_dir
    with monkeypatch.context() as patch:
        fill_the_disk(patch, (alter.training.checkpoint, "save_file", full_disk), at=6)
        with pytest.raises(InputError, match="step-000006 could not be written .* go on from step-000004 with "
                                             "resume=latest"):
            train(small_config("dit", **changes))
        (tmp_path / "other").mkdir()
        trainer = make_trainer(small_config("dit"), tmp_path / "other")
        trainer.readout.interruption.received = signal.SIGTERM
        fill_the_disk(patch, (alter.training.checkpoint, "save_file", full_disk), at=1)
        with pytest.raises(InputError, match="step-000001 could not be written .* start anew: there is no earlier"):
            trainer.run()
    assert_same_result(train(small_config("dit", resume="latest", **changes)).run_dir, whole)


def test_results_that_do_not_fit_on_the_disk_are_written_by_a_resumed_run(small_config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(alter.training.summary, "export", full_disk)
        with pytest.raises(InputError, match="could not be written .*No space left.* set resume=latest"):
            train(small_config("dit"))
    run = train(small_config("dit", resume="latest")).run_dir
    assert (run / WEIGHTS).is_file() and [line["step"] for line in metrics_of(run)] == list(range(1, 7))


def test_a_full_disk_costs_metrics_and_not_the_run(small_config, tmp_path, capsys):
    trainer = make_trainer(small_config("dit"), tmp_path)
    (tmp_path / "run/metrics.jsonl").symlink_to("/dev/full")
    trainer.run()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith(f"warning: {tmp_path}/run: metrics.jsonl could not be written ([Errno 28] No space left")


def test_a_second_signal_stops_at_once(request):
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a script begins without it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, usual))
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def killed(config, event, number, tmp_path):
    save_config(config, tmp_path / "killed.yaml")
    result = subprocess.run([sys.executable, "-c", SUICIDAL, "killed.yaml", event, str(number)], capture_output=True,
                            text=True, timeout=HANGING,
                            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.mark.parametrize("event, number, step", [
    pytest.param("save_file", 5, 2, id="while a checkpoint is written"),
    *(pytest.param(*values, id=name, marks=pytest.mark.slow) for name, values in {
        "in the search": ("iteration", 3, 2), "at T_end, the checkpoint before": ("iteration", 4, 2),
        "after the search": ("iteration", 6, 4), "before a checkpoint gets its name": ("publish", 2, 2),
        "before older checkpoints are dropped": ("published", 2, 4), "before final/ gets its name": ("publish", 4, 6),
        "before final/ has experts": ("save_pretrained", 3, 6), "before the summary": ("summary", 1, 6),
    }.items())])
def test_a_killed_run_resumed_equals_the_uninterrupted_one(small_config, tmp_path, event, number, step):
    changes = {"train": {"ema_decay": 0.9}, "checkpoint": {"every": 2, "keep": 1}}
    killed(small_config("dit", **changes), event, number, tmp_path)
    assert checkpoints(tmp_path / "run/checkpoints")[-1].name == f"step-{step:06d}"
    run = train(small_config("dit", resume="latest", **changes)).run_dir
    assert_same_result(run, train(small_config("dit", output_dir="whole", **changes)).run_dir)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000006"]
    assert not list(run.glob(".partial*"))
