"""Ten iterations of search and tuning, and a checkpoint in between, on the real pipelines of diffusers' families."""

import shutil

import numpy as np
import pytest
import yaml
from conftest import SMALL, merge
from helpers import metrics_of
from pipelines import make_pipeline

from alter import TemporalExperts, load_config, train
from alter.data.shapes import write_shapes

FAMILIES = ("sd3", "flux", "qwen", "wan", "pixart", "sana", "z_image", "sdxl", "sd")
QUICK = ("flux", "sdxl")


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


def _some_are_slow(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def _results(run):
    """Bytes of all that final/ holds, without the card, which tells the time that it took."""
    files = sorted(file for file in (run / "final").rglob("*") if file.is_file() and file.suffix != ".md")
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


@pytest.mark.parametrize("name", _some_are_slow(FAMILIES))
def test_a_resumed_run_is_the_uninterrupted_one(family_config, name):
    run = train(family_config(name)).run_dir
    lines, results = metrics_of(run), _results(run)
    losses = [value for line in lines for key, value in line.items() if "/" in key]
    assert len(lines) == 10 and np.isfinite(losses).all()
    assert any(key.startswith("search/") for key in lines[5]) and not any(key.startswith("search/") for key in lines[6])
    assert TemporalExperts.from_pretrained(run / "final").keep_ratio < 1
    shutil.rmtree(run / "final")
    train(family_config(name, output_dir=None, resume=str(run / "checkpoints/step-000004")))
    assert metrics_of(run) == lines
    again = _results(run)
    assert again.keys() == results.keys()
    assert [file for file in results if results[file] != again[file]] == []
