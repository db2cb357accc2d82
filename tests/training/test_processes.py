"""Several processes: the same run as one, by every documented launch, and what they must agree about."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gloo_worker
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import HANGING, ROOT, WEIGHTS, assert_same_result, free_port
from safetensors.numpy import load_file

from alter import InputError, TemporalExperts, train
from alter.common.load import save_config

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def together(count):
    """The environments of processes that find one another, on the CPU."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "ACCELERATE_USE_CPU": "true"}
    return [{**ENVIRONMENT, **meeting, "WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            for rank in range(count)]


def run_processes(config_file, output, count, dtype="double"):
    command = [sys.executable, str(Path(__file__).with_name("gloo_worker.py")), str(config_file), str(output), dtype]
    workers = [subprocess.Popen(command, env=environment) for environment in together(count)]
    assert [worker.wait(timeout=HANGING) for worker in workers] == [0] * count
    return [torch.load(f"{output}-{rank}.pt", weights_only=True) for rank in range(count)]


@pytest.mark.parametrize("kind", ["dit", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("unet", "flow"))])
def test_two_processes_equal_one_with_the_same_global_batch(small_config, tmp_path, kind):
    if kind == "flow":
        FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(
            Path(small_config("dit").backbone.pretrained) / "scheduler")
    config = small_config("unet" if kind == "unet" else "dit", data={"label_dropout": 0.5},
                          train={"steps": 4, "search_steps": 2, "gradient_accumulation": 2})
    save_config(config, tmp_path / "config.yaml")
    assert_processes_equal_one(tmp_path, 2, "double", 1e-10)


def assert_processes_equal_one(tmp_path, count, dtype, tolerance):
    gloo_worker.main(tmp_path / "config.yaml", tmp_path / "one", dtype)
    single = torch.load(tmp_path / "one-0.pt", weights_only=True)
    for result in run_processes(tmp_path / "config.yaml", tmp_path / "several", count, dtype):
        assert torch.equal(result["mask_EL"], single["mask_EL"])
        assert torch.equal(result["expert_T"], single["expert_T"])
        differences = [float((result[group][name] - value).abs().max())
                       for group in ("parameters", "hypernetwork", "measured") for name, value in single[group].items()]
        assert max(differences) <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("keep_ratio", [0.6, [0.5, 0.8]])
def test_two_processes_find_the_experts_of_one_elastic_search(small_config, tmp_path, keep_ratio):
    """Each measures a part; depths and tuned rungs are drawn for each sample."""
    config = small_config("dit", search={"method": "elastic", "samples": 4, "bins": 4},
                          budget={"keep_ratio": keep_ratio}, data={"label_dropout": 0.5},
                          train={"steps": 4, "search_steps": 2, "gradient_accumulation": 2})
    save_config(config, tmp_path / "config.yaml")
    assert_processes_equal_one(tmp_path, 2, "double", 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype, tolerance", [("dit", "double", 1e-10), ("unet", "double", 1e-10),
                                                    ("dit", "float", 2e-4)])
