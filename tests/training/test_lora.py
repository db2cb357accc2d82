"""Low-rank adapters: a teacher that is the backbone without them, and a final/ that holds them alone."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config_factory
from helpers import draw, load_quietly, make_trainer, metrics_of_updates, prepared, run_script
from safetensors.torch import load_file

from alter import InputError, TemporalExperts, load_pipeline, train
from alter.experts.load import load_dense
from alter.training.setup.parts import build

pytest.importorskip("peft")


def trained(trainer, steps=3):
    """What each of its first iterations prints."""
    batches, lines = trainer.micro_batches(), []
    for _ in range(steps):
        lines.append(metrics_of_updates(trainer, trainer._prepare(batches)))
        trainer.step += 1
    return lines


@pytest.mark.parametrize("kind, changes", [
    ("sd", {}), ("dit", {"backbone": {"gradient_checkpointing": True}}),
    pytest.param("sd", {"train": {"mixed_precision": "bf16"}}, marks=pytest.mark.slow),
], ids=["sd", "checkpointing", "bf16"])
def test_the_backbone_without_its_adapters_teaches_as_a_copy_does(small_config, tmp_path, kind, changes):
    """The copy is loaded again from the weights that the backbone began with."""
    config = small_config(kind, lora={"rank": 2}, **changes)
    own = make_trainer(config, tmp_path)
    copied = make_trainer(small_config(kind, lora={"rank": 2}, teacher={"pretrained": config.backbone.pretrained},
                                       **changes), tmp_path)
    copied.parts.backbone.load_state_dict(own.parts.backbone.state_dict())  # adapters begin at random
    assert own.parts.teacher is own.parts.backbone and copied.parts.teacher is not copied.parts.backbone
    for one, other in zip(trained(own), trained(copied), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-7)
    assert own.parts.backbone.training and all(p.requires_grad for p in own.parameters)
    (batch,), (again,) = prepared(own), prepared(copied)
    assert torch.allclose(batch.teacher_pred.float(), again.teacher_pred.float(), atol=1e-6)
    assert len(batch.teacher_features) == len(again.teacher_features) > 0
    for feature, expected in zip(batch.teacher_features, again.teacher_features, strict=True):
        assert torch.allclose(feature.float(), expected.float(), atol=1e-5)


def test_it_takes_no_memory(small_config, tmp_path):
    parts = make_trainer(small_config("sd", lora={"rank": 2}), tmp_path).parts
    held = {id(p): p.numel() for part in (parts.backbone, parts.teacher) for p in part.parameters()}
    plain = make_trainer(small_config("sd"), tmp_path).parts.backbone
    adapters = sum(p.numel() for p in parts.backbone.parameters() if p.requires_grad)
    assert sum(held.values()) == sum(p.numel() for p in plain.parameters()) + adapters


def test_a_whole_run_without_a_second_copy(small_config, tmp_path):
    """Held-out errors, the first validation images and the rows of the last table are the dense model's."""
    changes = {"lora": {"rank": 2}, "validate": {"every": 6, "labels": [3]}, "evaluate": {"dense": True}}
    config = small_config("dit", **changes)
    own = train(config).run_dir
    copied = train(small_config("dit", teacher={"pretrained": config.backbone.pretrained},
                                output_dir=str(tmp_path / "copied"), **changes)).run_dir
    one, other = [json.loads((run / "summary.json").read_text()) for run in (own, copied)]
    assert one.pop("seconds_total") and other.pop("seconds_total") and one["fd_dense"] > 0
    for name, value in other.items():
        assert one[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-6)), name
    first = [(run / "samples/step-000000-dense.png").read_bytes() for run in (own, copied)]
    assert first[0] == first[1]


@pytest.mark.parametrize("teacher", [{"precision": "bf16"}, {"offload": True}], ids=str)
def test_a_setting_of_the_copy_is_refused_where_there_is_none(small_config, teacher):
    with pytest.raises(InputError, match="with lora.rank the teacher is the backbone itself"):
        small_config("dit", lora={"rank": 2}, teacher=teacher)


