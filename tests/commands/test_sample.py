"""`alter sample`: images that do not depend on processes and batches, and that are drawn once."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_dit, make_unet, save_pipeline, save_stable_diffusion
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from helpers import chain
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from alter import ClassConditionalPipeline, load_pipeline
from alter.backbones.cost import count_cost
from alter.commands import main
from alter.commands.benchmarking.cases import draw_experts
from alter.common.load import CONFIGS
from alter.experts.load import load_dense

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


@pytest.mark.slow
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


def test_images_at_another_rung(folder, tmp_path, draw):
    prompts = ["--prompts", str(folder / "prompts.txt"), "--num", "1"]
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    pipe = StableDiffusionPipeline.from_pretrained(run / "final")
    ladder = chain(pipe.unet, 16)
    ladder.save_pretrained(run / "final")
    for name, keep in (("default", []), ("low", ["--keep", "0.4"])):
        assert draw(tmp_path / name, *prompts, "--run", str(run), *keep)[0] == 0
    ladder.choose(0.35).save_pretrained(run / "final")
    assert draw(tmp_path / "named", *prompts, "--run", str(run))[0] == 0
    low, default, named = (images(tmp_path, name)["000000.png"] for name in ("low", "default", "named"))
    assert np.array_equal(low, named) and not np.array_equal(low, default)
    code, error = draw(tmp_path / "named", *prompts, "--run", str(run), "--keep", "0.65")
    assert code == 2 and "was drawn with keep=None, not 0.65" in error
    for arguments, message in ((["--keep", "0.2"], "below the lowest rung of their ladder, which has 0.35, 0.5, 0.65"),
                               (["--keep", "50"], "--keep 50.0: choose a share in (0, 1]"),
                               (["--keep", "0.5", "--dense"], "--keep 0.5: has no meaning with --dense")):
        code, error = draw(tmp_path / "other", *prompts, "--run", str(run), *arguments)
        assert code == 2 and message in error


def test_images_have_the_size_that_the_run_was_trained_at(folder, tmp_path, draw):
    shutil.copytree(folder / "run", tmp_path / "run")
    given = ["--prompts", str(folder / "prompts.txt"), "--num", "1", "--run", str(tmp_path / "run")]
    sides = {}
    for name, asked in (("pipeline", []), ("run", []), ("asked", ["--resolution", "64"])):
        assert draw(tmp_path / name, *given, *asked)[0] == 0
        sides[name] = images(tmp_path, name)["000000.png"].shape[0]
        (tmp_path / "run/config.yaml").write_text("backbone: {pretrained: x}\ndata: {path: x, resolution: 48}\n")
    assert sides == {"pipeline": 32, "run": 48, "asked": 64}
    code, error = draw(tmp_path / "pipeline", *given)
    assert code == 2 and "was drawn with resolution=None, not 48" in error


def test_images_of_a_run_that_latest_meant_before_are_not_mixed_in(folder, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(folder / "run", tmp_path / name)
    arguments = ["sample", "--run", str(tmp_path / "latest"), "--prompts", str(folder / "prompts.txt"), "--num", "1",
                 "--steps", "2", "--out", str(tmp_path / "out")]
    (tmp_path / "latest").symlink_to("first")
    assert main(arguments) == main(arguments) == 0
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("second")
    assert main(arguments) == 2  # another folder
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("first")
    file = tmp_path / "first/final/experts.json"
    file.write_text(file.read_text().replace("0", "1", 1))
    assert main(arguments) == 2  # trained again in the same one


@pytest.mark.parametrize("arguments, message", [
    (["--labels", "3"], "a StableDiffusionPipeline takes --prompts"),
    (["--prompts", "nowhere.txt"], "--prompts: nowhere.txt: no such file"),
])
def test_bad_input(folder, draw, arguments, message):
    code, error = draw("bad", *arguments)
    assert code == 2 and message in error
    assert not (folder / "bad").exists()


@pytest.mark.parametrize("content, expected", [
    ("a red circle\r\nb\r\n".encode("utf-16"), ["a red circle", "b"]),
    ("\ufeffa red circle\nb\n".encode(), ["a red circle", "b"]),
    ("a red\u2028circle\na\x0bb\n".encode(), ["a red\u2028circle", "a\x0bb"]),
], ids=("UTF-16", "byte order mark", "separators inside"))
def test_prompts_are_the_lines_of_a_file(folder, tmp_path, draw, content, expected):
    (tmp_path / "p.txt").write_bytes(content)
    assert draw(tmp_path / "out", "--prompts", str(tmp_path / "p.txt"))[0] == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))
    assert [image["condition"] for image in manifest["images"]] == expected


def test_no_safety_checker_blackens_images(folder, tmp_path, capsys):
    pipe = shutil.copytree(folder / "run/final", tmp_path / "pipe")
    small = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
             "projection_dim": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(
        text_config={**small, "vocab_size": 40}, vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8))
    checker.concept_embeds_weights.data.fill_(-5)  # everything is taken for what it looks for
    checker.special_care_embeds_weights.data.fill_(-5)
    checker.save_pretrained(pipe / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(pipe / "feature_extractor")
    index = json.loads((pipe / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
              "feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (pipe / "model_index.json").write_text(json.dumps(index))
    for run, out in ((pipe, "checked"), (folder / "run", "plain")):
        assert main(["sample", "--run", str(run), "--prompts", str(folder / "prompts.txt"), "--steps", "2",
                     "--out", str(tmp_path / out)]) == 0
    assert capsys.readouterr().err.count("the pipeline's safety checker is left out") == 1
    drawn, plain = images(tmp_path, "checked"), images(tmp_path, "plain")
    assert len(drawn) == 3 and all(np.array_equal(drawn[name], plain[name]) for name in plain)
    assert all(image.max() > 0 for image in drawn.values())


@pytest.fixture(scope="module")
def by_class(tmp_path_factory):
    """A finished run of a DiT of ten classes, on pixels."""
    final = tmp_path_factory.mktemp("dit") / "final"
    pipe = ClassConditionalPipeline(make_dit(), DDPMScheduler(clip_sample=False))
    pipe.save_pretrained(final)
    draw_experts(count_cost(pipe.transformer, 8), 0.6, seed=0, count=3).save_pretrained(final)
    return final


@pytest.mark.parametrize("dense", [[], ["--dense"]])
def test_classes_without_a_vae_and_other_than_1000(by_class, tmp_path, dense):
    labels = ["--labels", "9", "0", "--num", "3", "--guidance", "2", "--seed", "4", *dense]
    assert main(["sample", "--run", str(by_class.parent), "--out", str(tmp_path / "o"), "--steps", "2", *labels]) == 0
    drawn = images(tmp_path, "o")
    pipe = (load_dense if dense else load_pipeline)(by_class)
    expected = pipe([9, 0, 9], 2.0, [torch.Generator().manual_seed(4 * 2**32 + i) for i in range(3)], 2).images
    assert all(abs(drawn[f"{i:06d}.png"] - np.asarray(image).astype(int)).max() <= 1
               for i, image in enumerate(expected))


@pytest.mark.parametrize("arguments, message", [
    (["--labels", "3", "10"], "--labels 10: the model has the classes 0 to 9"),
    (["--labels", "3", "--steps", "1001"], "--steps 1001: the model has 1000 timesteps: choose at most that"),
    (["--prompts", str(CONFIGS / "demo_dit.yaml")], "a ClassConditionalPipeline takes --labels"),
])
def test_what_a_class_conditional_model_cannot_draw(by_class, tmp_path, capsys, arguments, message):
    assert main(["sample", "--run", str(by_class), "--out", str(tmp_path / "o"), *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_run_on_latents_draws_no_images(folder, tmp_path, capsys):
    pipe = save_pipeline(tmp_path / "pipe", make_unet())
    shutil.copy(folder / "run/final/experts.json", pipe)
    for dense in ([], ["--dense"]):
        assert main(["sample", "--run", str(pipe), "--prompts", str(folder / "prompts.txt"), "--out",
                     str(tmp_path / "o"), *dense]) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
        assert line.endswith("has no VAE and draws no images: name a run on images")
    assert not (tmp_path / "o").exists()


def test_four_channels_are_no_picture(tmp_path, capsys):
    pipe = ClassConditionalPipeline(make_dit(channels=4), DDPMScheduler(clip_sample=False))
    pipe.save_pretrained(tmp_path / "pipe")
    assert main(["sample", "--run", str(tmp_path / "pipe"), "--dense", "--labels", "1", "--out",
                 str(tmp_path / "o")]) == 2
    assert "has no VAE, and 4 channels are no picture" in capsys.readouterr().err and not (tmp_path / "o").exists()
