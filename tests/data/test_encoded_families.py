"""Training of pipelines of many families from what `alter encode` wrote, against training from images and captions."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import PartialState
from conftest import config_factory
from helpers import HANGING, ROOT, free_port, metrics_of_updates, prepared
from PIL import Image
from pipelines import PIPELINES, make_pipeline
from safetensors.torch import load_file, save_file

import alter.backbones.pretrained
import alter.training.setup.parts as parts_module
from alter import InputError
from alter.backbones.conditioning import Conditioner
from alter.common.load import save_config
from alter.data.encode import encode
from alter.data.encoded import COMMON, shard_name
from alter.data.open import open_source
from alter.training.run import make_accelerator
from alter.training.setup.parts import build
from alter.training.setup.plan import check
from alter.training.trainer import Trainer

FAMILIES = ["flux", "qwen", "z_image", "sdxl"]
OTHERS = sorted({*PIPELINES} - {*FAMILIES, "wan22"})


def family_config(folder, name, **changes):
    """Captioned shapes for a tiny pipeline of that name, of which half of the prompts are dropped."""
    pretrained = folder / name
    if not pretrained.exists():
        make_pipeline(name, pretrained)
    data = {"label_dropout": 0.5, **changes.pop("data", {})}
    return config_factory(folder)("sd", backbone={"pretrained": str(pretrained)}, data=data, **changes)


def run_encode(config, out):
    return encode(config, out, 10, 4, PartialState())


def of_encoded(config, folder):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source="latents", path=str(folder)))


def prepare(config, folder):
    trainer = Trainer(config, build(config), make_accelerator(config), folder)
    batches = prepared(trainer)
    return trainer, batches, metrics_of_updates(trainer, batches)


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_training_from_encoded_data_equals_training_from_images(tmp_path, name, monkeypatch):
    config = family_config(tmp_path, name)
    if name == "sdxl":
        for file in (tmp_path / "shapes").glob("*.png"):
            Image.open(file).resize((96, 64)).save(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alter.backbones.pretrained, "load_backbone", None)
        index = run_encode(config, tmp_path / "encoded")
    assert index["count"] == 24 and not index["unreadable"] and not index["bfloat16"]
    _, (expected,), losses = prepare(config, tmp_path)
    monkeypatch.setattr(parts_module, "Conditioner", None)
    trainer, (batch,), encoded_losses = prepare(of_encoded(config, tmp_path / "encoded"), tmp_path)
    assert trainer.parts.vae is None
    torch.testing.assert_close(batch.noisy_latents, expected.noisy_latents, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(batch.conditioning, expected.conditioning, atol=2e-3, rtol=2e-3, check_dtype=False)
    if name == "sdxl":
        assert batch.conditioning["added_cond_kwargs"]["time_ids"].tolist() == [[64, 96, 0, 8, 32, 32]] * 8
    for key, value in losses.items():
        assert encoded_losses[key] == pytest.approx(value, rel=3e-3, abs=1e-5), key


@pytest.mark.slow
def test_two_processes_complete_what_is_missing(tmp_path):
    config = family_config(tmp_path, "qwen")
    index = run_encode(config, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for missing in ("index.json", shard_name(0), shard_name(2)):
        (tmp_path / "two" / missing).unlink()
    (tmp_path / "two/encoding.json").write_text(json.dumps(
        {name: value for name, value in index.items() if name not in ("classes", "bfloat16", "unreadable")}))
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, str(ROOT / "scripts/encode_latents.py"), "--config", str(tmp_path / "config.yaml"),
               "--out", str(tmp_path / "two"), "--shard-size", "10", "--batch", "4"]
    port = free_port()
    workers = [subprocess.Popen(command, env={
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}) for rank in range(2)]
    assert [worker.wait(timeout=HANGING) for worker in workers] == [0, 0]
    for name in [*map(shard_name, range(3)), "index.json"]:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    lengths = load_file(tmp_path / "one" / shard_name(0))["ends.encoder_hidden_states"].diff()
    assert len(lengths.unique()) > 1


def test_version_1_is_still_read(tmp_path):
    config = family_config(tmp_path, "sd")
    index = run_encode(config, tmp_path / "encoded")
    second = open_source(of_encoded(config, tmp_path / "encoded"))
    shutil.copytree(tmp_path / "encoded", tmp_path / "first")
    for number in range(3):
        file = tmp_path / "first" / shard_name(number)
        stored = load_file(file)
        save_file({"moments": (stored["moments"].float() / 0.18).half(), "text_ends": stored["captions"],
                   "text": stored["rows.encoder_hidden_states"]}, file, {"unreadable": "{}"})
    common = tmp_path / "first" / COMMON
    dropped = torch.load(common, weights_only=True)["dropped"]["encoder_hidden_states"]
    common.unlink()
    save_file({"text": dropped[0].half()}, tmp_path / "first/empty_text.safetensors")
    old = {name: index[name] for name in ("model", "vae", "resolution", "mirrored", "num_classes", "count",
                                          "shard_size", "unreadable", "classes")}
    (tmp_path / "first/index.json").write_text(json.dumps({
        **old, "alter_latents": 1, "scaling_factor": 0.18, "shift_factor": 0.0,
        "text_encoder": index["text_encoders"]["text_encoder"]}))
    first = open_source(of_encoded(config, tmp_path / "first"))
    for key in ((0, 3), (1, 20)):
        assert torch.allclose(first[key]["moments"], second[key]["moments"], atol=2e-3, rtol=2e-3)
        assert torch.equal(first[key]["encoder_hidden_states"],
                           second[key]["conditioning"]["encoder_hidden_states"][0])
    given = {"encoder_hidden_states": first[0, 3]["encoder_hidden_states"][None]}
    conditioning = build(of_encoded(config, tmp_path / "first")).conditioning(given, torch.tensor([True]))
    assert torch.allclose(conditioning["encoder_hidden_states"], dropped, atol=1e-3)


def test_what_float16_cannot_hold_is_stored_as_bfloat16(tmp_path):
    config = family_config(tmp_path, "sd")
    pipe = make_pipeline("sd")
    for name, value in pipe.text_encoder.named_parameters():
        if name.endswith("final_layer_norm.weight"):
            value.mul_(1e6)
    pipe.save_pretrained(tmp_path / "sd")
    assert run_encode(config, tmp_path / "encoded")["bfloat16"] == ["rows.encoder_hidden_states"]
    source = open_source(of_encoded(config, tmp_path / "encoded"))
    text = source[0, 5]["conditioning"]["encoder_hidden_states"]
    assert text.abs().max() > 70_000
    expected = Conditioner(tmp_path / "sd", "cpu", torch.float32, (32, 32))([open_source(config)[0, 5]["captions"]])
    torch.testing.assert_close(text, expected.rows["encoder_hidden_states"], rtol=1e-2, atol=1)


def test_conditioning_made_otherwise_is_refused(tmp_path):
    config = family_config(tmp_path, "flux", data={"max_tokens": 64}, evaluate={"guidance_scale": 3.5})
    run_encode(config, tmp_path / "encoded")
    encoded = of_encoded(config, tmp_path / "encoded")
    check(encoded, 1)
    changed = dataclasses.replace(encoded, evaluate=dataclasses.replace(config.evaluate, guidance_scale=2.0))
    with pytest.raises(InputError, match="evaluate.guidance_scale=2.0: .* was encoded with 3.5"):
        check(changed, 1)
    changed = dataclasses.replace(encoded, data=dataclasses.replace(encoded.data, max_tokens=None))
    with pytest.raises(InputError, match="data.max_tokens=None: .* was encoded with 64"):
        check(changed, 1)
    index = tmp_path / "flux/model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "FluxFillPipeline"))
    with pytest.raises(InputError, match="with pipeline FluxPipeline, but .* has FluxFillPipeline"):
        check(encoded, 1)
    file = tmp_path / "flux/text_encoder_2/model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match="with text encoder 2 [0-9a-f]{64}"):
        check(encoded, 1)
