"""Weights that adapters leave frozen, in bfloat16, in 8 bits or in 4: smaller, and nearly the same model."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from helpers import make_trainer, prepared
from safetensors.torch import load_file

from alter import InputError, load_config, train
from alter.training.setup.describe import describe_run
from alter.training.setup.plan import check

pytest.importorskip("peft")
LORA = {"lora": {"rank": 2}, "checkpoint": {"every": 3}}
FILE = "final/pytorch_lora_weights.safetensors"


def needs(package):
    """Without importing it, which takes seconds."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


def held(backbone):
    """Bytes of the frozen weights."""
    inner = [getattr(value, "qdata", value) for value in backbone.parameters() if not value.requires_grad]
    return sum(value.numel() * value.element_size() for value in inner)


STORED = [
    pytest.param({"precision": "bf16"}, 0.55, id="bf16"),
    pytest.param({"quantize": "int8"}, 0.8, id="int8", marks=needs("torchao")),
    pytest.param({"quantize": "int8", "precision": "bf16"}, 0.5, id="int8 in bf16", marks=needs("torchao")),
    pytest.param({"quantize": "nf4", "precision": "bf16"}, 0.5, id="nf4",
                 marks=[needs("bitsandbytes"), pytest.mark.gpu]),
]


@pytest.mark.parametrize("kind", ["sd", "dit"])
@pytest.mark.parametrize("stored, share", STORED)
def test_they_are_smaller_and_the_adapters_are_trained_in_full(small_config, tmp_path, kind, stored, share):
    exact = make_trainer(small_config(kind, **LORA), tmp_path)
    trainer = make_trainer(small_config(kind, backbone=stored, **LORA), tmp_path)
    assert held(trainer.parts.backbone) < share * held(exact.parts.backbone)
    assert {value.dtype for value in trainer.parameters} == {torch.float32}
    (expected,), (batch,) = prepared(exact), prepared(trainer)
    gap = (expected.teacher_pred - batch.teacher_pred.float()).abs().mean() / expected.teacher_pred.abs().mean()
    assert 0 < gap < (0.2 if stored.get("quantize") == "nf4" else 0.1)  # four bits: normal weights are off by 9%


@pytest.mark.slow
@pytest.mark.parametrize("stored, share", STORED)
def test_a_run_resumes_exactly_and_its_adapters_serve_the_exact_model(small_config, stored, share):
    config = small_config("sd", backbone=stored, **LORA)
    run = train(config).run_dir
    assert json.loads((run / "summary.json").read_text())["output_error"] > 0
    adapters = (run / FILE).read_bytes()
    assert {value.dtype for value in load_file(run / FILE).values()} == {torch.float32}
    train(small_config("sd", output_dir=None, backbone=stored, resume=str(run / "checkpoints/step-000003"), **LORA))
    assert (run / FILE).read_bytes() == adapters


@pytest.mark.parametrize("stored, share", STORED[:2])
def test_merging_is_into_the_exact_weights(small_config, stored, share):
    config = small_config("sd", backbone=stored, lora={"rank": 2, "merge": True})
    run = train(config).run_dir
    file = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(f"{config.backbone.pretrained}/{file}"), load_file(run / "final" / file)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and all(".attn" in name for name in moved)
    state = load_file(run / FILE)
    name = moved[0].removesuffix(".weight")
    update = state[f"unet.{name}.lora_B.weight"] @ state[f"unet.{name}.lora_A.weight"]
    assert np.allclose(after[moved[0]] - before[moved[0]], update, atol=1e-6)


@pytest.mark.parametrize("changes, line", [
    ({"backbone": {"quantize": "int8"}}, "only weights that stay frozen can be stored so: set lora.rank"),
    ({"backbone": {"precision": "bf16"}}, "only weights that stay frozen can be stored so: set lora.rank"),
    ({"backbone": {"quantize": "int4"}, **LORA}, "backbone.quantize='int4': choose one of int8, nf4"),
])
def test_a_configuration_that_cannot_be(small_config, changes, line):
    with pytest.raises(InputError, match=line):
        small_config("dit", **changes)


@pytest.mark.parametrize("kind, line", [
    ("int8", "backbone.quantize=int8: the package torchao is not installed: pip install torchao"),
    ("nf4", "backbone.quantize=nf4: the package bitsandbytes is not installed"),
    ("nf4", "backbone.quantize='nf4' needs a GPU: use int8 on a CPU"),
])
def test_what_a_machine_lacks_is_said_before_anything_is_loaded(small_config, monkeypatch, kind, line):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(InputError, match=line):
        check(small_config("dit", backbone={"quantize": kind}, **LORA), 1)


def test_the_dry_run_counts_them():
    """865.9M weights: 3.23 GiB in fp32."""
    def text(*overrides):
        return describe_run(load_config("configs/sd21.yaml", ["lora.rank=16", *overrides]))

    changes = {"fp32": [], "bf16": ["backbone.precision=bf16"]}
    changes |= {kind: [*changes["bf16"], f"backbone.quantize={kind}"] for kind in ("int8", "nf4")}
    full, half, int8, nf4 = [float(text(*more).partition(f"weights ({kind})")[2].split()[0])
                             for kind, more in changes.items()]
    assert (full, half) == (3.23, 1.61) and 0.8 < int8 < half and 0.4 < nf4 < int8
