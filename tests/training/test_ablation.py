import functools
import json

import numpy as np
import pytest
import torch
from helpers import run_script

from alter import InputError
from alter.common.config import DataConfig
from alter.common.load import load_config, save_config
from alter.data.open import FastDiT
from alter.data.shapes import KINDS, write_scenes
from alter.training import ablation
from alter.training.ablation import UNSEARCHED, ablation_table, block_influence, unsearched_experts
from alter.training.setup.parts import build


@pytest.mark.parametrize("variant", UNSEARCHED)
@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_given_experts_meet_the_budget(small_config, monkeypatch, variant, kind):
    brief = functools.partial(ablation.measure_sensitivity, bins=2, samples=2)
    monkeypatch.setattr(ablation, "measure_sensitivity", brief)
    config = small_config(kind, budget={"keep_ratio": 0.7, "over": "prunable"}, experts={"count": 2})
    parts = build(config)
    experts = unsearched_experts(variant, config, parts, 0)
    prunable = sum(experts.macs) / experts.macs_total
    kept = (experts.keep_ratio - 1 + prunable) / prunable
    if variant == "dense_tuned":
        assert experts.mask_EL.all()
    elif variant == "every_second":
        assert np.array_equal(experts.mask_EL[0], np.arange(len(experts.sites)) % 2 == 0)
    else:
        assert abs(kept - 0.7) < (0.06 if kind == "dit" else 0.005)  # the DiT's four equal blocks allow 0.75
        assert len(experts.mask_EL) == (2 if variant == "greedy" else 1)
    assert kept == pytest.approx(experts.keep_ratio_target)


def test_random_masks_are_drawn_by_the_seed(small_config):
    config = small_config("unet", budget={"keep_ratio": 0.6})
    parts = build(config)
    drawn = [unsearched_experts("random", config, parts, seed).mask_EL.tolist() for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len(set(map(str, drawn))) > 1


def test_block_influence_is_one_minus_the_cosine(small_config):
    """A block that does nothing has none; one that turns its input round has two."""
    config = small_config("dit")
    parts = build(config)
    blocks = parts.backbone.transformer_blocks
    blocks[1].register_forward_hook(lambda module, arguments, output: arguments[0], prepend=True)
    blocks[2].register_forward_hook(lambda module, arguments, output: -3 * arguments[0], prepend=True)
    scores = block_influence(config, parts, samples=4)
    assert scores[1] == pytest.approx(0, abs=1e-6) and scores[2] == pytest.approx(2, abs=1e-6)
    assert 0 < scores[0] < 2


def test_an_unknown_variant(small_config):
    config = small_config("dit")
    with pytest.raises(InputError, match="variant 'best'"):
        unsearched_experts("best", config, build(config), 0)


def test_scenes_are_classes_of_pixels(tmp_path):
    write_scenes(tmp_path / "a", 40, 3)
    write_scenes(tmp_path / "b", 40, 3)
    source, again = (FastDiT(DataConfig(path=str(tmp_path / name)), 0) for name in "ab")
    samples = [source[0, i] for i in range(40)]
    assert all(torch.equal(sample["latents"], again[0, i]["latents"]) for i, sample in enumerate(samples))
    assert {sample["latents"].shape for sample in samples} == {(3, 16, 16)}
    assert all(-1 <= sample["latents"].min() and sample["latents"].max() <= 1 for sample in samples)
    assert {sample["labels"] for sample in samples} <= set(range(len(KINDS)))
    assert len({sample["labels"] for sample in samples}) > 8


def test_the_script_continues_its_rows(small_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_config("dit", output_dir=None, experts={"count": 2, "start": "greedy", "offset": 2.0},
                          evaluate={"dense": True})
    save_config(config, tmp_path / "c.yaml")
    command = ["--config", "c.yaml", "--out", "rows.json", "--seeds", "0", "--keep", "0.75", "--variants"]

    def run(*variants):
        assert run_script("ablate", *command, *variants).returncode == 0
        return json.loads((tmp_path / "rows.json").read_text())

    first = run("dense", "random")
    assert [row["variant"] for row in first] == ["dense", "dense", "random"]
    assert [row["sampling_steps"] for row in first] == [2, 50, 2] and first[0]["keep_ratio"] == 1
    wanted = {"variant", "seed", "keep_ratio", "sampling_steps", "fd", "accuracy", "macs", "device", "output_error",
              "denoise_error", "time_ratio"}
    assert all(wanted <= row.keys() for row in first)
    assert np.mean(first[2]["output_error_by_timestep"]) == pytest.approx(first[2]["output_error"])
    assert first[2]["time_ratio"] > 0
    rows = run("dense", "random", "alter", "static")
    assert rows[:3] == first and [row["variant"] for row in rows[3:]] == ["alter", "static"]
    searched = load_config(tmp_path / "outputs/ablation/c-alter-0.75-0/run/config.yaml").experts
    assert (searched.start, searched.offset) == ("dense", 4.0), "the paper's, whatever the file says"

    summary = tmp_path / "outputs/ablation/c-random-0.75-0/run/summary.json"
    written = summary.stat().st_mtime_ns
    (tmp_path / "rows.json").write_text(json.dumps(first[:2]))
    again = run("random")[2]  # its row is lost, its run is not
    assert {**again, "time_ratio": 0} == {**first[2], "time_ratio": 0} and summary.stat().st_mtime_ns == written
    command.insert(0, "optim.backbone_lr=0.02")
    other = run("random")[3]
    assert other["variant"] == "random optim.backbone_lr=0.02"
    assert other["macs"] == again["macs"] and other["output_error"] != again["output_error"]
    assert rows[2]["macs"] < rows[0]["macs"] and (tmp_path / "rows.png").is_file()


def test_the_table_has_means_and_deviations_over_seeds():
    common = {"keep_ratio_target": 0.5, "sampling_steps": 20, "keep_ratio": 0.5, "time_ratio": 0.55,
              "denoise_error": 0.1, "accuracy": 0.9}
    rows = [{**common, "variant": "alter", "output_error": error, "fd": fd}
            for error, fd in ((0.003, 1.0), (0.005, 2.0), (0.007, 3.0))]
    rows.append({**common, "variant": "random", "output_error": 0.001, "fd": 9.0})
    lines = ablation_table(rows).splitlines()
    assert lines[2].startswith("| 0.5 | random | 20 | 1 | 1.00 |")  # the least error first; one seed has no deviation
    assert lines[3].startswith("| 0.5 | alter | 20 | 3 | 5.00 ± 2.00 | 100.00 ± 0.00 | 2.00 ± 1.00 |")
