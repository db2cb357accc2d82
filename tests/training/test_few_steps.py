"""Few-step models: trained, and given experts, at the timesteps alone that their sampler visits."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from helpers import make_trainer
from test_trained_families import family_config as family_config

from alter import InputError, TemporalExperts, load_pipeline, train
from alter.backbones.draws import draw
from alter.backbones.noising import Flow
from alter.evaluation.classifier import errors_by_timestep
from alter.training.setup.plan import check

ALONE = {"loss": {"denoise": 0.0, "output_kd": 1.0, "feature_kd": 0.0}, "budget": {"sampling_steps": 4},
         "experts": {"count": 4}}


@pytest.fixture
def schnell(family_config):
    """A factory: a tiny FLUX that is told no guidance and samples in four steps."""
    def make(**changes):
        config = family_config("flux", **ALONE, **changes)
        pipe = FluxPipeline.from_pretrained(config.backbone.pretrained)
        if pipe.transformer.config.guidance_embeds:
            torch.manual_seed(0)
            transformer = type(pipe.transformer).from_config({**pipe.transformer.config, "guidance_embeds": False})
            transformer.save_pretrained(f"{config.backbone.pretrained}/transformer")
            FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(f"{config.backbone.pretrained}/scheduler")
        return config

    return make


@pytest.mark.parametrize("router", ["learned", "smooth", "ordered"])
def test_only_visited_timesteps_are_drawn_and_every_other_has_the_expert_of_the_nearest(schnell, tmp_path, router):
    config = schnell(train={"timesteps": "sampled"})
    config = dataclasses.replace(config, experts=dataclasses.replace(config.experts, router=router))
    trainer = make_trainer(config, tmp_path)
    visited = torch.tensor([1000.0, 750.0, 500.0, 250.0])  # of FLUX.1-schnell in four steps
    drawn = draw(trainer.parts.noising, 4000, 0.0, 0, 0)
    counts = (drawn.timesteps[:, None] == visited).sum(0)
    assert counts.sum() == 4000 and (counts > 900).all()
    assert set(drawn.rows.tolist()) == {999, 750, 500, 250}
    assert torch.equal(trainer.balance_T.nonzero().squeeze(1), torch.arange(1000)) and trainer.weight_T is None
    nearest = np.array([250, 500, 750, 999])[np.abs(np.arange(1000)[:, None] - [250, 500, 750, 999]).argmin(1)]
    with torch.no_grad():
        router_TE = trainer.parts.hypernetwork().router_TE
    assert torch.equal(router_TE, router_TE[nearest])
    assert len(router_TE.unique(dim=0)) == 4
    assert router != "ordered" or router_TE.argmax(1)[[250, 500, 750, 999]].tolist() == [0, 1, 2, 3]
    (raw,), drawn = trainer.micro_batches(1), draw(trainer.parts.noising, 4, 0.0, 0, 0)
    batch, latents = trainer.prepare_batch({**raw}, drawn), trainer.parts.latents(raw, drawn.posterior)
    sigma = (batch.timesteps / 1000).view(-1, 1, 1)  # noised as usual
    assert torch.allclose(batch.noisy_latents - sigma * batch.target, latents, atol=1e-4)


def test_output_distillation_alone(schnell):
    run = train(schnell(train={"timesteps": "sampled"}, lora={"rank": 2})).run_dir
    experts = TemporalExperts.from_pretrained(run / "final")
    assert list(experts.timesteps) == [999, 750, 500, 250]
    assert len({expert for expert in experts.expert_T[list(experts.timesteps)]}) == len(experts.used)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["train/perf"] == pytest.approx(line["train/output_kd"]) for line in lines)
    pipe = load_pipeline(run / "final")
    images = pipe("a red circle", height=32, width=32, num_inference_steps=4, output_type="np").images
    assert np.isfinite(images).all()


def test_noise_by_betas_needs_a_sampler(small_config, tmp_path):
    changes = {"train": {"timesteps": "sampled"}}
    with pytest.raises(InputError, match="train.timesteps=sampled: needs the sampler .* set budget.sampler"):
        check(small_config("dit", **changes), 1)
    changes["budget"] = {"sampler": "DDIMScheduler", "sampling_steps": 2}
    trainer = make_trainer(small_config("dit", **changes), tmp_path)
    rows = draw(trainer.parts.noising, 100, 0.0, 0, 0).timesteps
    assert rows.dtype == torch.int64 and set(rows.tolist()) == {0, 500}


def test_errors_are_measured_where_it_is_trained():
    visited, seen = (999.0, 750.0, 500.0, 250.0), []

    def model(noisy, timesteps, conditioning):
        seen.append(float(timesteps[0]))
        return noisy

    errors = errors_by_timestep(model, model, Flow(1000, visited=visited), torch.randn(2, 4), {}, 0)
    assert sorted(set(seen)) == sorted(visited) and errors.shape == (2, 4)
