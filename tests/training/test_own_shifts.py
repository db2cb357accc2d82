"""Pipelines that compute their shift by a formula of their own: a run asks them."""

import json

import pytest
from pipelines import draw, make_pipeline
from test_trained_families import family_config as family_config

from alter import InputError
from alter.backbones.pretrained import local_folder
from alter.training.setup.describe import describe_run
from alter.training.setup.plan import check, make_plan


def test_a_run_takes_the_shift_of_its_pipeline(family_config):
    config = family_config("flux2", budget={"sampling_steps": 6})
    pipe = make_pipeline("flux2")
    draw(pipe, num_inference_steps=6)
    plan = make_plan(config, local_folder(config.backbone.pretrained), None)
    assert plan.budget.timesteps.tolist() == pipe.scheduler.timesteps.round().clamp(max=999).int().tolist()
    sigma, even = pipe.scheduler.sigmas[2].item(), 1 - 2 / 6
    assert plan.noising.shift * even / (1 + (plan.noising.shift - 1) * even) == pytest.approx(sigma, rel=1e-5)
    assert f"shift {plan.noising.shift:.4g}" in describe_run(config)
    set_here = family_config("flux2", flow={"shift": 2.0}, budget={"sampler": "uniform"})
    plan = make_plan(set_here, local_folder(config.backbone.pretrained), None)
    assert plan.noising.shift == 2 and plan.budget.timesteps is None


def test_what_cannot_be_asked_is_refused_by_name(family_config, tmp_path):
    config = family_config("flux2")
    index = tmp_path / "flux2/model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "Flux2OfMinePipeline"}))
    with pytest.raises(InputError, match="a Flux2OfMinePipeline computes its shift by a formula of its own, and cannot "
                                         "be asked .*: set flow.shift, and budget.sampler=uniform") as caught:
        check(config, 1)
    assert "\n" not in str(caught.value)
    check(family_config("flux2", flow={"shift": 3.0}, budget={"sampler": "uniform"}), 1)


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("flux", {"backbone": {"channels_last": True}}, "backbone.channels_last=true: this backbone is given no images"),
    ("cogvideox", {"train": {"noise_offset": 0.1}, "data": {"frames": 5}},
     "train.noise_offset=0.1: shifts channels, and the latents of a CogVideoX")])
def test_what_other_latents_do_not_allow(family_config, name, changes, message):
    with pytest.raises(InputError, match=message):
        check(family_config(name, **changes), 1)
