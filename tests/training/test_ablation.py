import json
import shutil

import numpy as np
import pytest
import torch
from helpers import run_script

from alter import InputError
from alter.common.config import DataConfig
from alter.common.load import CONFIGS, load_config, save_config
from alter.data.open import FastDiT
from alter.data.shapes import KINDS, write_scenes
from alter.training import ablation
from alter.training.ablation import UNSEARCHED, ablation_table, block_influence, unsearched_experts
from alter.training.probe import Probe
from alter.training.setup.parts import build


@pytest.mark.parametrize("kind, variant", [
    *(("dit", variant) for variant in UNSEARCHED), *(("unet", variant) for variant in UNSEARCHED[:-1]),
    pytest.param("unet", UNSEARCHED[-1], marks=pytest.mark.slow)])
def test_given_experts_meet_the_budget(small_config, monkeypatch, variant, kind):
    monkeypatch.setattr(ablation, "Probe", lambda config, parts, samples: Probe(config, parts, 2))
    config = small_config(kind, budget={"keep_ratio": 0.7, "over": "prunable"}, experts={"count": 2},
                          search={"samples": 2})
    parts = build(config)
    experts = unsearched_experts(variant, config, parts, 0)
    prunable = sum(experts.macs) / experts.macs_total
    kept = (experts.keep_ratio - 1 + prunable) / prunable
    if variant == "dense_tuned":
        assert experts.mask_EL.all()
    elif variant == "every_second":
        assert np.array_equal(experts.mask_EL[0], np.arange(len(experts.sites)) % 2 == 0)
    else:
        # The DiT's four equal blocks allow 0.75, and an order of layers what its prefixes cost.
        assert abs(kept - 0.7) < (0.06 if kind == "dit" or variant == "one_mask" else 0.005)
        assert len(experts.mask_EL) == 1
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


@pytest.fixture
def scenes(small_config, tmp_path, monkeypatch):
    """A folder with a configuration c.yaml of a demo, of a third of its layers, and a command that runs variants and
    gives all rows."""
    monkeypatch.chdir(tmp_path)
    template = shutil.copytree(CONFIGS / "models/demo/dit-scenes", tmp_path / "small-scenes")
    model = json.loads((template / "transformer/config.json").read_text())
    small = {"num_layers": 4, "num_attention_heads": 1}
    (template / "transformer/config.json").write_text(json.dumps(model | small))
    overrides = [f"demo.model={template}", "demo.images=120", "demo.steps=2", "data.holdout=8", "train.steps=4",
                 "train.search_steps=2", "train.batch_size=4", "evaluate.samples=100", "evaluate.sampling_steps=4",
                 "search.samples=4", "search.bins=4", "experts.count=2", "optim.warmup_steps=0", "log.tracker=none"]
    save_config(load_config("ablation_dit", overrides), tmp_path / "c.yaml")

    def run(*variants, keep="0.6", extra=()):
        done = run_script("ablate", *extra, "--config", "c.yaml", "--out", "rows.json", "--seeds", "0", "--keep", keep,
                          "--variants", *variants)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "rows.json").read_text())

    return run