FILE = "pytorch_lora_weights.safetensors"
LORA = {"lora": {"rank": 2, "alpha": 3}, "checkpoint": {"every": 4}, "train": {"ema_decay": 0.5}}
WITHOUT_TEACHER = {"loss": {"denoise": 1.0, "output_kd": 0.0, "feature_kd": 0.0}}


@pytest.fixture(scope="module")
def factory(tmp_path_factory):
    return config_factory(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def adapted(factory):
    """A finished run of the tiny Stable Diffusion, with adapters alone in final/."""
    return train(factory("sd", **LORA)).run_dir


@pytest.fixture(scope="module")
def base(factory):
    return Path(factory("sd").backbone.pretrained)


def loaded(folder, **options):
    pipe = load_pipeline(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_final_holds_the_adapters_for_the_pipelines_own_loader(adapted, base):
    assert {file.name for file in (adapted / "final").iterdir()} == {FILE, "base.json", "experts.json", "README.md"}
    assert json.loads((adapted / "final/base.json").read_text()) == {
        "pretrained": str(base), "revision": None, "component": "unet", "arguments": {}}
    saved = load_file(adapted / "checkpoints/step-000006/ema.safetensors")
    assert saved and all(".lora_" in name for name in saved)
    pipe = load_quietly(base)
    dense = draw(pipe)
    pipe.load_lora_weights(adapted / "final")
    assert np.abs(draw(pipe) - dense).max() > 1e-4
    own = pipe.unet.state_dict()
    for name, value in saved.items():
        scale = 1.5 if ".lora_B." in name else 1.0  # alpha / rank
        assert torch.allclose(own[name.replace(".default.", ".default_0.")], scale * value), name
    assert np.array_equal(draw(pipe), draw(load_dense(adapted / "final")))
    TemporalExperts.from_pretrained(adapted / "final").apply(pipe)
    assert np.array_equal(draw(pipe), draw(loaded(adapted / "final")))


def test_merged_weights_draw_the_same(adapted, factory, tmp_path, base):
    changes = {**LORA, "lora": {**LORA["lora"], "merge": True}}
    run = train(factory("sd", output_dir=str(tmp_path / "merged"), **changes)).run_dir
    assert (run / "final" / FILE).read_bytes() == (adapted / "final" / FILE).read_bytes()
    before, after = [load_file(folder / "unet/diffusion_pytorch_model.safetensors") for folder in (base, run / "final")]
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved and before.keys() == after.keys()
    assert all(name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")) for name in moved)
    assert np.allclose(draw(loaded(run / "final")), draw(loaded(adapted / "final")), atol=1e-4)
    assert f"`{FILE}` holds only the adapters" in (run / "final/README.md").read_text()


def test_resuming_gives_the_same_adapters(adapted, factory):
    adapters = (adapted / "final" / FILE).read_bytes()
    train(factory("sd", output_dir=None, resume=str(adapted / "checkpoints/step-000004"), **LORA))
    assert (adapted / "final" / FILE).read_bytes() == adapters


def test_a_base_that_has_moved(adapted, base, tmp_path):
    final = shutil.copytree(adapted / "final", tmp_path / "final")
    record = json.loads((final / "base.json").read_text())
    (final / "base.json").write_text(json.dumps({**record, "pretrained": "/nowhere/sd"}))
    with pytest.raises(InputError, match=r"/nowhere/sd is not there: give load_pipeline\(..., base=FOLDER"):
        load_pipeline(final)
    assert np.array_equal(draw(loaded(final, base=base)), draw(loaded(adapted / "final")))
    with pytest.raises(InputError, match="base='somewhere': .* is a whole pipeline"):
        load_dense(base, base="somewhere")
    (final / "base.json").write_text("[]")
    with pytest.raises(InputError, match=r"base.json cannot be read"):
        load_pipeline(final)


def test_a_hub_id(adapted, base, tmp_path):
    model, commit = tmp_path / "models--me--mine", "0" * 40
    shutil.copytree(adapted / "final", model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs/first").write_text(commit)
    pipe = loaded("me/mine", cache_dir=tmp_path, local_files_only=True, revision="first")
    assert np.array_equal(draw(pipe), draw(loaded(adapted / "final")))


def test_a_pipeline_without_a_loader_of_adapters(factory, tmp_path):
    config = factory("dit", lora={"rank": 2}, output_dir=str(tmp_path / "dit"))
    pipe = factory("dit").backbone.pretrained
    (Path(pipe) / "model_index.json").write_text(json.dumps({
        "_class_name": "ClassConditionalPipeline", "scheduler": ["diffusers", "DDPMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"], "vae": [None, None]}))
    run = train(config).run_dir
    own = build(factory("dit", lora={"rank": 2}, backbone={"pretrained": str(run / "final")}, **WITHOUT_TEACHER))
    pipe = loaded(run / "final")
    state = pipe.transformer.state_dict()
    assert any(value.any() for name, value in state.items() if ".lora_B." in name)
    for name, value in own.backbone.state_dict().items():
        assert torch.allclose(value, state[name], atol=1e-6), name
    assert pipe([0, 1], num_inference_steps=2, output_type="np").images.std() > 0
    assert "load_lora_weights" not in (run / "final/README.md").read_text()


def test_adapters_are_tuned_further_and_their_teacher_is_the_model_they_began_with(adapted, factory, tmp_path, base):
    final = str(adapted / "final")
    changes = {"backbone": {"pretrained": final}, "experts": {"pretrained": final}}
    parts = build(factory("sd", **LORA, **changes))
    assert parts.teacher is parts.backbone and parts.folder == base
    run = train(factory("sd", **LORA, **changes, output_dir=str(tmp_path / "further"))).run_dir
    assert json.loads((run / "summary.json").read_text())["output_error"] > 0
    assert (run / "final/base.json").read_bytes() == (adapted / "final/base.json").read_bytes()
    before, after = load_file(adapted / "final" / FILE), load_file(run / "final" / FILE)
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(InputError, match="lora.rank, lora.targets: they give .* of rank 2: set both as in the run"):
        build(factory("sd", lora={"rank": 3}, **changes))
    with pytest.raises(InputError, match="holds adapters of a run alone: name the pipeline"):
        build(factory("sd", teacher={"pretrained": final}))


def test_all_weights_are_tuned_from_merged_adapters(adapted, factory, base):
    final = str(adapted / "final")
    changes = {"backbone": {"pretrained": final}, "experts": {"pretrained": final}}
    with pytest.raises(InputError, match="is a finished run: set teacher.pretrained"):
        build(factory("sd", **changes))
    parts = build(factory("sd", **changes, **WITHOUT_TEACHER))
    inputs = (torch.randn(2, 4, 16, 16), torch.tensor([10, 700]), torch.randn(2, 16, 12))
    pipe = load_dense(final)
    with torch.no_grad():
        assert torch.allclose(parts.backbone(*inputs).sample, pipe.unet(*inputs).sample, atol=1e-5)
    assert not any("lora" in name for name in parts.backbone.state_dict())


def test_commands_on_a_run_of_adapters(adapted, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    for more in ([], ["--dense"], ["--scheduler", "DDIMScheduler"]):
        result = run_script("sample", "--run", adapted, "--prompts", tmp_path / "prompts.txt", "--steps", 2, "--out",
                            tmp_path / f"drawn{len(more)}{more[:1]}", *more)
        assert result.returncode == 0, result.stderr
    result = run_script("report", "--run", adapted)
    assert result.returncode == 0, result.stderr
    text = (adapted / "final/README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("path/to/this/folder", str(adapted / "final"))
    found = {}
    exec(code, found)  # noqa: S102
    assert hasattr(found["pipe"].unet, "_alter_applied")
    assert "low-rank adapters of rank 2" in text and "pipe.load_lora_weights(folder)" in text
