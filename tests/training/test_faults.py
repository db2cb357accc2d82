"""Kills, full disks and damaged files: what a run loses, and what it says."""

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_trainer import make_trainer

import alter.training.checkpoint
from alter import InputError, load_config, train
from alter.common.config import CONFIGS, save_config
from alter.common.files import append_text, write_text
from alter.common.process import Interruption
from alter.training.checkpoint import checkpoints, damage, find_run, load_checkpoint, save_checkpoint

ROOT = CONFIGS.parent
WEIGHTS = "final/transformer/diffusion_pytorch_model.safetensors"

# Trains, and kills itself (as kill -9 does) when something happens for the n-th time. Arguments: config, what, n.
SUICIDAL = """
import os, signal, sys
import torch
import alter.training.checkpoint, alter.experts.artefact, alter.common.files, alter.training.run
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
watch(alter.training.checkpoint, "checkpoints", "published")
watch(alter.experts.artefact.TemporalExperts, "save_pretrained")
watch(alter.training.run, "write_text", "summary")
train(load_config(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]


def assert_same_result(run, other):
    for name in (WEIGHTS, "final/experts.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    assert metrics(run) == metrics(other)


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


def test_a_checkpoint_holds_everything_and_no_pickle(small_config, tmp_path):
    config = small_config("dit", train={"ema_decay": 0.5})
    make_trainer(config, tmp_path).run()
    (saved,) = checkpoints(tmp_path / "run/checkpoints")
    files = {"backbone.safetensors", "ema.safetensors", "hypernetwork.safetensors", "optimizers.safetensors",
             "optimizers.json", "state.json", "experts.json", "config.yaml"}
    assert {file.name for file in saved.iterdir()} == {*files, "checksums.json"}
    assert json.loads((saved / "checksums.json").read_text()).keys() == files
    _, optimizers, state = load_checkpoint(saved)
    assert optimizers.keys() == {"backbone_optim", "backbone_lr", "hyper_optim", "hyper_lr", "scaler"}
    assert (state["step"], state["frozen"], state["counts"]["skipped_samples"]) == (6, True, 0)
    assert state["versions"].keys() == {"alter", "python", "torch", "diffusers", "accelerate"}
    assert load_config(saved / "config.yaml") == config


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
    run = train(small_config("dit", budget={"cost": "latency", "keep_ratio": 0.95}, checkpoint={"every": 6}))
    assert {path.parent for path in named if ".partial" not in str(path)} <= synced
    assert {path.relative_to(run).as_posix() for path in named if path.parent.name[0] != "."} == {
        "config.yaml", "latency.json", "checkpoints/step-000006", "final", "final/experts.json", "final/README.md",
        "summary.json"}
    assert [path.name for path in named if path.parent.name == ".partial-step-000006"] == [
        "optimizers.json", "state.json", "config.yaml", "experts.json", "checksums.json"]
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


def truncate(checkpoint):
    os.truncate(checkpoint / "backbone.safetensors", 2000)


def flip_a_bit(checkpoint):
    with open(checkpoint / "optimizers.safetensors", "r+b") as file:
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
           flip_a_bit: "optimizers.safetensors is not as it was written", empty: "checksums.json is missing",
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
        assert find_run("latest", "run", "run") == (tmp_path / "run", Path("run/checkpoints/step-000004"))
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (f"warning: run/checkpoints/step-000006 is damaged ({reason}): set aside, and step-000004 is "
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
    run = train(small_config("dit", checkpoint={"every": 2}))
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


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def limited(function):
    """With a limit on the size of files in place of a full disk: safetensors meets it, and has an error of its own."""
    def run(*arguments, **options):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        try:
            return function(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return run


def fill_the_disk(monkeypatch, how, at):
    """While the checkpoint of step `at` is written. how: "real", or the module and function that meet it."""
    def replaced(folder, step, *arguments):
        if step == at and how == "real":
            return limited(save_checkpoint)(folder, step, *arguments)
        with pytest.MonkeyPatch.context() as patch:
            if step == at:
                patch.setattr(*how, full_disk)
            return save_checkpoint(folder, step, *arguments)

    monkeypatch.setattr(alter.training.checkpoint, "save_checkpoint", replaced)


@pytest.mark.parametrize("how", ["real", (alter.training.checkpoint, "save_file"), (os, "fsync"), (os, "mkdir")],
                         ids=["real", "save_file", "fsync", "mkdir"])
def test_a_full_disk_costs_one_checkpoint_and_not_the_run(small_config, tmp_path, monkeypatch, capsys, how):
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
    assert ("File too large" if how == "real" else "No space left on device") in line


def test_a_checkpoint_that_a_run_ends_with_must_be_written(small_config, tmp_path, monkeypatch):
    changes = {"checkpoint": {"every": 4}}
    whole = train(small_config("dit", output_dir="whole", **changes))
    with monkeypatch.context() as patch:
        fill_the_disk(patch, (alter.training.checkpoint, "save_file"), at=6)
        with pytest.raises(InputError, match="step-000006 could not be written .* go on from step-000004 with "
                                             "resume=latest"):
            train(small_config("dit", **changes))
        (tmp_path / "other").mkdir()
        trainer = make_trainer(small_config("dit"), tmp_path / "other")
        trainer.interruption.received = signal.SIGTERM
        fill_the_disk(patch, (alter.training.checkpoint, "save_file"), at=1)
        with pytest.raises(InputError, match="step-000001 could not be written .* start anew: there is no earlier"):
            trainer.run()
    assert_same_result(train(small_config("dit", resume="latest", **changes)), whole)


def test_results_that_do_not_fit_on_the_disk_are_written_by_a_resumed_run(small_config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(alter.training.run, "export", full_disk)
        with pytest.raises(InputError, match="could not be written .*No space left.* set resume=latest"):
            train(small_config("dit"))
    run = train(small_config("dit", resume="latest"))
    assert (run / WEIGHTS).is_file() and [line["step"] for line in metrics(run)] == list(range(1, 7))


def test_a_full_disk_costs_metrics_and_not_the_run(small_config, tmp_path, capsys):
    trainer = make_trainer(small_config("dit"), tmp_path)
    (tmp_path / "run/metrics.jsonl").symlink_to("/dev/full")
    trainer.run()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith(f"warning: {tmp_path}/run: metrics.jsonl could not be written ([Errno 28] No space left")


def test_a_changed_model_is_refused_and_harmless_changes_are_named(small_config, tmp_path, capsys):
    run = train(small_config("dit", checkpoint={"every": 4}))
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


def test_a_second_signal_stops_at_once(request):
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a script begins without it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, usual))
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_run_without_a_checkpoint_says_what_to_do(small_config, tmp_path):
    (tmp_path / "run").mkdir()
    save_config(small_config("dit"), tmp_path / "run/config.yaml")
    with pytest.raises(InputError, match="resume=latest: no checkpoint in .*start anew in an empty output_dir"):
        train(small_config("dit", resume="latest"))
    with pytest.raises(InputError, match="output_dir=.* is not empty: choose another, or empty it: it holds no check"):
        train(small_config("dit"))


def killed(config, event, number, tmp_path):
    save_config(config, tmp_path / "killed.yaml")
    result = subprocess.run([sys.executable, "-c", SUICIDAL, "killed.yaml", event, str(number)], capture_output=True,
                            text=True, timeout=200,
                            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.mark.parametrize("event, number, step", [
    pytest.param("save_file", 6, 2, id="while a checkpoint is written"),
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
    run = train(small_config("dit", resume="latest", **changes))
    assert_same_result(run, train(small_config("dit", output_dir="whole", **changes)))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000006"]
    assert not list(run.glob(".partial*"))


# One of several processes; the disk is full for the checkpoint of step 4.
CROWDED = """
import errno, sys
import torch
import alter.training.checkpoint
from alter import InputError
from alter import load_config
from alter import train

