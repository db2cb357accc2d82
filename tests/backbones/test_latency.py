"""A budget of time: latencies measured, kept, and met."""

import json

import numpy as np
import pytest
import torch
from conftest import make_dit
from helpers import run_script, uneven_latency

import alter.training.run
from alter import InputError, TemporalExperts, train
from alter.backbones.latency import Latency, measure_latency
from alter.training.setup.describe import describe_run
from alter.training.setup.parts import build


def test_what_is_slow_costs_more(monkeypatch):
    """By a clock that only the layers move: block 2 by 5 s, the others and the head by 1 s."""
    now, model = [0.0], make_dit().eval()
    for module in [*(block.ff for block in model.transformer_blocks), model.proj_out_2]:
        slow = 5.0 if module is model.transformer_blocks[2].ff else 1.0
        module.forward = lambda *args, forward=module.forward, slow=slow, **kwargs: (
            now.__setitem__(0, now[0] + slow), forward(*args, **kwargs))[1]
    monkeypatch.setattr("alter.backbones.latency.time.perf_counter", lambda: now[0])
    latency = measure_latency(model, latent_size=8, batch=3, runs=5)
    assert latency.sites == uneven_latency().sites and latency.seconds == (1, 1, 5, 1)
    assert latency.seconds_total == 9 and latency.share_L.argmax() == 2
    assert (latency.dtype, latency.batch, latency.latent_size) == ("float32", 3, 8)
    assert latency.device.endswith(f", {torch.get_num_threads()} threads") and not latency.device.startswith(",")
    assert not any(module._forward_hooks for module in model.modules())


def test_files(tmp_path):
    file = tmp_path / "latency.json"
    uneven_latency().save(file)
    assert Latency.load(file) == uneven_latency()
    content = json.loads(file.read_text())
    for field, value in [("seconds", [1, 2]), ("seconds", [0, 1, 1, 1]), ("seconds_total", 0.1), ("batch", "many"),
                         ("sites", None)]:
        file.write_text(json.dumps({**content, field: value}))
        with pytest.raises(InputError, match="no measured latencies"):
            Latency.load(file)
    with pytest.raises(InputError, match="nothing.json: no measured latencies"):
        Latency.load(tmp_path / "nothing.json")


def test_the_budget_is_a_share_of_time(small_config, tmp_path):
    uneven_latency().save(tmp_path / "latency.json")
    config = small_config(budget={"cost": "latency", "latency_file": str(tmp_path / "latency.json")})
    parts = build(config)
    mask_EL = np.array([[0, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]], dtype=bool)
    expert_T = np.repeat([0, 1, 2], [500, 250, 250])
    assert parts.budget.measured(mask_EL, expert_T) == pytest.approx(0.5 * 0.4 + 0.25 * 0.8 + 0.25 * 1.0)
    keep_all = parts.hypernetwork()
    keep_all.mask_EL.data.fill_(50.0)
    assert float(parts.budget.expected(keep_all).detach()) == pytest.approx(1.0)
    experts = TemporalExperts.build(mask_EL, expert_T, parts.cost, 0.6, "total", latency=parts.latency)
    assert experts.time_ratio == pytest.approx(0.65) and experts.keep_ratio != pytest.approx(0.65, abs=0.02)


def test_a_run_keeps_its_measurement_and_its_artefact_tells_of_it(small_config, tmp_path, monkeypatch):
    changes = {"experts": {"count": 8}, "budget": {"cost": "latency", "keep_ratio": 0.7}}
    monkeypatch.setattr(alter.training.run, "plan_latency", lambda config, device: uneven_latency())
    config = small_config(**changes, train={"steps": 2, "search_steps": 2})
    train(config)
    assert Latency.load(tmp_path / "run" / "latency.json") == uneven_latency()

    monkeypatch.setattr(alter.training.run, "plan_latency", None)  # a resumed run measures nothing
    config = small_config(**changes, resume="latest", train={"steps": 4, "search_steps": 2})
    run_dir = train(config).run_dir
    experts = TemporalExperts.from_pretrained(run_dir / "final")
    assert experts.latency == uneven_latency()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["time_ratio"] == experts.time_ratio == pytest.approx(0.7, abs=0.05)
    assert "of the time (a device, float32, batch 2" in experts.summary()
    assert "of its time (a device" in (run_dir / "final" / "README.md").read_text()

    damaged = json.loads((run_dir / "final" / "experts.json").read_text())
    for latency in ({}, {**damaged["latency"], "sites": ["a", "b", "c", "d"]}):
        (tmp_path / "experts.json").write_text(json.dumps({**damaged, "latency": latency}))
        with pytest.raises(InputError, match=r"experts\.json: latency"):
            TemporalExperts.from_pretrained(tmp_path)
    given = small_config(experts={"pretrained": str(run_dir / "final")}, output_dir=str(tmp_path / "tuned"))
    assert build(given).budget.share_L.tolist() == uneven_latency().share_L.tolist()


def test_refusals_and_dry_run(small_config, tmp_path):
    uneven_latency(sites=uneven_latency().sites[:3], seconds=(0.1, 0.1, 0.1)).save(tmp_path / "other.json")
    with pytest.raises(InputError, match="budget.latency_file=.*3 sites are not the 4"):
        build(small_config(budget={"cost": "latency", "latency_file": str(tmp_path / "other.json")}))
    uneven_latency(latent_size=16).save(tmp_path / "size.json")
    with pytest.raises(InputError, match="measured at latents of 16, the run's are of 8"):
        build(small_config(budget={"cost": "latency", "latency_file": str(tmp_path / "size.json")}))
    with pytest.raises(InputError, match="has no effect with budget.cost=macs"):
        small_config(budget={"latency_file": "x.json"})
    with pytest.raises(InputError, match="is below"):
        uneven_latency().save(tmp_path / "latency.json")
        build(small_config(budget={"cost": "latency", "keep_ratio": 0.15,
                                   "latency_file": str(tmp_path / "latency.json")}))
    assert "of the total time, measured when the run begins" in describe_run(small_config(budget={"cost": "latency"}))
    known = {"cost": "latency", "latency_file": str(tmp_path / "latency.json")}
    assert "keep 0.650 of the total time, which is 0.650 of all time and 0.611 of the prunable" in describe_run(
        small_config(budget=known))


def test_a_run_is_resumed_without_the_file_that_it_was_given(small_config, tmp_path):
    file = tmp_path / "latency.json"
    uneven_latency().save(file)
    changes = {"budget": {"cost": "latency", "keep_ratio": 0.7, "latency_file": str(file)}}
    train(small_config(**changes, train={"steps": 1, "search_steps": 1}))
    file.unlink()
    train(small_config(**changes, resume="latest", train={"steps": 2, "search_steps": 1}))


def test_the_script(tmp_path):
    out = tmp_path / "latency.json"

    def call(*overrides):
        return run_script("latency", "--config", "configs/demo_dit.yaml", "--out", out, *overrides)

    known = ["budget.cost=latency", f"budget.latency_file={out}"]  # measured, although the file is named
    assert call("budget.batch=3", *known).returncode == 0 and Latency.load(out).batch == 3
    refused = call("budget.batch=0")
    assert refused.returncode == 2 and refused.stderr.startswith("error: budget.batch")
