"""Ten iterations of search and tuning, and a checkpoint in between, on the real pipelines of diffusers' families."""

import shutil

import numpy as np
import pytest
import yaml
from conftest import SMALL, merge
from diffusers import DiffusionPipeline
from helpers import metrics_of
from pipelines import draw, make_pipeline, unguided

from alter import TemporalExperts, load_config, load_pipeline, train
from alter.backbones.pretrained import absent_parts
from alter.data.shapes import write_shapes

FAMILIES = ("sd3", "flux", "flux2", "qwen", "wan", "pixart", "sana", "z_image", "sdxl", "sd",
            "cogvideox")
_LORA = {"lora": {"rank": 2}, "optim": {"backbone_lr": 0.05}}
KINDS = {"full": {}, "lora": _LORA, "bf16": {**_LORA, "backbone": {"precision": "bf16"}}}
QUICK = (("flux", "full"), ("qwen", "full"), ("z_image", "lora"))


@pytest.fixture
def family_config(tmp_path, monkeypatch):
    """A factory: ten steps on captioned images, of which six search, with a checkpoint after four."""
    def make(name, **changes):
        pretrained, shapes = tmp_path / name, tmp_path / "shapes"
        if not pretrained.exists():
            make_pipeline(name, pretrained)
        if not shapes.exists():
            write_shapes(shapes, 12, 0)
        content = merge(SMALL, {
            "backbone": {"pretrained": str(pretrained)}, "output_dir": "run",
            "data": {"path": str(shapes), "resolution": 32, "holdout": 2, "label_dropout": 0.3},
            "train": {"steps": 10, "search_steps": 6, "batch_size": 4}, "checkpoint": {"every": 4}})
        file = tmp_path / "family.yaml"
        file.write_text(yaml.safe_dump(merge(content, changes)))
        return load_config(file)

    monkeypatch.chdir(tmp_path)
    return make


def _results(run):
    """Bytes of all that final/ holds, without the card, which tells the time that it took."""
    files = sorted(file for file in (run / "final").rglob("*") if file.is_file() and file.suffix != ".md")
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


@pytest.mark.parametrize("name, kind", [
    pytest.param(name, kind, marks=[] if (name, kind) in QUICK else pytest.mark.slow)
    for name in FAMILIES for kind in KINDS])
def test_a_resumed_run_is_the_uninterrupted_one(family_config, name, kind):
    changes = KINDS[kind]
    run = train(family_config(name, **changes)).run_dir
    lines, results = metrics_of(run), _results(run)
    losses = [value for line in lines for key, value in line.items() if "/" in key]
    assert len(lines) == 10 and np.isfinite(losses).all()
    assert any(key.startswith("search/") for key in lines[5]) and not any(key.startswith("search/") for key in lines[6])
    assert TemporalExperts.from_pretrained(run / "final").keep_ratio < 1
    shutil.rmtree(run / "final")
    train(family_config(name, output_dir=None, resume=str(run / "checkpoints/step-000004"), **changes))
    assert metrics_of(run) == lines
    again = _results(run)
    assert again.keys() == results.keys()
    assert [file for file in results if results[file] != again[file]] == []
    if kind == "lora":
        _assert_the_adapters_load(name, run, family_config(name).backbone.pretrained)


def _assert_the_adapters_load(name, run, folder):
    """By the pipeline's own loader where it has one: the images of `load_pipeline`, and not those of the base."""
    pipe, ours = (DiffusionPipeline.from_pretrained(folder, **absent_parts(DiffusionPipeline.load_config(folder))),
                  load_pipeline(run / "final"))
    experts = TemporalExperts.from_pretrained(run / "final")
    experts.remove(ours)
    for each in (pipe, ours):
        each.set_progress_bar_config(disable=True)
    dense, adapted = draw(pipe, **unguided(name)), draw(ours, **unguided(name))
    assert np.abs(dense - adapted).max() > 1e-4
    if name != "pixart":  # whose pipelines have no loader
        pipe.load_lora_weights(run / "final")
        assert np.array_equal(draw(pipe, **unguided(name)), adapted)