def test_the_script_continues_its_rows(scenes, tmp_path):
    first = scenes("dense", "random")
    wanted = {"variant", "seed", "budget", "run", "steps", "macs", "share", "fd", "fd_noise", "drift", "drift_noise",
              "accuracy", "device"}
    assert all(wanted <= row.keys() for row in first)
    dense, random = first[:-1], first[-1]
    assert {row["variant"] for row in dense} == {"dense"} and [row["steps"] for row in dense] == [2, 3, 4]
    assert [row["share"] for row in dense] == [0.5, 0.75, 1.0]
    assert random["share"] == pytest.approx(random["keep_ratio"]) and random["output_error"] > 0
    rows = scenes("dense", "random", "paper")
    assert rows[: len(first)] == first and [row["variant"] for row in rows[len(first) :]] == ["paper"]
    searched = load_config(tmp_path / "outputs/ablation/c-paper-0.6-0/run/config.yaml").experts
    assert (searched.start, searched.offset, searched.router) == ("dense", 4.0, "learned")

    summary = tmp_path / "outputs/ablation/c-random-0.6-0/run/summary.json"
    written = summary.stat().st_mtime_ns
    (tmp_path / "rows.json").write_text(json.dumps(dense))
    assert scenes("random")[-1] == random and summary.stat().st_mtime_ns == written, "its row was lost, its run is not"
    (tmp_path / "rows.json").write_text(json.dumps([{**row, "real": "others"} for row in dense]))
    with pytest.raises(AssertionError, match="--out: its rows were rated by other real images"):
        scenes("dense", "random")
    (tmp_path / "rows.json").write_text(json.dumps([{**row, "yardstick": "another"} for row in dense]))
    with pytest.raises(AssertionError, match="--out: its rows were rated by another dense model or classifier"):
        scenes("dense", "random")
    (tmp_path / "rows.json").write_text(json.dumps(dense))
    other = scenes("random", extra=("optim.backbone_lr=0.02",))[-1]
    assert other["run"] == "random optim.backbone_lr=0.02" and other["variant"] == "random"
    assert other["macs"] == random["macs"] and other["output_error"] != random["output_error"]
    assert (tmp_path / "rows.png").is_file()


def test_side_by_side_are_the_same_rows_and_one_that_fails_costs_the_others_nothing(scenes, tmp_path):
    def known(rows):
        return {(row["run"], row.get("rung")): row["fd"] for row in rows}

    runs, file = tmp_path / "outputs/ablation", tmp_path / "rows.json"
    alone = known(scenes("dense", "random"))  # first: other processes would train the classifier in full
    file.unlink()
    shutil.rmtree(runs)
    runs.mkdir()
    (runs / "c-every_second-1.0-0").write_text("no folder")
    with pytest.raises(AssertionError, match=r"--jobs: failed: every_second, keep ratio 1.0, seed 0: see .*-1.0-0.log"):
        scenes("every_second", "dense", "random", extra=("--jobs", "2"))
    beside = known(json.loads(file.read_text()))
    assert {path.name for path in runs.glob("*.log")} == {f"c-{run}-0.log" for run in (
        "dense-1.0", "random-0.6", "every_second-1.0")}
    assert beside == alone


def test_one_elastic_run_gives_rungs_and_plans(scenes):
    rows = scenes("elastic_range", "elastic")
    rungs, plans = ([row for row in rows if row["variant"] == name] for name in ("elastic_range", "planned"))
    assert [row["rung"] for row in rungs] == [0.35, 0.5, 0.65, 0.8]
    assert all(row["keep_ratio"] <= row["rung"] + 0.005 and row["rung_error"] > 0 for row in rungs)
    assert all(row["share"] <= row["rung"] + 1e-6 and row["predicted"] >= row["discretisation"] for row in plans)
    assert plans and all(len(row["depths"]) == row["steps"] for row in plans)
    (elastic,) = (row for row in rows if row["variant"] == "elastic")
    assert elastic["rung_error"] > 0 and elastic["weighted_error"] > 0


def test_the_table_has_means_and_deviations_over_seeds():
    common = {"budget": 0.5, "steps": 20, "share": 0.5, "accuracy": 0.9, "fd": 2.0}
    rows = [{**common, "variant": "paper", "run": "paper", "output_error": error, "drift": drift,
             "fd_noise": 30.0}
            for error, drift in ((0.003, 0.1), (0.005, 0.2), (0.007, 0.3))]
    rows.append({**common, "variant": "dense", "run": "dense", "rung": 0.5, "steps": 10, "drift": 0.05})
    lines = ablation_table(rows).splitlines()
    assert lines[2] == "| 0.5 | dense at 0.5 | 10 | 1 | 0.500 | 2.00 |  | 0.050 |  |  | 0.900 |", "least drift first"
    assert lines[3].startswith("| 0.5 | paper | 20 | 3 | 0.500 ± 0.000 | 2.00 ± 0.00 | 30.0 ± 0.0 | 0.200 ± 0.100 |  | "
                               "5.00 ± 2.00")
