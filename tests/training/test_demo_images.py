"""A demo's data, and images of its run, which one process draws for all."""

import pytest
import torch
from accelerate import PartialState

import alter.common.process
from alter import InputError, train
from alter.common.load import load_config
from alter.data.open import open_source
from alter.training.demo import make_demo
from alter.training.demo_images import demo_reference, draw_run


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


@pytest.mark.parametrize("name, shape, images", [
    ("ablation_glyphs", (1, 32, 32), 800), ("ablation_dit", (3, 16, 16), 40),
])
def test_the_demos_of_drawn_latents(tmp_path, monkeypatch, name, shape, images):
    monkeypatch.chdir(tmp_path)
    config = load_config(name, ["demo.images=40", "demo.steps=1", "demo.batch_size=2", "data.holdout=4",
                                "evaluate.samples=100"])
    make_demo(config, torch.device("cpu"))
    source = open_source(config)
    trained = torch.stack([source[0, i]["latents"] for i in range(len(source))])
    assert trained.shape == (40, *shape)
    reference = demo_reference(config, source)
    assert reference.images.shape == (images, *shape) and reference.targets.shape == (images,)
    classes = len(reference.targets.unique())
    assert reference.asked.tolist() == [i % classes for i in range(100)]
    if name == "ablation_glyphs":
        assert classes == 10
        drawn, others = ({image.numpy().tobytes() for image in some} for some in (trained, reference.images))
        assert len(others) == 800 and not drawn & others


def test_a_demo_that_draws_nothing_needs_data(tmp_path):
    config = load_config("ablation_dit", ["demo.model=demo/dit-digits", f"data.path={tmp_path / 'absent'}",
                                          f"backbone.pretrained={tmp_path / 'teacher'}"])
    with pytest.raises(InputError, match="demo.model='demo/dit-digits' draws nothing"):
        make_demo(config, torch.device("cpu"))


def test_an_ablation_uses_its_demos_teacher():
    demo, ablation = map(load_config, ("demo_sd", "ablation_sd"))
    assert demo.demo == ablation.demo and demo.data == ablation.data and demo.flow == ablation.flow
    assert demo.backbone.pretrained == ablation.backbone.pretrained
