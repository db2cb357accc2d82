"""The code of a model card runs, on a run of each kind."""

import json
import re

import numpy as np
import pytest
from conftest import make_dit, make_unet, make_vae, save_stable_diffusion
from diffusers import DDPMScheduler
from helpers import chain, experts_for

from alter import ClassConditionalPipeline
from alter.common.config import BackboneConfig, Config, DataConfig
from alter.evaluation.report.card import model_card
from alter.evaluation.report.words import achieved
from alter.experts.load import pipeline_class


def save_by_class(folder, vae=None, channels=1):
    model = make_dit(channels=channels)
    ClassConditionalPipeline(model, DDPMScheduler(clip_sample=False), vae).save_pretrained(folder)
    experts_for(model, 8).save_pretrained(folder)


def save_as_dit_pipeline(folder):
    """As diffusers would name a DiT of ten classes that has a VAE."""
    save_by_class(folder, make_vae(), channels=4)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "DiTPipeline"}))


def save_sd(folder):
    save_stable_diffusion(folder)
    experts_for(make_unet(), 16).save_pretrained(folder)


@pytest.mark.parametrize("save, name", [
    (save_by_class, "ClassConditionalPipeline"), (save_as_dit_pipeline, "ClassConditionalPipeline"),
    (save_sd, "StableDiffusionPipeline"),
])
def test_the_printed_code_runs(tmp_path, save, name):
    save(tmp_path / "final")
    assert pipeline_class(tmp_path / "final") == name
    config = Config(backbone=BackboneConfig(pretrained=str(tmp_path)), data=DataConfig(path="unused"))
    text = model_card(config, experts_for(make_dit(), 8), {}, name, None)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    found = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "final")), found)  # noqa: S102
    assert type(found["pipe"]).__name__ == name
    backbone = found["pipe"].unet if name == "StableDiffusionPipeline" else found["pipe"].transformer
    assert hasattr(backbone, "_alter_applied")
    if name == "ClassConditionalPipeline":
        assert len(found["images"]) == 3 and np.asarray(found["images"][0]).std() > 0


def test_a_ladder_is_told():
    config = Config(backbone=BackboneConfig(pretrained="somewhere"), data=DataConfig(path="unused"))
    experts = chain(make_dit(layers=6))
    text = model_card(config, experts, achieved(experts), "DiTPipeline", None)
    assert "turned into 2 temporal experts." in text and "The same weights serve 3 budgets: `experts.apply" in text
    assert all(line in text for line in experts.table().splitlines()) and "2, 3 more in other rungs, 1 unused" in text
    assert "budgets" not in model_card(config, experts.only(), {}, "DiTPipeline", None)