torch.set_num_threads(1)
save = alter.training.checkpoint.save_checkpoint

def replaced(folder, step, *arguments):
    if step == 4:
        raise OSError(errno.ENOSPC, "No space left on device")
    return save(folder, step, *arguments)

alter.training.checkpoint.save_checkpoint = replaced
try:
    train(load_config("pair.yaml", sys.argv[1:]))
except InputError as error:
    sys.exit(f"refused: {error}")
"""


def pair(*overrides):
    """What two processes wrote to stderr, once both have ended, and their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
                   "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen([sys.executable, "-c", CROWDED, *overrides], stderr=subprocess.PIPE, text=True,
                         env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return errors, [process.returncode for process in processes]


@pytest.mark.slow
def test_processes_agree_about_what_could_not_be_written_and_what_is_damaged(small_config, tmp_path):
    save_config(small_config("dit", checkpoint={"every": 2}), tmp_path / "pair.yaml")
    run = tmp_path / "run"
    errors, codes = pair()
    assert codes == [0, 0], errors
    assert [text.count("step-000004 could not be written") for text in errors] == [1, 0]
    shutil.copytree(run, "whole")
    flip_a_bit(run / "checkpoints/step-000006")
    errors, codes = pair("resume=latest")
    assert codes == [0, 0], errors
    assert [text.count("step-000006 is damaged") for text in errors] == [1, 0]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step-000002", "step-000006", "damaged-step-000006-1"}
    assert_same_result(run, tmp_path / "whole")
    errors, codes = pair("train.steps=4", f"resume={run / 'checkpoints/step-000002'}")
    assert 0 not in codes  # the second to end may be aborted by gloo, which misses the first
    assert all("refused: " in text and "step-000004 could not be written" in text for text in errors)
    truncate(run / "checkpoints/step-000002")
    errors, codes = pair("resume=latest")
    assert 0 not in codes and all("refused: resume=latest: " in text for text in errors)


def test_the_death_of_one_process_ends_the_launch_with_a_line(small_config, tmp_path):
    save_config(small_config("dit", train={"steps": 100_000}), tmp_path / "long.yaml")
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen(
        ["bash", str(ROOT / "train_dit.sh"), "--config", "long.yaml"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "VIRTUAL_ENV": str(Path(sys.executable).parent.parent), "ALTER_PROCESSES": "2",
             "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "temporary")})
    deadline = time.time() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() and time.time() < deadline:
        time.sleep(0.1)
    trainers = [int(file.name) for file in (tmp_path / "temporary").glob("alter.*/*")]
    assert len(trainers) == 2
    os.kill(trainers[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1] == (
        f"error: training process {trainers[1]} died without an exit code (killed, or out of memory): go on from the "
        "last checkpoint with resume=latest")
    for trainer in trainers:
        with pytest.raises(ProcessLookupError):
            os.kill(trainer, 0)
