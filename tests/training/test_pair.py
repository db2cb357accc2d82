"""Wan 2.2: one of two transformers is trained, at the timesteps that are its own, and the other stays as it is."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from helpers import make_trainer, metrics_of
from pipelines import PROMPTS, SIZE, draw, make_pipeline
from test_trained_families import family_config as family_config

from alter import InputError, TemporalExperts, load_pipeline, train
from alter.backbones.conditioning import Conditioner
from alter.backbones.draws import draw as draw_batch
from alter.backbones.draws import generator
from alter.backbones.pretrained import share_of
from alter.training.measure import measure_sensitivity
from alter.training.probe import Probe
from alter.training.setup.describe import describe_run
from alter.training.setup.plan import check

OWN = {"transformer": range(875, 1000), "transformer_2": range(875)}  # of T = 1000 and a boundary_ratio of 0.875
PLACES = {"transformer": "experts.json", "transformer_2": "transformer_2/experts.json"}
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def pair_config(family_config, component, **changes):
    return family_config("wan22", **{"backbone": {"component": component}, **changes})


@pytest.mark.parametrize("component", OWN)
def test_a_run_trains_one_and_resumes_exactly(family_config, tmp_path, component):
    validate = {"validate": {"every": 5, "prompts": [PROMPTS[0]]}}
    run = train(pair_config(family_config, component, **validate)).run_dir
    final, before = run / "final", tmp_path / "wan22"
    for name in OWN:
        same = (final / name / _WEIGHTS).read_bytes() == (before / name / _WEIGHTS).read_bytes()
        assert same == (name != component), name
    assert {name for name, place in PLACES.items() if (final / place).is_file()} == {component}
    assert json.loads((final / PLACES[component]).read_text()).get("component", "transformer") == component
    assert set(TemporalExperts.from_pretrained(final).timesteps) <= set(OWN[component])
    assert [path.name for path in sorted((run / "samples").iterdir())] == [
        "step-000000-dense.png", "step-000005-experts.png", "step-000010-experts.png"]
    pipe = load_pipeline(final)
    assert [hasattr(getattr(pipe, name), "_alter_applied") for name in OWN] == [name == component for name in OWN]
    assert np.isfinite(draw(pipe)).all()

    lines, weights = metrics_of(run), (final / component / _WEIGHTS).read_bytes()
    shutil.rmtree(final)
    train(pair_config(family_config, component, output_dir=None, resume=str(run / "checkpoints/step-000004"),
                      **validate))
    assert metrics_of(run) == lines and (final / component / _WEIGHTS).read_bytes() == weights
    with pytest.raises(InputError, match="backbone.component='transformer_2' differs from 'transformer'|"
                                         "backbone.component='transformer' differs from 'transformer_2'"):
        other = next(name for name in OWN if name != component)
        train(pair_config(family_config, other, output_dir=None, resume=str(run / "checkpoints/step-000004")))


@pytest.mark.parametrize("component", OWN)
def test_only_its_own_timesteps_count(family_config, tmp_path, component):
    config = pair_config(family_config, component, budget={"sampling_steps": 30})
    trainer = make_trainer(config, tmp_path)
    parts, own = trainer.parts, OWN[component]
    drawn = draw_batch(parts.noising, 2000, 0.0, 0, 0).timesteps
    boundary = 0.875 * 1000
    assert ((drawn >= boundary) if component == "transformer" else (drawn < boundary)).all()
    pipe = WanPipeline.from_pretrained(config.backbone.pretrained)  # which backbone has which of the sampler's steps
    pipe.scheduler.set_timesteps(30)
    steps = [int(t) for t in pipe.scheduler.timesteps if (t >= boundary) == (component == "transformer")]
    assert sorted(parts.budget.timesteps) == sorted(steps)
    with torch.no_grad():
        router_TE = parts.hypernetwork().router_TE
    inside = np.isin(np.arange(1000), own)
    assert len(router_TE[inside].unique(dim=0)) == len(own)
    edge = min(steps) if component == "transformer" else max(steps)
    assert (router_TE[~inside] == router_TE[edge]).all()  # the other's have the expert of the nearest that counts
    weight_T = trainer.balance_T.numpy() / 1000
    by_step = np.array([weight_T[np.abs(np.arange(1000)[:, None] - np.sort(steps)).argmin(1) == k].sum()
                        for k in range(len(steps))])
    assert np.allclose(by_step, 1 / len(steps), atol=1e-6)
    table = measure_sensitivity(config, parts, bins=3, samples=4, trials=1)
    assert (table.edges[0], table.edges[-1], len(table.edges)) == (0, 1000, 4)
    assert set(table.edges[1:-1]) <= set(own) and np.isfinite(table.effect_LB).all()
    for _, timesteps, _, _ in Probe(config, parts, 4).noised(0, 1000):
        assert set(timesteps.long().tolist()) <= set(own)
    uniform = make_trainer(pair_config(family_config, component, budget={"sampler": "uniform"},
                                       experts={"router": "uniform"}), tmp_path).parts
    with torch.no_grad():
        experts_T = uniform.hypernetwork().router_TE.argmax(1).numpy()
    assert np.bincount(experts_T[own.start:own.stop]).tolist() == [len(part) for part in np.array_split(own, 3)]


def test_adapters_of_the_second_load_by_its_own_loader(family_config, tmp_path):
    changes = {"lora": {"rank": 2}, "optim": {"backbone_lr": 0.05}}
    final = train(pair_config(family_config, "transformer_2", **changes)).run_dir / "final"
    pipe, ours = WanPipeline.from_pretrained(tmp_path / "wan22"), load_pipeline(final)
    TemporalExperts.from_pretrained(final).remove(ours)
    for each in (pipe, ours):
        each.set_progress_bar_config(disable=True)
    dense = draw(pipe)
    pipe.load_lora_weights(final, load_into_transformer_2=True)
    assert np.array_equal(draw(pipe), draw(ours)) and not np.array_equal(dense, draw(ours))
    assert "load_into_transformer_2=True" in (final / "README.md").read_text()
    with pytest.raises(InputError, match="holds adapters of transformer_2, and the run trains transformer"):
        train(pair_config(family_config, "transformer", output_dir="other",
                          backbone={"pretrained": str(final), "component": "transformer"}))


def test_one_after_the_other(family_config):
    """The second run keeps the first one's experts and weights."""
    short = {"train": {"steps": 2, "search_steps": 1}}
    first = train(pair_config(family_config, "transformer", **short)).run_dir / "final"
    second = train(pair_config(family_config, "transformer_2", output_dir="second", **short, backbone={
        "pretrained": str(first), "component": "transformer_2"})).run_dir / "final"
    for name in ("experts.json", f"transformer/{_WEIGHTS}"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    pipe = load_pipeline(second)
    assert all(hasattr(getattr(pipe, name), "_alter_applied") for name in OWN)
    with pytest.raises(InputError, match="experts.pretrained.*are of transformer_2: set backbone.component=transf"):
        (second / "experts.json").unlink()
        check(pair_config(family_config, "transformer", experts={"pretrained": str(second)}), 1)


@pytest.mark.parametrize("component", OWN)
def test_images_are_those_of_the_whole_pipeline(tmp_path, component):
    pipe = make_pipeline("wan22", tmp_path)
    conditioner = Conditioner(tmp_path, "cpu", torch.float32, (5, 32, 32), component=component)
    found = conditioner.draw(getattr(pipe, component), PROMPTS, 3, 1.0, 0)
    for _ in range(2):  # nothing is left of the first
        expected = pipe(prompt=PROMPTS, **SIZE, num_frames=5, num_inference_steps=3, guidance_scale=1.0,
                        generator=[generator(0, i, 7) for i in range(2)], output_type="pt").frames
        torch.testing.assert_close(found, expected * 2 - 1)
        found = conditioner.draw(getattr(pipe, component), PROMPTS, 3, 1.0, 0)
    assert not any(parameter.numel() for name in OWN for parameter in getattr(conditioner.pipe, name).parameters())


def test_the_plan(family_config, tmp_path):
    said = describe_run(pair_config(family_config, "transformer_2"))
    assert "timesteps 0 to 874, those of transformer_2" in said
    assert "timesteps 875 to 999, those of transformer" in describe_run(pair_config(family_config, None))
    with pytest.raises(InputError, match="budget.sampling_steps=1: visits no timestep of the component"):
        check(pair_config(family_config, "transformer_2", budget={"sampling_steps": 1}), 1)
    with pytest.raises(InputError, match="has no unet/: change backbone.component=unet"):
        check(pair_config(family_config, "unet"), 1)
    with pytest.raises(InputError, match="flow.density='logit_normal' .* are those of transformer: choose another"):
        check(pair_config(family_config, None, flow={"density": "logit_normal", "logit_mean": -8.0}), 1)
    assert share_of(tmp_path / "wan22", "transformer_2") == (0.0, 0.875)
    index = tmp_path / "wan22/model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "boundary_ratio": None}))
    with pytest.raises(InputError, match="does not say which timesteps are whose") as caught:
        check(pair_config(family_config, "transformer_2"), 1)
    assert "\n" not in str(caught.value)
