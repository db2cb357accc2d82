"""`alter sample` on runs of other families, at the size and the guidance of their training."""

import json

import pytest
from by_hand import make_experts
from pipelines import backbones, make_pipeline

import alter.commands.sample
from alter.commands import main


def saved(name, folder, resolution=32):
    pipe = make_pipeline(name, folder / "final")
    experts = make_experts(*backbones(pipe).values())
    experts.save_pretrained(folder / "final")
    (folder / "config.yaml").write_text(f"data: {{resolution: {resolution}, max_tokens: null, frames: 1}}\n")
    (folder / "prompts.txt").write_text("a red circle\n")
    return ["sample", "--run", str(folder), "--prompts", str(folder / "prompts.txt"), "--steps", "2", "--out",
            str(folder / "out")]


@pytest.mark.parametrize(("name", "expected"), [
    ("flux2", {}), ("pixart", {"use_resolution_binning": False, "guidance_scale": 3.0}),
    ("qwen", {"true_cfg_scale": 3.0, "negative_prompt": [""]}), ("z_image", {"guidance_scale": 3.0})])
def test_what_pipelines_are_given(tmp_path, monkeypatch, name, expected):
    command, given = saved(name, tmp_path), []
    real = alter.commands.sample.drawing
    monkeypatch.setattr(alter.commands.sample, "drawing", lambda *them: given.append(real(*them)) or given[0])
    assert main([*command, *(["--guidance", "3"] if expected else [])]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
    assert (given[0]["height"], given[0]["width"]) == (32, 32) and expected.items() <= given[0].items()
    assert json.loads((tmp_path / "out/manifest.json").read_text())["settings"]["resolution"] == 32


def test_guidance_of_one_is_none(tmp_path):
    command = saved("z_image", tmp_path)
    drawn = []
    for scale, out in (("1", "one"), ("0", "zero"), ("2", "two")):
        assert main([*command[:-1], str(tmp_path / out), "--guidance", scale, "--latents"]) == 0
        drawn.append((tmp_path / out / "000000.npy").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_videos_are_refused_before_they_are_drawn(tmp_path, capsys):
    command = saved("ltx", tmp_path)
    assert main(command) == 2
    assert "draws videos, not images" in capsys.readouterr().err and not (tmp_path / "out").exists()
