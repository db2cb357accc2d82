"""README's pictures, from a small run."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL, make_dit, merge, save_pipeline
from PIL import Image
from test_report import experts_of

from alter import InputError, load_config, train
from alter.evaluation.report.drawing import layers
from alter.evaluation.report.readme import Row, map_figure, rows_figure, sample_rows
from alter.evaluation.report.runs import read_run

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_the_map_shows_what_runs_at_each_step():
    experts, timesteps = experts_of("unet"), [999, 640, 320, 1]
    figure = map_figure(experts, timesteps)
    above, below = figure.axes
    assert [text.get_text() for text in above.texts] == [str(experts.expert_T[t]) for t in timesteps]
    names = len(experts.sites)
    colours = np.array([bar.get_facecolor()[3] for bar in below.patches]).reshape(4, names)
    order, _ = layers(experts.sites)
    assert np.array_equal(colours == 1, experts.mask_EL[experts.expert_T[timesteps]][:, order])


def test_rows_say_what_they_cost():
    rows = [Row(torch.rand(3, 3, 8, 8) * 2 - 1, "dense, 50 steps"), Row(torch.zeros(3, 3, 8, 8), "experts")]
    figure = rows_figure(rows, ["a circle", "b", "c"])
    assert [part.texts[0].get_text() for part in figure.subfigs] == ["dense, 50 steps", "experts"]
    assert [axis.get_title() for axis in figure.subfigs[0].axes] == ["a circle", "b", "c"]
    assert np.allclose(figure.axes[1].images[0].get_array(), (rows[0].images[1].permute(1, 2, 0) + 1) / 2)


def test_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import draw_readme

    content = merge(SMALL, {"backbone": {"pretrained": str(save_pipeline(tmp_path / "pretrained", make_dit()))},
                            "output_dir": str(tmp_path / "run"), "data": {"source": "digits", "resolution": 8},
                            "evaluate": {"dense": True}})
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    folder = train(load_config(tmp_path / "small.yaml")).run_dir
    monkeypatch.setattr(sys, "argv", ["draw_readme.py", "--run", str(folder), "--out", str(tmp_path / "images")])
    assert draw_readme.main() == 0
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == [
        "map-dark.png", "map-light.png", "samples-dark.png", "samples-light.png"]
    light, dark = (np.asarray(Image.open(tmp_path / f"images/map-{scheme}.png")) for scheme in ("light", "dark"))
    assert light[0, 0, 3] == 0 and light.shape == dark.shape and (light != dark).any()

    rows = sample_rows(read_run(folder), [0, 1])
    run = read_run(folder)
    assert [row.text.split(" · ")[0] for row in rows] == ["dense, 50 steps", "dense, 2 steps", "experts, 2 steps"]
    assert all(" per image" in row.text and "Fréchet distance" in row.text for row in rows)
    assert run.macs_per_image(50, dense=True) == 50 * run.experts.macs_total
    (tmp_path / "pretrained").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="start in the folder in which the run was started"):
        sample_rows(run, [0])
