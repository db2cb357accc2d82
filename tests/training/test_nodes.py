import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from alter.common.config import save_config
from alter.common.errors import InputError
from alter.training.run import train

ROOT = Path(__file__).parents[2]
WEIGHTS = "final/transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_training_is_refused(small_config, monkeypatch, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(InputError, match=f"{kind} is not supported.*: use plain data parallelism"):
        train(small_config("dit"))


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def finish(commands):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, env={**environment, **extra}, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT) for command, extra in commands]
    printed = "".join([process.communicate(timeout=400)[0] for process in processes])
    assert [process.returncode for process in processes] == [0] * len(processes), printed
    assert printed.count("run directory:") == 1  # by the first process of all


@pytest.mark.slow
@pytest.mark.parametrize("launch, start", [
    ("two nodes by torchrun", "dense"), ("two tasks by SLURM", "dense"), ("cpu.yaml", "dense"),
    ("one_node.yaml", "dense"), ("two_nodes.yaml", "dense"), ("one_node.yaml", "greedy")])
def test_every_documented_launch_gives_the_run_of_one_process(small_config, tmp_path, launch, start):
    """Masks are the same; weights differ by the order in which float32 gradients are added."""
    changes = {"train": {"steps": 12, "search_steps": 6}, "experts": {"start": start}}
    alone = train(small_config("dit", output_dir=str(tmp_path / "alone"), **changes))
    together = tmp_path / "together"
    save_config(small_config("dit", output_dir=str(together), **changes), tmp_path / "config.yaml")
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
    assert (together / "final/experts.json").read_text() == (alone / "final/experts.json").read_text()
    one, several = load_file(alone / WEIGHTS), load_file(together / WEIGHTS)
    assert max(np.abs(one[name] - several[name]).max() for name in one) < 1e-4
    assert json.loads((together / "summary.json").read_text())["keep_ratio"] > 0
