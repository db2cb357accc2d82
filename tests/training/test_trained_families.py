"""The real pipelines of each family, with tiny random components, are trained: a search, its tuning, an export."""

import numpy as np
import pytest
from helpers import metrics_of
from pipelines import PIPELINES, VIDEOS, draw, make_pipeline

from alter import load_pipeline, train
from alter.common.load import load_config
from alter.data.shapes import write_shapes

QUICK = ("flux", "qwen", "z_image")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
                                  for name in PIPELINES if name not in VIDEOS])
def test_search_and_tuning(name, tmp_path):
    make_pipeline(name, tmp_path / "pretrained")
    write_shapes(tmp_path / "shapes", 16, 0)
    config = load_config({
        "name": name, "backbone": {"pretrained": str(tmp_path / "pretrained")}, "output_dir": str(tmp_path / "run"),
        "data": {"path": str(tmp_path / "shapes"), "resolution": 32, "holdout": 4, "workers": 0},
        "experts": {"count": 2}, "train": {"steps": 4, "search_steps": 2, "batch_size": 4, "mixed_precision": "no"},
        "optim": {"warmup_steps": 0, "backbone_lr": 1e-3, "hypernetwork_lr": 1e-2},
        "log": {"every": 1, "tracker": "none"}, "evaluate": {"sampling_steps": 2},
    })
    run = train(config).run_dir
    losses = [value for line in metrics_of(run) for key, value in line.items() if "/" in key]
    assert len(metrics_of(run)) == 4 and np.isfinite(losses).all()
    pipe = load_pipeline(run / "final")
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(draw(pipe)).all()