def test_four_processes_equal_one_over_twenty_iterations_of_both_phases(small_config, tmp_path, kind, dtype, tolerance):
    """Measured: 2e-13 in float64; 5e-5 in float32, whose last place Adam's first steps, lr·sign(gradient), enlarge.

    Of the UNet in float32 they enlarge it as far as other masks on some CPUs (docs/results.md)."""
    config = small_config(kind, train={"steps": 40, "search_steps": 20, "batch_size": 16, "gradient_accumulation": 2})
    save_config(config, tmp_path / "config.yaml")
    assert_processes_equal_one(tmp_path, 4, dtype, tolerance)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_training_is_refused(small_config, monkeypatch, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(InputError, match=f"{kind} is not supported.*: use plain data parallelism"):
        train(small_config("dit"))


def finish(commands):
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    processes = [subprocess.Popen(command, env={**environment, **extra}, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT) for command, extra in commands]
    printed = "".join([process.communicate(timeout=HANGING)[0] for process in processes])
    assert [process.returncode for process in processes] == [0] * len(processes), printed
    assert printed.count("run directory:") == 2  # when it begins and when it ends, by the first process of all


@pytest.mark.slow
@pytest.mark.parametrize("launch, start", [
    ("two nodes by torchrun", "dense"), ("two tasks by SLURM", "dense"), ("cpu.yaml", "dense"),
    ("one_node.yaml", "dense"), ("two_nodes.yaml", "dense"), ("one_node.yaml", "greedy")])
def test_every_documented_launch_gives_the_run_of_one_process(small_config, tmp_path, launch, start):
    """Masks are the same; weights differ by the order in which float32 gradients are added."""
    changes = {"train": {"steps": 12, "search_steps": 6}, "experts": {"start": start}}
    alone = train(small_config("dit", output_dir=str(tmp_path / "alone"), **changes)).run_dir
    several = tmp_path / "together"
    save_config(small_config("dit", output_dir=str(several), **changes), tmp_path / "config.yaml")
    script, port = ["scripts/train.py", "--config", str(tmp_path / "config.yaml")], free_port()
    if launch == "two nodes by torchrun":
        node = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2",
                "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "1", *script]
        finish([(node, {})] * 2)
    elif launch == "two tasks by SLURM":
        finish([([sys.executable, *script], {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                                             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in "01"])
    elif launch == "two_nodes.yaml":
        node = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{launch}",
                "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        finish([([*node, "--machine_rank", rank, *script], {}) for rank in "01"])
    else:
        processes = ["--num_processes", "2"] if launch == "one_node.yaml" else []
        finish([([sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{launch}",
                  *processes, *script], {})])
    assert (several / "final/experts.json").read_text() == (alone / "final/experts.json").read_text()
    one, others = load_file(alone / WEIGHTS), load_file(several / WEIGHTS)
    assert max(np.abs(one[name] - others[name]).max() for name in one) < 1e-4
    assert json.loads((several / "summary.json").read_text())["keep_ratio"] > 0


@pytest.mark.slow
def test_two_processes_through_the_launcher(small_config, tmp_path):
    """accelerate launch, a run with everything that processes share: masks, adapters, their average, validation images
    of one process, counts of unreadable images; and the refusal of a batch they cannot share."""
    changes = {"lora": {"rank": 2}, "train": {"ema_decay": 0.5}, "validate": {"every": 3, "prompts": ["a red circle"]},
               "data": {"max_unreadable": 1.0}}
    save_config(small_config("sd", **changes), tmp_path / "small.yaml")
    for i in range(6):
        (tmp_path / f"shapes/0000{i}.png").write_bytes(b"")
    venv = Path(sys.executable).parent.parent
    command = ["bash", str(ROOT / "train_sd21.sh"), "--config", "small.yaml"]
    environment = {**os.environ, "VIRTUAL_ENV": str(venv), "ALTER_PROCESSES": "2", "CUDA_VISIBLE_DEVICES": "",
                   "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, "train.batch_size=7"], env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "cannot be shared by 2 processes" in result.stderr
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGING)
    assert result.returncode == 0, result.stderr
    alone = train(small_config("sd", output_dir=str(tmp_path / "alone"), **changes)).run_dir
    runs = tmp_path / "run", alone
    pair, single = [TemporalExperts.from_pretrained(run / "final") for run in runs]
    assert np.array_equal(pair.mask_EL, single.mask_EL) and np.array_equal(pair.expert_T, single.expert_T)
    weights = [load_file(run / "final/pytorch_lora_weights.safetensors") for run in runs]
    assert max(np.abs(weights[0][name] - weights[1][name]).max() for name in weights[0]) < 1e-4
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    assert summaries[0]["skipped_samples"] == summaries[1]["skipped_samples"] > 0
    named = [sorted((run / "unreadable.jsonl").read_text().splitlines()) for run in runs]
    assert named[0] == named[1]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))
    assert sorted(path.name for path in (tmp_path / "run/samples").iterdir()) == [
        "step-000000-dense.png", "step-000003-experts.png", "step-000006-experts.png"]


# One of several processes; the disk is full for the checkpoint of step 4.
CROWDED = """
import errno, sys
import torch
import alter.training.state
from alter import InputError
from alter import load_config
from alter import train

torch.set_num_threads(1)
save = alter.training.state.save_checkpoint

def replaced(folder, step, *arguments):
    if step == 4:
        raise OSError(errno.ENOSPC, "No space left on device")
    return save(folder, step, *arguments)

alter.training.state.save_checkpoint = replaced
try:
    train(load_config("pair.yaml", sys.argv[1:]))
except InputError as error:
    sys.exit(f"refused: {error}")
"""


def pair(*overrides):
    """What two processes wrote to stderr, once both have ended, and their exit codes."""
    processes = [subprocess.Popen([sys.executable, "-c", CROWDED, *overrides], stderr=subprocess.PIPE, text=True,
                                  env=environment) for environment in together(2)]
    errors = [process.communicate(timeout=HANGING)[1] for process in processes]
    return errors, [process.returncode for process in processes]


@pytest.mark.slow
def test_processes_agree_about_what_could_not_be_written_and_what_is_damaged(small_config, tmp_path):
    save_config(small_config("dit", checkpoint={"every": 2}), tmp_path / "pair.yaml")
    run = tmp_path / "run"
    errors, codes = pair()
    assert codes == [0, 0], errors
    assert [text.count("step-000004 could not be written") for text in errors] == [1, 0]
    shutil.copytree(run, "whole")
    (run / "checkpoints/step-000006/optimizers.pt").write_bytes(b"")
    errors, codes = pair("resume=latest")
    assert codes == [0, 0], errors
    assert [text.count("step-000006 is damaged") for text in errors] == [1, 0]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step-000002", "step-000006", "damaged-step-000006-1"}
    assert_same_result(run, tmp_path / "whole")
    errors, codes = pair("train.steps=4", f"resume={run / 'checkpoints/step-000002'}")
    assert 0 not in codes  # the second to end may be aborted by gloo, which misses the first
    assert all("refused: " in text and "step-000004 could not be written" in text for text in errors)
    (run / "checkpoints/step-000002/backbone.safetensors").write_bytes(b"")
    errors, codes = pair("resume=latest")
    assert 0 not in codes and all("refused: resume=latest: " in text for text in errors)


@pytest.mark.slow
def test_the_death_of_one_process_ends_the_launch_with_a_line(small_config, tmp_path):
    save_config(small_config("dit", train={"steps": 100_000}), tmp_path / "long.yaml")
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen(
        ["bash", str(ROOT / "train_dit.sh"), "--config", "long.yaml"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "VIRTUAL_ENV": str(Path(sys.executable).parent.parent), "ALTER_PROCESSES": "2",
             "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "temporary")})
    deadline = time.time() + HANGING
    while not (tmp_path / "run/metrics.jsonl").exists() and time.time() < deadline:
        time.sleep(0.1)
    trainers = [int(file.name) for file in (tmp_path / "temporary").glob("alter.*/*")]
    assert len(trainers) == 2
    os.kill(trainers[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=HANGING)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1] == (
        f"error: training process {trainers[1]} died without an exit code (killed, or out of memory): go on from the "
        "last checkpoint with resume=latest")
    for trainer in trainers:
        with pytest.raises(ProcessLookupError):
            os.kill(trainer, 0)
