"""Images of a demo's run, which one process draws for all."""

import pytest
from accelerate import PartialState

import alter.common.process
from alter import InputError, train
from alter.training.demo_images import draw_run


def test_a_run_that_is_no_demo_is_refused_on_every_process(small_config, tmp_path, monkeypatch):
    run, state = train(small_config("unet")).run_dir, PartialState()
    sent = []

    def broadcast(objects):
        sent.extend(objects)
        return objects

    monkeypatch.setattr(alter.common.process, "broadcast_object_list", broadcast)
    with pytest.raises(InputError, match="not a demo"):
        draw_run(run, tmp_path / "drawn", state)
    monkeypatch.setattr(PartialState, "is_main_process", False)
    monkeypatch.setattr(alter.common.process, "broadcast_object_list", lambda objects: sent)
    with pytest.raises(InputError, match="not a demo"):
        draw_run(run, tmp_path / "drawn", state)
