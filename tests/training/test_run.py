"""Whole runs: the demo in a shortened form, the run directory, and bad input through the script."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_dit, make_vae, save_latents, save_pipeline
from diffusers import AutoencoderKL, DiTTransformer2DModel
from helpers import HANGING, KEYS, ROOT, SHORT, run_script, save_noise
from PIL import Image
from safetensors.torch import load_file, save_file

from alter import InputError, TemporalExperts, load_config, train
from alter.common.load import save_config
from alter.data.batches import split
from alter.training.setup.describe import describe_run
from alter.training.setup.parts import build

script = functools.partial(run_script, "train")


def launcher(*arguments, cwd):
    venv = Path(sys.executable).parent.parent
    return subprocess.run(["bash", str(ROOT / "train_dit.sh"), *arguments], cwd=cwd, text=True, capture_output=True,
                          timeout=HANGING, env={**os.environ, "VIRTUAL_ENV": str(venv), "HF_HUB_OFFLINE": "1",
                                            "CUDA_VISIBLE_DEVICES": ""})


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_the_demo_in_short(tmp_path, real_pictures):
    config = load_config("configs/demo_dit.yaml", SHORT)
    run = train(config).run_dir
    summary = json.loads((run / "summary.json").read_text())
    assert KEYS <= summary.keys()
    assert abs(summary["keep_ratio"] - 0.65) <= 0.005
    assert summary["macs_experts"] == round(summary["keep_ratio"] * summary["macs_dense"])
    assert (tmp_path / "outputs/demo_dit/latest").resolve() == run.resolve()
    assert load_config(run / "config.yaml") == config
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert list(run.glob("**/events.out.tfevents*"))
    for name in ("samples.png", "experts.png"):
        assert np.array(Image.open(run / name)).std() > 10

    model = DiTTransformer2DModel.from_pretrained(run / "final" / "transformer")
    embedders = [block.norm1.emb.state_dict() for block in model.transformer_blocks]
    assert all(torch.equal(value, embedders[0][name]) for other in embedders for name, value in other.items())
    TemporalExperts.from_pretrained(run / "final").apply(model)

    teacher = Path("outputs/demo_dit/teacher")
    written = (teacher / "transformer/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    again = train(config).run_dir
    assert again != run
    assert (teacher / "transformer/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == written


def test_final_holds_the_average_when_there_is_one(small_config, tmp_path):
    run = train(small_config("dit", train={"ema_decay": 0.9})).run_dir
    final = load_file(run / "final/transformer/diffusion_pytorch_model.safetensors")
    saved = {name: load_file(run / f"checkpoints/step-000006/{name}.safetensors") for name in ("ema", "backbone")}
    name = "transformer_blocks.1.ff.net.2.weight"
    assert torch.equal(final[name], saved["ema"][name]) and not torch.equal(final[name], saved["backbone"][name])


def test_a_unet_run_ends_with_a_summary(small_config):
    finished = train(small_config("unet"))
    summary = json.loads((finished.run_dir / "summary.json").read_text())
    assert finished.summary == summary and finished.experts.keep_ratio == summary["keep_ratio"]
    assert summary["output_error"] > 0 and abs(summary["keep_ratio"] - 0.65) <= 0.005


def test_learned_sigma_denoises_the_first_half_and_distils_all(tmp_path, small_config):
    save_pipeline(tmp_path / "dit-pretrained", make_dit(learned_sigma=True))
    train(small_config("dit"))


@pytest.fixture
def image_config(small_config, tmp_path):
    """A DiT over a VAE's latents, and two class folders of images."""
    folder = save_pipeline(tmp_path / "dit-pretrained", make_dit(channels=4, learned_sigma=True))
    make_vae().save_pretrained(folder / "vae")
    rng = np.random.default_rng(0)
    for i in range(24):
        (tmp_path / f"images/{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{i % 2}/{i}.png")
    return lambda **changes: small_config("dit", **{**changes, "data": {
        "source": "image_folder", "path": str(tmp_path / "images"), "resolution": 16, "flip": True}})


def test_images_pass_the_vae(image_config):
    parts = build(image_config())
    images = torch.randn(3, 3, 16, 16)
    posterior = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        mean, logvar = parts.vae._encode(images).chunk(2, dim=1)
    expected = (mean + (0.5 * logvar).exp() * posterior) * 0.5
    assert torch.allclose(parts.latents({"images": images}, lambda shape: posterior), expected, atol=1e-6)


def test_a_run_on_images_exports_the_whole_pipeline(image_config):
    run = train(image_config(train={"mixed_precision": "bf16"})).run_dir
    assert json.loads((run / "summary.json").read_text())["output_error"] > 0
    assert AutoencoderKL.from_pretrained(run / "final/vae").config.scaling_factor == 0.5


