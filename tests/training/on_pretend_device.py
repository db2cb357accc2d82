"""Whole runs on the pretend device, in a process of their own, which test_pretend_device.py starts."""

import math

import conftest
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from pretend_device import DEVICE, WAITS, pretend_device

import alter.training.checkpoint
from alter.training.run import train
from alter.training.trainer import Trainer

IMAGES = {"dit": {"every": 2, "labels": [1, 2]}, "sd": {"every": 2, "prompts": ["a red circle"]}, "unet": {}}


def small_unet(size=16):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=size, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4)


@pytest.fixture(autouse=True)
def on_the_device(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conftest, "make_unet", small_unet)
    monkeypatch.setattr(Accelerator, "device", property(lambda accelerator: DEVICE))
    storable = alter.training.checkpoint._storable  # which asks for addresses
    monkeypatch.setattr(alter.training.checkpoint, "_storable",
                        lambda group: storable({name: tensor.cpu() for name, tensor in group.items()}))
    with pretend_device():
        yield


@pytest.fixture
def waits(monkeypatch):
    """What made the host wait in each iteration, by its step; validation images and checkpoints are not counted."""
    found = {}
    iteration = Trainer.iteration

    def counted(trainer, micro_batches):
        before = WAITS.copy()
        metrics = iteration(trainer, micro_batches)
        found[trainer.step] = WAITS - before
        return metrics

    monkeypatch.setattr(Trainer, "iteration", counted)
    return found


def config_of(small_config, kind, **changes):
    return small_config(kind, **conftest.merge({
        "train": {"steps": 5, "search_steps": 2, "ema_decay": 0.9}, "checkpoint": {"every": 4}, "log": {"every": 100},
        "validate": IMAGES[kind]}, changes))


ELASTIC = {"search": {"method": "elastic", "samples": 4, "bins": 4}, "budget": {"keep_ratio": [0.5, 0.8]}}


@pytest.mark.parametrize("kind, changes", [("dit", {}), ("dit", ELASTIC), ("unet", {}), ("sd", {})],
                         ids=["dit", "dit-elastic", "unet", "sd"])
def test_a_run_and_its_resumption(small_config, tmp_path, waits, kind, changes):
    """Search, freeze, tuning, validation images, checkpoint and final measurement meet no tensor of the host."""
    summary = train(config_of(small_config, kind, **changes)).summary
    assert math.isfinite(summary["output_error"])
    assert len(list(tmp_path.glob("run/samples/*.png"))) == (3 if IMAGES[kind] else 0)
    if changes:
        del waits[1]  # T_end, where masks are measured
    places = {place.partition(":")[0] for found in waits.values() for place in found.uploads}
    assert places == ({"backbones/conditioning.py"} if kind == "sd" else set())  # a pipeline's own token ids
    for step, found in waits.items():
        # The losses of step 3 were read for the checkpoint; an elastic search has none before the first step.
        nothing_to_read = step == 4 or bool(changes) and step == 0
        places = [place.partition(":")[0] for place in found.reads.elements()]
        assert places == ([] if nothing_to_read else ["training/readout.py"]), step
    resumed = train(config_of(small_config, kind, output_dir=None, resume="run/checkpoints/step-000004",
                              **changes)).summary
    assert resumed["output_error"] == summary["output_error"]
