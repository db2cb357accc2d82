"""Dry runs of released models, from their configurations alone, and the GPU-hours that they expect."""

import re

import pytest

from alter.common.load import load_config
from alter.training.setup.describe import describe_run

EXPECTED = {  # class, sites, GMACs, millions of trained parameters
    "sdxl": ("UNet2DConditionModel", 83, 3380.6, 2567.5), "sd15": ("UNet2DConditionModel", 34, 401.6, 859.5),
    "sd35": ("SD3Transformer2DModel", 24, 5624.8, 2243.2), "pixart": ("PixArtTransformer2DModel", 28, 3316.8, 610.9),
    "sana": ("SanaTransformer2DModel", 20, 1483.3, 1604.6), "flux": ("FluxTransformer2DModel", 57, 37192.3, 74.7),
    "qwen_image": ("QwenImageTransformer2DModel", 60, 35288.3, 94.4),
    "z_image": ("ZImageTransformer2DModel", 34, 28289.8, 66.8),
    "wan": ("WanTransformer3DModel", 30, 57526.0, 1419.0),
}


def hours(text):
    return float(re.search(r"time: about ([\d,.]+) GPU-hours", text)[1].replace(",", ""))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_released_model(name):
    cls, sites, gmacs, trained = EXPECTED[name]
    config = load_config(name)
    text = describe_run(config)
    assert f"{cls}: {sites} sites, {gmacs} GMACs a forward" in text
    assert f"({trained}M of " in text and (config.lora.rank is not None) == (f"({trained}M of {trained}M " not in text)
    # 16,000 or 32,000 steps; a hypernetwork's search computes every layer, with recomputation, and backward to masks
    # alone; the teacher runs once
    train, passes = config.train, 4 if config.backbone.gradient_checkpointing else 3
    forwards = (passes - 1) * train.search_steps + passes * 0.65 * train.steps + train.steps
    expected = forwards * train.batch_size * 2 * gmacs * 1e9 / (0.4 * 989e12) / 3600
    learned = hours(describe_run(load_config(name, ["search.method=hypernetwork"])))
    assert learned == pytest.approx(expected, rel=0.01)
    assert hours(text) == learned if config.search.method == "hypernetwork" else hours(text) < learned


def test_what_costs_hours():
    def text(*overrides):
        return describe_run(load_config("sd15", ["search.method=hypernetwork", *overrides]))

    whole = hours(text())
    assert hours(text("train.batch_size=128")) == pytest.approx(2 * whole, abs=0.2)
    assert hours(text("loss.output_kd=0", "loss.feature_kd=0")) < whole < hours(
        text("backbone.gradient_checkpointing=true"))
    assert hours(text("train.schedule=two_stage")) < whole
    assert "at 40% of an H100's 989 TFLOP/s (forward 1, backward 2, to masks 1, dense model 1)" in text()
