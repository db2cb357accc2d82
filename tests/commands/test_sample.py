"""`alter sample`: images that do not depend on processes and batches, and that are drawn once."""

import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import save_stable_diffusion
from diffusers import StableDiffusionPipeline
from PIL import Image

from alter.backbones.cost import count_cost
from alter.commands import main
from alter.commands.benchmarking.cases import draw_experts
from alter.common.load import CONFIGS

SCRIPT = str(CONFIGS.parent / "scripts/sample.py")
PROMPTS = ["a red circle", "a blue square", "a green triangle above a red square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample")
    final = save_stable_diffusion(root / "run/final")
    cost = count_cost(StableDiffusionPipeline.from_pretrained(final).unet, 16)
    draw_experts(cost, 0.6, seed=0, count=3).save_pretrained(final)
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return root


def start(folder, out, *arguments, rank=None, port=0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    if rank is not None:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen([sys.executable, SCRIPT, "--run", str(folder / "run"), "--out", str(folder / out),
                             "--steps", "3", *arguments], env=environment, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    errors = [process.communicate(timeout=900)[1] for process in processes]
    return [process.returncode for process in processes], errors


def images(folder, out):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in (folder / out).glob("[0-9]*.png")}


def test_processes_batches_and_interruptions_do_not_change_the_images(folder):
    prompts = ["--prompts", str(folder / "prompts.txt"), "--num", "5"]
    assert finish(start(folder, "one", *prompts))[0] == [0]
    alone = images(folder, "one")
    assert sorted(alone) == [f"{i:06d}.png" for i in range(5)] and alone["000000.png"].shape == (32, 32, 3)
    assert not np.array_equal(alone["000000.png"], alone["000003.png"])  # the same prompt, another seed
    manifest = json.loads((folder / "one/manifest.json").read_text())
    assert [image["condition"] for image in manifest["images"]] == [PROMPTS[i % 3] for i in range(5)]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    codes, errors = finish(*(start(folder, "two", *prompts, "--batch", "2", rank=r, port=port) for r in (0, 1)))
    assert codes == [0, 0], errors
    assert re.search(r"3/3 .*image/s", errors[0]) and not re.search(r"5/5 .*image/s", errors[0])  # its share
    pair = images(folder, "two")
    assert pair.keys() == alone.keys()
    assert max(abs(pair[name] - alone[name]).max() for name in alone) <= 1

    kept = (folder / "one/000001.png").stat().st_mtime_ns
    (folder / "one/000002.png").unlink()
    assert finish(start(folder, "one", *prompts, "--batch", "1"))[0] == [0]
    assert (folder / "one/000001.png").stat().st_mtime_ns == kept
    assert abs(images(folder, "one")["000002.png"] - alone["000002.png"]).max() <= 1


@pytest.fixture
def draw(folder, capsys):
    """The command in this process; returns its exit code and the last line of its errors."""
    def call(out, *arguments):
        code = main(["sample", "--run", str(folder / "run"), "--out", str(folder / out), "--steps", "3", *arguments])
        return code, (capsys.readouterr().err.strip().splitlines() or [""])[-1]

    return call


def test_dense_images_differ_and_another_setting_is_not_mixed_in(folder, draw):
    prompts = ["--prompts", str(folder / "prompts.txt"), "--scheduler", "DDIMScheduler", "--guidance", "2"]
    assert draw("dense", *prompts, "--dense")[0] == draw("served", *prompts)[0] == 0
    assert abs(images(folder, "dense")["000000.png"] - images(folder, "served")["000000.png"]).max() > 2
    code, error = draw("dense", *prompts)
    assert code == 2 and "was drawn with dense=True, not False" in error


@pytest.mark.parametrize("arguments, message", [
    (["--labels", "3"], "a StableDiffusionPipeline takes --prompts"),
    (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: no such file"),
])
def test_bad_input(folder, draw, arguments, message):
    code, error = draw("bad", *arguments)
    assert code == 2 and message in error
    assert not (folder / "bad").exists()