def test_an_output_dir_with_another_run_is_never_overwritten(small_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("x")
    with pytest.raises(InputError, match="output_dir=.* is not empty"):
        train(small_config("dit"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]


@pytest.mark.parametrize("changes, message", [
    ({"budget": {"keep_ratio": 0.01}}, "budget.keep_ratio=0.01 is below"),
    ({"backbone": {"pretrained": "./nowhere"}}, "backbone.pretrained='./nowhere': no such folder"),
    ({"data": {"source": "latents", "path": "./nowhere"}}, "data.path='./nowhere': no such folder"),
    ({"resume": "latest"}, "resume=latest: no checkpoint"),
    ({"resume": "./nowhere"}, "resume='./nowhere': not a checkpoint"),
], ids=str)
def test_bad_input_writes_nothing(small_config, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(small_config("dit", **changes))
    assert not (tmp_path / "run").exists() and not (tmp_path / "outputs").exists()


def test_data_that_does_not_fit_the_backbone(small_config, tmp_path):
    save_latents(tmp_path / "wide", (4, 8, 8))
    with pytest.raises(InputError, match=r"latents of shape \(4, 8, 8\) do not fit .* takes \(1, 8, 8\)"):
        train(small_config("dit", data={"source": "latents", "path": "wide"}))
    save_latents(tmp_path / "labelled", (4, 16, 16))
    with pytest.raises(InputError, match="conditioned on text"):
        train(small_config("unet", data={"path": "labelled"}))
    save_latents(tmp_path / "narrow", (4, 16, 16), text=(7, 9))
    with pytest.raises(InputError, match="text states of width 9 do not fit the backbone's 12"):
        train(small_config("unet", data={"path": "narrow"}))


def test_a_backbone_that_lacks_weights(small_config):
    config = small_config("dit")
    file = Path(config.backbone.pretrained) / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["proj_out_2.bias"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(InputError, match="transformer lacks 1 weights, such as proj_out_2.bias"):
        build(config)


def test_a_folder_with_another_kind_of_model(small_config, tmp_path):
    folder = tmp_path / "other/unet"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(InputError, match="a UNet2DModel is no backbone that"):
        train(small_config("dit", backbone={"pretrained": str(tmp_path / "other")}))


@pytest.mark.parametrize("name, expected", [
    ("sd21", ["34 sites, 402.1 GMACs", "76.6%", "weights (fp32)", "teacher", "gradients", "optimizer"]),
    ("dit_xl2", ["28 sites, 118.7 GMACs", "EMA"]),
    ("demo_dit", ["10 sites", "keep 0.650 of the total MACs"]),
])
def test_dry_run(tmp_path, name, expected):
    result = script("--config", f"configs/{name}.yaml", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(text in result.stdout for text in expected), result.stdout
    assert not list(tmp_path.iterdir())


def test_dry_run_counts_what_is_trained_and_kept():
    """865.9M weights of Stable Diffusion 2.1 in fp32 are 3.23 GiB."""
    def text(*overrides):
        return describe_run(load_config("configs/sd21.yaml", overrides))

    assert "teacher (bf16)            1.61 GiB" in text("teacher.precision=bf16")
    adapted = text("lora.rank=16")
    assert "of 865.9M parameters trained" in adapted and "teacher" not in adapted
    frozen = text("teacher.offload=true", "backbone.freeze=[conv_in.*]")
    assert "teacher" not in frozen and "gradients (fp32)          3.23 GiB" in frozen


@pytest.mark.parametrize("arguments, field", [
    (["--config", "nowhere.yaml"], "--config nowhere.yaml"),
    (["--config", "configs/demo_dit.yaml", "train.stpes=1"], "train.steps"),
    (["--config", "configs/demo_dit.yaml", "budget.keep_ratio=0.001"], "budget.keep_ratio=0.001"),
    (["--config", "configs/dit_xl2.yaml"], "data.path="),
    (["--config", "configs/demo_dit.yaml", "demo.model=null"], "backbone.pretrained='outputs/demo_dit/teacher'"),
    (["--config", "configs/demo_dit.yaml", "train.search_steps=9999"], "train.search_steps=9999"),
    (["--config", "configs/demo_dit.yaml", "output_dir=/"], "output_dir='/'"),
    (["--config", "configs/sd21.yaml", "backbone.pretrained=stabilityai/stable-diffusion-2-1"], "sd2-community"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, field):
    result = script(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and field in line
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line_through_the_launcher_too(tmp_path):
    result = launcher("--config", "configs/demo_dit.yaml", "budget.keep_ratio=0.001", cwd=tmp_path)
    assert result.returncode == 2 and not list(tmp_path.iterdir())
    said, line = result.stderr.strip().splitlines()
    assert said.startswith("loading") and line.startswith("error: budget.keep_ratio=0.001")


@pytest.mark.parametrize("case, code, message", [
    ("shape", 2, "do not fit the backbone"), ("no sites", 2, "a UNet2DModel is no backbone that"),
    ("overflow", 1, "at step 1: stopped; "),
])
def test_errors_of_models_and_data(small_config, tmp_path, case, code, message):
    save_latents(tmp_path / "latents", (1, 4, 4) if case == "shape" else (1, 8, 8))
    changes = {"data": {"source": "latents", "path": "latents"}}
    if case == "overflow":
        for file in (tmp_path / "latents/train_features").iterdir():
            np.save(file, np.full((1, 1, 8, 8), 1e30, dtype=np.float32))
    if case == "no sites":
        (tmp_path / "other/unet").mkdir(parents=True)
        (tmp_path / "other/unet/config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
        changes["backbone"] = {"pretrained": "other"}
    save_config(small_config("dit", **changes), tmp_path / "bad.yaml")
    result = script("--config", "bad.yaml", cwd=tmp_path)
    assert result.returncode == code
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last and "Traceback" not in result.stderr
    assert not (tmp_path / "run/final").exists()


def test_check_refuses_a_batch_that_the_processes_cannot_share(tmp_path):
    result = script("--config", "configs/demo_dit.yaml", "--check", cwd=tmp_path, ALTER_PROCESSES="3")
    assert result.returncode == 2 and "cannot be shared by 3 processes" in result.stderr
    assert script("--config", "configs/demo_dit.yaml", "--check", cwd=tmp_path).stderr == ""


def test_a_broken_file_is_one_line_also_from_a_loader_process(small_config, tmp_path):
    save_pipeline(tmp_path / "rgb", make_dit(size=16, channels=4))
    save_latents(tmp_path / "latents", (4, 16, 16))
    for i in range(1, 24):
        (tmp_path / f"latents/train_features/{i}.npy").write_bytes(b"junk")
    seed = next(seed for seed in range(100) if 0 in split(range(24), 2, seed)[1])  # the one good sample is held out
    result = script("--config", "configs/demo_dit.yaml", "demo.model=null", "backbone.pretrained=rgb", f"seed={seed}",
                    "data.source=latents", "data.path=latents", "data.resolution=16", "data.workers=1",
                    "data.holdout=2", "train.batch_size=4", "log.tracker=none", cwd=tmp_path)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: data.path: none of ") and "cannot be read" in last
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "SIGINT", "SIGUSR1"))])
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_from_it(small_config, tmp_path, name):
    """Sent to the whole process group, as `timeout`, terminals and schedulers do."""
    save_config(small_config("dit", train={"steps": 100_000}, data={"workers": 1}), tmp_path / "long.yaml")
    process = subprocess.Popen([sys.executable, str(ROOT / "scripts/train.py"), "--config", "long.yaml"],
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.time() + HANGING
    while not (tmp_path / "run/metrics.jsonl").exists() and time.time() < deadline:
        time.sleep(0.1)
    number = getattr(signal, name)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=HANGING)
    assert process.returncode == 128 + number
    assert errors.strip().splitlines()[-1].startswith(f"error: stopped by {name}; go on with resume=")
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    step = int(saved.name.rpartition("-")[2])
    train(small_config("dit", train={"steps": step + 3}, resume="latest"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 4))


def test_help_documents_the_keys(tmp_path):
    result = script("--help", cwd=tmp_path)
    assert result.returncode == 0 and "budget.keep_ratio=0.65" in result.stdout


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(InputError, match="train.steps=0"):
        script("--config", "configs/demo_dit.yaml", "--debug", "train.steps=0", cwd=tmp_path)


def test_the_names_of_the_classes_are_written_beside_the_run(small_config, tmp_path):
    for name in ("9", "2"):
        save_noise(tmp_path / "images" / name, count=12, size=16, seed=int(name))
    save_pipeline(tmp_path / "dit-pretrained", make_dit(channels=4))
    make_vae().save_pretrained(tmp_path / "dit-pretrained/vae")
    config = small_config(data={"source": "image_folder", "path": str(tmp_path / "images"), "resolution": 16},
                          train={"steps": 1, "search_steps": 1})
    assert json.loads((train(config).run_dir / "classes.json").read_text()) == {"2": 2, "9": 9}
