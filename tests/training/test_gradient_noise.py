"""Signal to noise of the search's gradients."""

import numpy as np
import pytest
from helpers import run_script

from alter.training.gradient_noise import measure_gradient_noise, signal_to_noise


@pytest.mark.parametrize("signal", [0.0, 0.05, 0.3, 2.0])
def test_the_ratio_is_that_of_gaussians_and_its_error_covers_it(signal):
    """Of D numbers with mean s and deviation 1 each: s."""
    misses = []
    for seed in range(40):
        draws = np.random.default_rng(seed).normal(signal, 1.0, size=(400, 50))
        ratio, error = signal_to_noise(draws)
        misses.append(ratio - signal)
        assert error > 0 and abs(ratio**2 - signal**2) < 0.02 + 0.2 * signal**2
    assert abs(np.mean(misses)) < 0.03


@pytest.mark.parametrize("router", ["learned", "ordered", "uniform"])
def test_it_is_measured_at_the_start_of_a_search(small_config, tmp_path, monkeypatch, router):
    """The draws are those of the run's own first iterations; drawing per sample tells more of the masks."""
    monkeypatch.chdir(tmp_path)
    found = {draws: measure_gradient_noise(small_config(
        "dit", experts={"router": router, "count": 2, "offset": 1.0}, train={"batch_size": 16},
        search={"draws": draws}), 40) for draws in ("iteration", "sample")}
    assert found["sample"].masks[0] > found["iteration"].masks[0]
    assert (found["sample"].router is None) == (router == "uniform")
    assert found["sample"].share_E.sum() == pytest.approx(1) and len(found["sample"].expert_T) == 1000
    assert router == "learned" or np.array_equal(np.sort(found["sample"].expert_T), found["sample"].expert_T)


def test_the_script_prints_a_table(small_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_config("dit")
    done = run_script("gradient_noise", "--config", tmp_path / "small.yaml", "--draws", 20, "--routers", "ordered")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and [line.split(" | ")[1] for line in lines[2:]] == ["iteration", "sample"]
    done = run_script("gradient_noise", "--config", tmp_path / "none.yaml")
    assert done.returncode == 2 and "no such file" in done.stderr
