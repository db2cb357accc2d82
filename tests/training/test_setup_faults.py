"""Several faults of one configuration are told at once, each in its line."""

import shutil

import diffusers
import pytest
from conftest import make_dit, make_vae, save_latents, save_pipeline
from zoo import ZOO

from alter import InputError
from alter.data.shapes import write_shapes
from alter.training.setup.describe import describe_run
from alter.training.setup.plan import check


def faults(function, *arguments):
    with pytest.raises(InputError) as caught:
        function(*arguments)
    return str(caught.value).splitlines()


def test_machine_data_backbone_and_validation_at_once(small_config, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = small_config("unet", train={"mixed_precision": "fp16"}, validate={"every": 1, "labels": [1]},
                          budget={"keep_ratio": 0.01}, data={"resolution": 12})
    said = faults(check, config, 3)
    for beginning in ("train.batch_size=8 cannot be shared", "train.mixed_precision='fp16'", "validate.every=1",
                      "data.path=", "budget.keep_ratio=0.01 is below"):
        assert sum(line.startswith(beginning) for line in said) == 1, (beginning, said)
    assert len(said) == 5
    said = faults(describe_run, config, 3)  # which needs neither the data nor the machine of the run
    assert len(said) == 3 and not any(line.startswith(("data.path=", "train.mixed_precision")) for line in said)


def test_a_missing_folder_does_not_hide_what_the_backbone_lacks(small_config, tmp_path):
    config = small_config("dit", data={"source": "latents", "path": str(tmp_path / "nowhere")})
    (tmp_path / "dit-pretrained/scheduler/scheduler_config.json").unlink()
    said = faults(check, config, 1)
    assert len(said) == 2 and "nowhere" in said[0] and "has no scheduler/" in said[1]


def test_one_fault_is_one_line(small_config):
    assert len(faults(check, small_config("dit", budget={"keep_ratio": 0.01}), 1)) == 1


def test_captions_for_a_dit(small_config, tmp_path):
    write_shapes(tmp_path / "shapes", 24, 0)
    save_pipeline(tmp_path / "dit-pretrained", make_dit(channels=4))
    make_vae().save_pretrained(tmp_path / "dit-pretrained/vae")
    config = small_config("dit", data={"source": "image_folder", "path": str(tmp_path / "shapes"), "resolution": 16})
    (said,) = faults(check, config, 1)
    assert "conditioned on class labels, which this data does not have: give images in one folder per class" in said


def test_both_sizes_of_latents_and_dit_are_named(small_config, tmp_path):
    save_latents(tmp_path / "wide", (1, 16, 16))
    (said,) = faults(check, small_config("dit", data={"source": "latents", "path": str(tmp_path / "wide"),
                                                       "resolution": 16}), 1)
    assert said.startswith("data.resolution=16: gives latents of 16x16, and this DiT was made for 8x8")


@pytest.mark.parametrize("name", ["CogView4Transformer2DModel", "GlmImageTransformer2DModel",
                                  "HiDreamImageTransformer2DModel"])
def test_backbones_that_are_counted_and_not_trained(small_config, tmp_path, name):
    config = small_config("sd")
    shutil.rmtree(tmp_path / "sd-pretrained/unet")
    getattr(diffusers, name)(**ZOO[name].config).save_config(tmp_path / "sd-pretrained/transformer")
    (said,) = [line for line in faults(check, config, 1) if name in line]
    assert "is not trained yet, though experts apply to it: " in said
