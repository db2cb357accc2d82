"""Steps that are chosen of a sampler's own: against schedulers that are given timesteps, and loops of our own."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from test_plan import CALLS, backbone_in, distance, make, measured_chain, told

from alter import InputError
from alter.backbones.stepping import can_skip_steps, keep_steps, only_steps, outputs_given
from alter.experts.plan import Planner

CHOSEN = (0, 2, 3, 7)


def sampled(scheduler):
    """Steps of a made-up model, from fixed noise."""
    latents = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        latents = scheduler.step(torch.tanh(latents + timestep / 500), timestep, latents).prev_sample
    return latents


def test_they_are_those_of_a_solver_that_is_given_the_timesteps():
    whole, given, kept = (DPMSolverMultistepScheduler(use_karras_sigmas=False) for _ in range(3))
    whole.set_timesteps(8)
    given.set_timesteps(timesteps=[int(whole.timesteps[step]) for step in CHOSEN])
    keep_steps(kept, CHOSEN, 8)
    kept.set_timesteps(8)
    assert kept.timesteps.tolist() == given.timesteps.tolist() and torch.allclose(kept.sigmas, given.sigmas)
    samples = sampled(kept)
    assert torch.equal(samples, sampled(given)) and not torch.allclose(samples, sampled(whole), atol=1e-3)


def test_they_are_those_of_a_flow_that_is_given_the_sigmas():
    whole, given, kept = (FlowMatchEulerDiscreteScheduler(shift=1.0) for _ in range(3))
    whole.set_timesteps(8)
    given.set_timesteps(sigmas=whole.sigmas[list(CHOSEN)].tolist())
    keep_steps(kept, CHOSEN, 8)
    kept.set_timesteps(8)
    assert torch.allclose(kept.sigmas, given.sigmas) and torch.allclose(sampled(kept), sampled(given))


@pytest.mark.parametrize(("name", "settings"), [
    ("DEISMultistepScheduler", {}), ("EulerDiscreteScheduler", {}), ("UniPCMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
], ids=str)
def test_other_classes(name, settings):
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(8)
    expected, whole = scheduler.timesteps[list(CHOSEN)].tolist(), scheduler.timesteps.tolist()
    sigmas = scheduler.sigmas[[*CHOSEN, -1]].tolist()
    signature = inspect.signature(scheduler.set_timesteps)
    with only_steps(scheduler, CHOSEN, 8):
        assert inspect.signature(scheduler.set_timesteps) == signature  # by which pipelines see what it takes
        scheduler.set_timesteps(8)
        assert scheduler.timesteps.tolist() == expected and scheduler.sigmas.tolist() == sigmas
        with only_steps(scheduler, None, 8):
            scheduler.set_timesteps(8)
            assert scheduler.timesteps.tolist() == whole
        scheduler.set_timesteps(8)
        with outputs_given(scheduler) as outputs:
            assert sampled(scheduler).isfinite().all() and len(outputs) == 4
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() == whole and "step" not in vars(scheduler)


def test_refusals():
    assert not can_skip_steps(DDIMScheduler())
    assert not can_skip_steps(EulerDiscreteScheduler(interpolation_type="log_linear"))
    assert not can_skip_steps(UniPCMultistepScheduler(solver_p=DPMSolverMultistepScheduler()))
    with pytest.raises(InputError, match="a DDIMScheduler .* cannot leave out steps: use one of"):
        keep_steps(DDIMScheduler(), CHOSEN, 8)
    scheduler = DPMSolverMultistepScheduler()
    keep_steps(scheduler, CHOSEN, 8)
    for steps in (5, 12):
        with pytest.raises(InputError, match=f"num_inference_steps={steps}: the steps were chosen of 8: ask for 8"):
            scheduler.set_timesteps(steps)


@pytest.mark.parametrize("kind", ["dit", "sd", "flux"])
def test_a_planner_takes_them_where_samples_come_nearer(kind):
    pipe = make(kind)
    experts = measured_chain(pipe)
    planner = Planner(experts, pipe, CALLS[kind], most=8, batch_size=2)
    spaced = Planner(experts, pipe, CALLS[kind], most=8, batch_size=2, own_steps=True)
    assert planner.drift == spaced.drift and not any(spaced.chosen.values())
    assert planner.chosen[8] is None and (kind == "flux" or any(planner.chosen.values()))
    for steps, taken in planner.chosen.items():
        if steps in planner.drift:  # drawn, so that it is known which are nearer
            nearer = planner.check(planner.fixed(steps, 1))
            assert nearer <= spaced.check(spaced.fixed(steps, 1)) == pytest.approx(planner.drift[steps])
        if taken is not None:
            assert len(taken) == steps and planner.visited[steps].tolist() == planner.visited[8][list(taken)].tolist()
    if not any(planner.chosen.values()):  # this flow's own steps are as good
        planner.chosen[5], planner.visited[5] = (0, 2, 4, 5, 7), planner.visited[8][[0, 2, 4, 5, 7]]
    steps = next(steps for steps, taken in planner.chosen.items() if taken is not None)
    plan = planner.fixed(steps, 1)
    assert plan.asked == 8 and plan.chosen == planner.chosen[steps]

    def draw():
        count = len(CALLS[kind].get("prompt", CALLS[kind].get("class_labels")))
        call = {name: list(value) if isinstance(value, list) else value for name, value in CALLS[kind].items()}
        with plan.stepping(pipe):
            return pipe(**call, num_inference_steps=plan.asked, output_type="latent",
                        generator=[torch.Generator().manual_seed(i) for i in range(count)]).images

    found = []
    seen = told(backbone_in(pipe), kind, lambda: found.append(draw()))
    assert np.allclose(np.minimum(seen[:: planner.forwards], 999), planner.visited[steps], atol=0.51)
    assert planner.check(plan) == pytest.approx(distance(found[0], planner.reference), rel=1e-3)
    assert "set_timesteps" not in vars(pipe.scheduler)
