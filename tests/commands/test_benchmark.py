"""`alter benchmark`: complete rows, and the update that training is compared with."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_dit

from alter.backbones.cost import count_cost
from alter.commands import main
from alter.commands.benchmarking import cases, timing, training
from alter.commands.benchmarking.timing import host_reads, interleave, ratio
from alter.common.load import save_config

KEYS = {"case", "kind", "mode", "batch", "device", "keep_ratio", "macs_ratio", "mask_seed", "time_ratio", "efficiency",
        "overhead", "peak_memory_bytes", "host_syncs_per_step"}


def rows(tmp_path, *arguments):
    file = tmp_path / "rows.json"
    assert main(["benchmark", "--json", str(file), *map(str, arguments)]) == 0
    return json.loads(file.read_text())


@pytest.mark.slow
def test_rows_of_use(tmp_path):
    found = rows(tmp_path, "--cases", "demo_dit", "--masks", 2, "--runs", 1, "--batch", 1, 2)
    assert len(found) == 2 * 2 * 2 * 2 and all(KEYS <= row.keys() for row in found)
    for row in found:
        assert row["macs_ratio"] == pytest.approx(row["keep_ratio"] * (1 if row["kind"] == "step" else 0.4), abs=0.06)
        assert row["efficiency"] == pytest.approx(row["macs_ratio"] / row["time_ratio"])
        assert row["host_syncs_per_step"] == (1 if row["kind"] == "step" else pytest.approx(1, abs=3))


def test_rows_of_training(tmp_path, monkeypatch):
    monkeypatch.setitem(training.CUT, "dit_xl2", ("configs/dit_xl2.yaml", {
        "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}, 8))
    found = rows(tmp_path, "--cases", "dit_xl2", "--kinds", "train_search", "train_final", "--runs", 1,
                 "--batch", 4, "--keep", 0.6)
    assert [(row["kind"], row["optimizer_step"]) for row in found] == [
        (kind, step) for kind in ("train_search", "train_final") for step in (False, True)]
    for row in found:
        assert KEYS <= row.keys()
        k = row["macs_ratio"]
        assert row["floor"] == pytest.approx((3 + 3 * k) / 7 if row["kind"] == "train_search" else (1 + 3 * k) / 4)
        assert row["overhead"] == pytest.approx(row["time_ratio"] / row["floor"])


def test_masks_hit_their_target():
    cost = count_cost(make_dit(layers=10), 8)
    for seed in range(3):
        kept = 1 - cost.share_L[~cases.draw_mask(cost, 0.65, [seed])].sum()
        assert abs(kept - 0.65) <= cost.share_L.max() / 2 + 1e-9
    (mask_EL, expert_T), k = training._masks(cost, 0.65, np.array([5, 900, 33, 400]))
    kept_B = 1 - (~mask_EL[expert_T[[5, 900, 33, 400]]] * cost.share_L).sum(1)
    assert kept_B.mean() == pytest.approx(k) and abs(k - 0.65) <= cost.share_L.max() / 2 / 4 + 1e-9


def test_masks_of_a_run(tmp_path):
    case = cases.load_case("demo_sd", torch.device("cpu"), "fp32")
    cases.draw_experts(case.cost, 0.6, 0, 2).save_pretrained(tmp_path / "final")
    found = rows(tmp_path, "--cases", "demo_sd", "--run", tmp_path, "--runs", 1)
    assert [(row["kind"], row.get("expert")) for row in found] == [("step", 0), ("step", 1), ("trajectory", None)]


@pytest.mark.slow
def test_compiled_layers(tmp_path):
    (row,) = rows(tmp_path, "--cases", "demo_dit", "--kinds", "step", "--modes", "compiled", "--masks", 1, "--runs", 1,
                  "--keep", 0.5)
    assert row["mode"] == "compiled" and "time_ratio_by_latency" not in row


def test_options_of_speed(small_config, tmp_path):
    save_config(small_config("dit"), tmp_path / "c.yaml")
    out = tmp_path / "rows.json"
    assert main(["benchmark-options", "--config", str(tmp_path / "c.yaml"), "--option", "optim.fused=true", "--out",
                 str(out), "--steps", "1", "--warmup", "1"]) == 0
    assert [row["option"] for row in json.loads(out.read_text())["rows"]] == ["none", "optim.fused=true", "none"]


def test_refusals(tmp_path, capsys):
    assert main(["benchmark", "--json", str(tmp_path / "x"), "--cases", "demo_dit", "--kinds", "train_final"]) == 2
    assert "--kinds train_*" in capsys.readouterr().err


def test_every_way_has_every_place(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def way(name, seconds):
        def call():
            clock[0] += seconds
            order.append(name)
        return call

    seconds, _ = interleave({name: way(name, 0.25) for name in "abc"}, 4, torch.device("cpu"))
    assert ["".join(order[i : i + 3]) for i in range(6, 18, 3)] == ["abc", "bca", "cab", "cba"]
    assert seconds["a"].tolist() == [0.25] * 4
    order.clear()
    seconds, _ = interleave({"quick": way("quick", 2**-6)}, 2, torch.device("cpu"))
    assert len(order) == 2 + 2 * 3 and seconds["quick"].tolist() == [2**-6] * 2  # turns of a twentieth of a second


def test_a_clock_that_changes_between_two_rounds_or_in_some_leaves_the_ratio():
    clock, within = np.array([1.0, 3.0, 2.0, 8.0, 4.0]), np.array([1, 1, 1, 6, 1 / 15])
    seconds = {"a": 1.5 * clock * within, "b": clock}
    assert ratio(seconds, "a", "b") == 1.5 and np.median(seconds["a"]) / np.median(seconds["b"]) == 1


def test_reads_are_counted():
    with host_reads(torch.device("cpu")) as reads:
        torch.ones(2).tolist()
        bool(torch.tensor(True))
        torch.ones(2).sum()
    assert reads == ["tolist", "__bool__"]
