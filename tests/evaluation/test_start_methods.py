"""Evaluation where loader processes are not forked: macOS, and Python 3.14 on Linux."""

import json
import os
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from helpers import HANGING, ROOT, run_script, save_noise
from PIL import Image
from torch import nn

from alter.evaluation import networks
from alter.evaluation.classifier import SmallClassifier


def measured(folder):
    """The FID; forgets the features it was made of, not the network."""
    for features in {*(folder / "cache").glob("*.safetensors")} - {*(folder / "cache").glob("digits-*")}:
        features.unlink()
    return json.loads((folder / "metrics.json").read_text())["fid"]["value"]


@pytest.mark.slow
def test_evaluate_does_not_need_fork(tmp_path):
    save_noise(tmp_path / "a", count=8, seed=0)
    save_noise(tmp_path / "b", count=8, seed=1)
    arguments = ["--images", tmp_path / "a", "--reference", tmp_path / "b", "--metrics", "fid", "--feature-network",
                 "demo", "--bootstrap", "0", "--cache", tmp_path / "cache", "--out", tmp_path / "metrics.json"]
    assert run_script("evaluate", *arguments, "--workers", "0", ACCELERATE_USE_CPU="true").returncode == 0
    values = [measured(tmp_path)]
    for method in ("spawn", "forkserver"):
        (tmp_path / "sitecustomize.py").write_text(
            f"import multiprocessing\nmultiprocessing.set_start_method({method!r}, force=True)\n")
        done = subprocess.run(
            [sys.executable, ROOT / "scripts/evaluate.py", *arguments, "--workers", "1"], capture_output=True,
            text=True, cwd=tmp_path, timeout=HANGING,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
        assert done.returncode == 0, done.stderr
        values.append(measured(tmp_path))
    assert np.isfinite(values[0]) and values == pytest.approx(values[:1] * 3, rel=1e-6)


@pytest.mark.parametrize("prepare", [
    networks.Demo(SmallClassifier(1, 8, 10), 8, 1).prepare, networks._resized_clean, networks._resized_legacy,
    partial(networks._normalized, size=224, statistics=networks.IMAGENET),
    partial(networks._normalized_square, size=28),
])
def test_what_loader_processes_are_handed(prepare):
    """It can be pickled, without weights, and does the same then."""
    content = pickle.dumps(prepare)
    assert len(content) < 1000
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    torch.testing.assert_close(pickle.loads(content)(image), prepare(image))


def test_open_clip_hands_over_no_weights():
    open_clip = pytest.importorskip("open_clip")
    prepare = open_clip.image_transform(32, is_train=False)
    restored = pickle.loads(pickle.dumps(prepare))
    image = Image.new("RGB", (40, 30), (200, 10, 90))
    torch.testing.assert_close(restored(image), prepare(image))
    assert not isinstance(prepare, nn.Module) or not list(prepare.parameters())
