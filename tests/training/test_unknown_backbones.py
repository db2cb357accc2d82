"""A backbone of a class that no test knows is checked on the run's data before it trains."""

import functools
from pathlib import Path

import pytest
from diffusers.models.attention import BasicTransformerBlock

import alter.training.probe
from alter import InputError, train
from alter.training.probe import check_blocks
from alter.training.setup.parts import build


@pytest.mark.parametrize("kind", ["dit", "sd"])
def test_blocks_that_cannot_be_skipped(small_config, monkeypatch, kind):
    config = small_config(kind)
    forward = BasicTransformerBlock.forward

    @functools.wraps(forward)
    def halved(*args, **kwargs):
        return forward(*args, **kwargs) / 2

    monkeypatch.setattr(alter.training.probe, "blocks_are_verified", lambda name: False)
    if kind == "dit":
        check_blocks(config, build(config))
    monkeypatch.setattr(BasicTransformerBlock, "forward", halved)
    with pytest.raises(InputError, match=r"transformer_blocks\.0, .* and \d+ more with zeros for weights") as error:
        train(config)
    assert "\n" not in str(error.value) and not Path(str(config.output_dir)).exists()


def test_known_classes_are_not_probed(small_config, monkeypatch):
    monkeypatch.setattr(alter.training.probe, "not_residual", None)
    config = small_config("dit")
    check_blocks(config, build(config))
