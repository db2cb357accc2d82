"""facebookresearch/DiT's checkpoints to diffusers and back, against the paper's forward written out here."""

import argparse
import json
import math
import os

import pytest
import torch
from conftest import make_vae
from diffusers import DiTPipeline, DiTTransformer2DModel
from helpers import run_script
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from alter.backbones.pretrained import load_backbone
from alter.common.load import CONFIGS

HEADS, LAYERS, CLASSES = 2, 3, 5


def positions(side, width):
    """float32 [1, side², width]: the column's sines and cosines, then the row's."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    waves = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([waves.sin(), waves.cos()], dim=1)
    rows, columns = line.repeat_interleave(side, dim=0), line.repeat(side, 1)
    return torch.cat([columns, rows], dim=1).float()[None]


def make_state(width=16, patch=2, channels=3, outputs=6, layers=LAYERS, side=4, classes=CLASSES):
    """An original state dict in which no weight is zero."""
    modules = {"x_embedder.proj": (width, channels, patch, patch), "t_embedder.mlp.0": (width, 256),
               "t_embedder.mlp.2": (width, width), "final_layer.linear": (patch * patch * outputs, width),
               "final_layer.adaLN_modulation.1": (2 * width, width)}
    for i in range(layers):
        modules |= {f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width),
                    f"blocks.{i}.mlp.fc1": (4 * width, width), f"blocks.{i}.mlp.fc2": (width, 4 * width),
                    f"blocks.{i}.adaLN_modulation.1": (6 * width, width)}
    shapes = {"y_embedder.embedding_table.weight": (classes + 1, width)}
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    source = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=source) * 0.3 for name, shape in shapes.items()}
    return state | {"pos_embed": positions(side, width)}


def forward(state, images, timesteps, labels):
    """The DiT of Peebles & Xie (2023) with adaLN-Zero blocks, float64 but for the sinusoid, which it has in float32."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def linear(name, values):
        return values @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]

    def adapted(values, shift, scale):
        centred = values - values.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    patch, (batch, _, side, _) = state["x_embedder.proj.weight"].shape[-1], images.shape
    patches = images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    tokens = linear("x_embedder.proj", patches) + state["pos_embed"]
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    time = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1).double())
    condition = linear("t_embedder.mlp.2", silu(time)) + state["y_embedder.embedding_table.weight"][labels]
    condition = silu(condition)[:, None]
    for i in range(LAYERS):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", condition).chunk(6, -1)
        qkv = linear(f"{name}.attn.qkv", adapted(tokens, shift1, scale1))
        q, k, v = qkv.reshape(batch, -1, 3, HEADS, tokens.shape[-1] // HEADS).permute(2, 0, 3, 1, 4)
        attended = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        tokens = tokens + gate1 * linear(f"{name}.attn.proj", attended.transpose(1, 2).flatten(2))
        hidden = linear(f"{name}.mlp.fc1", adapted(tokens, shift2, scale2))
        hidden = hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        tokens = tokens + gate2 * linear(f"{name}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", condition).chunk(2, -1)
    pixels = linear("final_layer.linear", adapted(tokens, shift, scale))
    pixels = pixels.reshape(batch, side // patch, side // patch, patch, patch, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, side, side)


def run(*arguments):
    """Calls the script; returns its exit code and what it wrote as an error."""
    done = run_script("convert_dit", *arguments)
    return done.returncode, done.stderr


@pytest.fixture
def refuse(tmp_path):
    """Runs what must be refused: one line of error, and every file as before."""
    def call(*arguments):
        before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
        code, error = run(*arguments)
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
        return error

    return call


def save(content, file):
    torch.save(content, file)
    return file


@pytest.fixture
def folder(tmp_path):
    """A converted checkpoint."""
    file = save(make_state(), tmp_path / "dit.pt")
    assert run("to-diffusers", file, "--heads", HEADS, "--out", tmp_path / "dit")[0] == 0
    return tmp_path / "dit"


@pytest.mark.parametrize("sizes", [{}, {"patch": 4, "outputs": 3, "side": 3}], ids=["sigma", "no sigma"])
def test_outputs(tmp_path, sizes):
    state = make_state(**sizes)
    file = save(state, tmp_path / "dit.pt")
    assert run("to-diffusers", file, "--heads", HEADS, "--out", tmp_path / "dit")[0] == 0
    model = load_backbone(tmp_path / "dit").double().eval()
    timesteps, labels = torch.tensor([0, 1, 250, 999]), torch.tensor([0, 3, CLASSES, 4])
    images = torch.randn(4, 3, model.config.sample_size, model.config.sample_size, dtype=torch.float64,
                         generator=torch.Generator().manual_seed(1))
    wanted = forward(state, images, timesteps, labels)
    with torch.no_grad():
        as_it_is = model(images, timesteps, labels).sample
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        exact = model(images, timesteps, labels).sample
    assert (exact - wanted).norm() <= 1e-9 * wanted.norm()
    difference = (as_it_is - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert difference[0] <= 1e-9  # all sinusoids are alike at 0
    assert (difference[1:] > 1e-3).all()


def test_round_trip(tmp_path, folder):
    assert run("to-facebook", folder, "--out", tmp_path / "back.pt")[0] == 0
    state, back = make_state(), torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in state.items())


def test_training_checkpoint(tmp_path, folder):
    other = {name: tensor + 1 for name, tensor in make_state().items()}
    averaged, positions_now = make_state(), make_state()["pos_embed"]
    for _ in range(2000):  # as the original's training does, to what never changes too: rounding adds up
        averaged["pos_embed"].mul_(0.9999).add_(positions_now, alpha=1 - 0.9999)
    assert not torch.allclose(averaged["pos_embed"], positions_now, rtol=0, atol=1e-5)
    content = {"model": other, "ema": averaged, "opt": {"state": {0: {"step": torch.tensor(3.0)}}},
               "args": argparse.Namespace(model="DiT-XL/2", image_size=256), "train_steps": 3}
    file = save(content, tmp_path / "0000003.pt")
    assert run("to-diffusers", file, "--heads", HEADS, "--out", tmp_path / "ema")[0] == 0
    weights, expected = (load_file(next(path.glob("transformer/*.safetensors"))) for path in (tmp_path / "ema", folder))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


class Code:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_does_not_run(refuse, tmp_path):
    for name, content in [("args", {"ema": make_state(), "args": Code(tmp_path / "ran")}),
                          ("weights", Code(tmp_path / "ran")),
                          ("nested", {"ema": make_state(), "args": argparse.Namespace(a=Code(tmp_path / "ran"))})]:
        file = save(content, tmp_path / f"{name}.pt")
        assert f"{file}: cannot be read as tensors only (it holds posix.mkdir)" in refuse(
            "to-diffusers", file, "--heads", HEADS, "--out", tmp_path / "dit")
    with pytest.raises(FileExistsError):  # what was refused does run where it is let
        for _ in range(2):
            torch.load(file, weights_only=False)


def cut(state, name):
    state[name] = state[name][:-1]


@pytest.mark.parametrize(("change", "problem"), [
    (lambda state: state.pop("blocks.1.attn.proj.bias"), "missing: blocks.1.attn.proj.bias: give"),
    (lambda state: [state.pop(name) for name in list(state) if "blocks.1" in name], "missing: blocks.1.adaLN"),
    (lambda state: [state.pop(name) for name in list(state) if "blocks" in name], "missing: blocks.0.adaLN"),
    (lambda state: state.pop("x_embedder.proj.weight"), "x_embedder.proj.weight: missing"),
    (lambda state: state.update({"blocks.0.gate": torch.ones(1)}), "unknown: blocks.0.gate: give"),
    (lambda state: cut(state, "blocks.2.mlp.fc1.weight"), "fc1.weight (63, 16) instead of (64, 16)"),
    (lambda state: cut(state, "final_layer.linear.bias"), "final_layer.linear.bias (23,) instead of (24,)"),
    (lambda state: state.update(pos_embed=state["pos_embed"][:, :15]), "pos_embed (1, 15, 16) instead of (1, 9, 16)"),
    (lambda state: state.update(pos_embed=state["pos_embed"].unflatten(1, (4, 4)).mT.flatten(1, 2)), "pos_embed"),
    (lambda state: state.update(pos_embed=state["pos_embed"] + 1e-2), "pos_embed: differs by 1.0e-02"),
    (lambda state: state.update(pos_embed=state["pos_embed"] * math.nan), "pos_embed: differs by nan"),
    (lambda state: state.update({"t_embedder.mlp.0.bias": torch.ones(16, dtype=torch.int64)}), "no state dict"),
])
def test_bad_checkpoints(refuse, tmp_path, change, problem):
    state = make_state()
    change(state)
    file = save(state, tmp_path / "dit.pt")
    error = refuse("to-diffusers", file, "--heads", HEADS, "--out", tmp_path / "dit")
    assert str(file) in error and problem in error


def test_bad_arguments(refuse, tmp_path, folder):
    out, file = tmp_path / "new", tmp_path / "dit.pt"
    make_vae(latent_channels=4).save_pretrained(tmp_path / "vae")
    (tmp_path / "text.pt").write_text("no weights")
    three = save(make_state(outputs=9), tmp_path / "three.pt")
    for arguments, problem in [
        ((file, "--out", out), "unknown heads for a width of 16: give --heads"),
        ((file, "--out", out, "--heads", 3), "3 heads for a width of 16: give --heads"),
        ((file, "--out", folder, "--heads", HEADS), f"--out {folder}: exists"),
        ((file, "--out", out, "--heads", HEADS, "--vae", tmp_path), f"--vae {tmp_path}: no config.json"),
        ((file, "--out", out, "--heads", HEADS, "--vae", tmp_path / "vae"), "latents of 4 channels, but the model"),
        ((three, "--out", out, "--heads", HEADS), "9 output channels for 3"),
        ((tmp_path / "none.pt", "--out", out), "none.pt: no such file"),
        ((tmp_path / "text.pt", "--out", out), "text.pt: cannot be read as tensors only"),
    ]:
        assert problem in refuse("to-diffusers", *arguments)


def test_bad_folders(refuse, tmp_path, folder):
    out, weights = tmp_path / "back.pt", next(folder.glob("transformer/*.safetensors"))
    assert f"--out {weights}: exists" in refuse("to-facebook", folder, "--out", weights)
    assert "no transformer/config.json" in refuse("to-facebook", tmp_path, "--out", out)
    good, copy = load_file(weights), "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    for changed, problem in [
        ({**good, copy: good[copy] + 1}, f"{copy}: differs from {copy.replace('2', '0', 1)}"),
        ({**good, "extra": torch.ones(1)}, "transformer: extra: in only one"),
        ({name: tensor for name, tensor in good.items() if name != "proj_out_2.bias"}, "proj_out_2.bias"),
        ({**good, "proj_out_2.bias": torch.ones(3)}, "proj_out_2.bias"),
    ]:
        save_file(changed, weights, {"format": "pt"})
        assert problem in refuse("to-facebook", folder, "--out", out)
    save_file(good, weights, {"format": "pt"})
    config = folder / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"activation_fn": "gelu"}))
    assert "activation_fn='gelu'" in refuse("to-facebook", folder, "--out", out)
    (folder / "experts.json").write_text("{}")
    assert "has experts.json" in refuse("to-facebook", folder, "--out", out)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "num_embeds_ada_norm": 5}
    DiTTransformer2DModel(**sizes, num_layers=1, attention_bias=False).save_pretrained(tmp_path / "other/transformer")
    assert "attn1.to_k.bias" in refuse("to-facebook", tmp_path / "other", "--out", out)


def test_pipeline(tmp_path):
    """Heads by width, the published scheduler, and a pipeline that draws."""
    file = save(make_state(width=384, channels=4, outputs=8, layers=1, classes=1000), tmp_path / "dit.pt")
    out, vae = tmp_path / "dit", make_vae()
    vae.save_pretrained(tmp_path / "vae")
    out.mkdir()
    assert run("to-diffusers", file, "--vae", tmp_path / "vae", "--out", out)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"dit.pt", "dit", "vae"}
    pipeline = DiTPipeline.from_pretrained(out)
    assert pipeline.transformer.config.num_attention_heads == 6
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in pipeline.vae.state_dict().items())
    published = json.loads((CONFIGS / "models/facebook/DiT-XL-2-256/scheduler/scheduler_config.json").read_text())
    assert published.items() <= json.loads((out / "scheduler/scheduler_config.json").read_text()).items()
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([2], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
