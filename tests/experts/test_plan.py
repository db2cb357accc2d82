"""Steps and depth planned together, on tiny real pipelines: against loops, layers and displacements of our own."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
from conftest import make_dit, make_vae
from diffusers import (
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from helpers import chain, grey, known_cost
from pipelines import PROMPTS, SIZE, make_pipeline, randomise

from alter import ClassConditionalPipeline, InputError
from alter.experts.ladder import Rung
from alter.experts.plan import Planner, displacement
from alter.method.measured import Measured
from alter.method.planning import routes

PlannerAsSpaced = functools.partial(Planner, own_steps=True)  # of chosen timesteps see test_stepping.py
KINDS = ("dit", "sd", "flux")
CALLS = {
    "dit": {"class_labels": [3, 1, 4], "guidance_scale": 1.0},
    "sd": {"prompt": PROMPTS, "guidance_scale": 2.0, **SIZE},
    "flux": {"prompt": PROMPTS, "negative_prompt": ["", ""], "true_cfg_scale": 2.0, **SIZE},
}
MOST = 6


def make(kind, layers=4, scheduler=DPMSolverMultistepScheduler):
    if kind == "dit":
        model = make_dit(layers).eval().requires_grad_(False)
        randomise(model)
        pipe = ClassConditionalPipeline(model, scheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe
    pipe = make_pipeline(kind)
    if kind == "sd":
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    return pipe


def backbone_in(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def measured_chain(pipe, **changes):
    """Nested masks of which the deeper err more, most at low noise."""
    backbone = backbone_in(pipe)
    size = 8 if isinstance(pipe, ClassConditionalPipeline) else 16
    count = len(known_cost(backbone, size).sites)
    edges = tuple(range(0, 1001, 125))
    error_MB = 0.02 * np.arange(count)[:, None] ** 2 / np.linspace(1, 5, 8)
    response = {"latents": np.linspace(0.5, 2, 8), "pixels": np.full(8, 1e6)}
    return chain(backbone, size, measured=Measured(edges, error_MB, response, "any", MOST, 1.0, 8), **changes)


@functools.cache
def made(kind):
    pipe = make(kind)
    experts = measured_chain(pipe)
    return pipe, experts, PlannerAsSpaced(experts, pipe, CALLS[kind], batch_size=2)


def drawn(pipe, kind, steps):
    """Latents of the call, each image from a generator of its own."""
    call = {name: list(value) if isinstance(value, list) else value for name, value in CALLS[kind].items()}
    count = len(call.get("prompt", call.get("class_labels")))
    return pipe(**call, num_inference_steps=steps, output_type="latent",
                generator=[torch.Generator().manual_seed(i) for i in range(count)]).images


def distance(one, other):
    return ((one - other) ** 2).mean().item()


def told(backbone, kind, act):
    """The training timesteps at which `act` calls the backbone, in their order."""
    seen = []
    scale = 1000 if kind == "flux" else 1

    def note(module, args, kwargs):
        timestep = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])
        seen.append(scale * float(timestep.flatten()[0]))

    hook = backbone.register_forward_pre_hook(note, with_kwargs=True)
    act()
    hook.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_the_solver_is_measured_where_it_calls_the_backbone(kind):
    pipe, _, planner = made(kind)
    samples = {}
    for steps in (3, MOST, 4 * MOST):
        seen = told(backbone_in(pipe), kind, lambda steps=steps: samples.update({steps: drawn(pipe, kind, steps)}))
        assert len(seen) == steps * planner.forwards and planner.forwards == (2 if kind == "flux" else 1)
        if steps <= MOST:
            rows = np.minimum(seen[:: planner.forwards], 999)  # a flow begins at 1000
            assert np.allclose(rows, planner.visited[steps], atol=0.51)
    assert torch.allclose(planner.reference, samples[4 * MOST], atol=1e-4)
    for steps in (3, MOST):
        expected = distance(samples[steps], samples[4 * MOST])
        assert planner.drift[steps] == pytest.approx(expected, rel=1e-3, abs=1e-7) and expected > 0
        assert planner.fixed(steps, 1).discretisation == pytest.approx(planner.drift[steps])


def test_the_drift_is_that_of_a_loop_written_out():
    pipe, _, planner = made("dit")

    @torch.no_grad()
    def loop(steps):
        solver = DPMSolverMultistepScheduler()
        solver.set_timesteps(steps)
        latents = torch.cat([torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)])
        for t in solver.timesteps:
            pred = pipe.transformer(latents, timestep=t.expand(3), class_labels=torch.tensor([3, 1, 4])).sample
            latents = solver.step(pred, t, latents).prev_sample
        return latents

    for steps in (2, 4):
        assert planner.drift[steps] == pytest.approx(distance(loop(steps), loop(4 * MOST)), rel=1e-3)


def predicted(planner, steps, masks):
    """Every training timestep counts for the last step that is at it or above it, or for the first."""
    measured, visited = planner.experts.measured, planner.visited[steps]
    lost = 0.0
    for t in range(1000):
        step = max((n for n in range(steps) if visited[n] >= t), default=0)
        lost += measured.error_MB[masks[step], t // 125] * measured.response["latents"][t // 125] / 125
    return planner.fixed(steps, 1).discretisation + lost


def test_the_plan_is_the_best_of_all_choices():
    """Of two or three steps and four masks."""
    pipe = make("dit")
    planner = PlannerAsSpaced(measured_chain(pipe), pipe, CALLS["dit"], most=3)
    choices = [(planner.macs_M[list(masks)].sum(), predicted(planner, steps, masks), masks)
               for steps in (2, 3) for masks in itertools.product(range(4), repeat=steps)]
    for share in (0.2, 0.34, 0.5, 0.66, 0.71, 0.9, 1.0):
        budget = share * 3 * planner.experts.macs_total
        fitting = [(error, masks) for cost, error, masks in choices if cost <= budget * (1 + 1e-9)]
        if not fitting:
            with pytest.raises(InputError, match="macs=.*the cheapest option costs"):
                planner.plan(macs=budget)
            continue
        plan = planner.front.within(budget)
        assert plan.error == pytest.approx(min(fitting)[0])
        single = min(error for error, masks in fitting if len(set(masks)) == 1)
        assert planner.one_mask(budget).error == pytest.approx(single) and plan.error <= single * (1 + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_runs_its_masks_step_by_step(kind):
    """Its MACs are those of the layers that really run, its check the displacement of what is drawn."""
    pipe, experts, planner = made(kind)
    backbone, total = backbone_in(pipe), MOST * experts.macs_total
    for plan in (planner.plan(macs=0.3 * total), planner.plan(macs=0.6 * total),
                 planner.fixed(5, Rung(0.5, np.arange(1000) // 200 % 3))):
        assert plan.rung.steps == plan.steps
        assert plan.error == pytest.approx(predicted(planner, plan.steps, masks := plan.rung.expert_T[
            planner.visited[plan.steps]]))
        ran = []
        hooks = [backbone.register_forward_pre_hook(lambda *_, ran=ran: ran.append(set()))]
        hooks += [backbone.get_submodule(site).register_forward_hook(lambda *_, ran=ran, site=site: ran[-1].add(site))
                  for site in experts.sites]
        with experts.apply(pipe), experts.at(plan.rung):
            samples = drawn(pipe, kind, plan.steps)
        for hook in hooks:
            hook.remove()
        each = ran[:: planner.forwards]
        assert each == ran[planner.forwards - 1 :: planner.forwards]  # with guidance and without
        assert [{site for site, runs in zip(experts.sites, experts.mask_EL[mask], strict=True) if runs}
                for mask in masks] == each
        cost = dict(zip(experts.sites, experts.macs, strict=True))
        spent = sum(experts.macs_total - sum(cost[site] for site in experts.sites if site not in one) for one in each)
        assert plan.macs == pytest.approx(spent)
        assert plan.rung.keep_ratio_target == pytest.approx(spent / plan.steps / experts.macs_total)
        measured = planner.check(plan)
        assert measured == pytest.approx(distance(samples, planner.reference), rel=1e-3) and measured > 0
    assert len(set(masks)) == 3 and not hasattr(backbone, "_alter_applied")
    for share in np.linspace(0.25, 1, 7):
        assert planner.plan(macs=share * total).macs <= share * total * (1 + 1e-9)


def test_full_depth_is_in_the_front():
    _, experts, planner = made("dit")
    errors = []
    for steps in range(2, MOST + 1):
        dense = planner.fixed(steps, 1)
        assert dense.macs == pytest.approx(steps * experts.macs_total) and dense.error == dense.discretisation
        errors.append(planner.front.within(dense.macs).error)
        assert errors[-1] <= dense.error
        cheap = planner.plan(quality=steps)
        assert cheap.error <= dense.error * (1 + 1e-9) and cheap.macs <= dense.macs * 1.001
    assert errors == sorted(errors, reverse=True)
    rung = planner.fixed(4, 0.5)
    assert rung.error == pytest.approx(predicted(planner, 4, experts.pick(0.5).expert_T[planner.visited[4]]))


@pytest.mark.parametrize("away", [0.99, 1.01])
def test_of_a_quality_the_cheapest_unless_it_turns_out_worse_than_asked(monkeypatch, away):
    _, experts, planner = made("dit")
    monkeypatch.setattr(planner, "check", lambda plan: away * planner.drift[4])
    cheapest, plan = planner.front.cheapest(planner.fixed(4, 1).error), planner.plan(quality=4)
    assert cheapest.cost < 4 * experts.macs_total
    assert plan.macs == pytest.approx(cheapest.cost if away < 1 else 4 * experts.macs_total)


def test_planning_leaves_the_pipeline_as_it_was():
    pipe, experts, expected = made("dit")
    with experts.apply(pipe, 0.35), experts.at(0.65):
        before = drawn(pipe, "dit", 3)
        state = torch.get_rng_state()
        plan = experts.plan(pipe, CALLS["dit"], macs=2.5 * experts.macs_total, own_steps=True)
        assert torch.equal(before, drawn(pipe, "dit", 3)) and torch.equal(state, torch.get_rng_state())
    assert plan.rung.expert_T.tolist() == expected.plan(macs=2.5 * experts.macs_total).rung.expert_T.tolist()
    assert not hasattr(pipe.transformer, "_alter_applied")


def test_the_reference_can_be_another_model():
    pipe, experts, _ = made("dit")
    dense = make("dit", layers=2)
    planner = PlannerAsSpaced(experts, pipe, CALLS["dit"], most=2, dense=dense)
    assert torch.allclose(planner.reference, drawn(dense, "dit", 8), atol=1e-4)
    assert planner.drift[2] == pytest.approx(distance(drawn(dense, "dit", 2), drawn(dense, "dit", 8)), rel=1e-3)
    expected = distance(drawn(pipe, "dit", 2), drawn(dense, "dit", 8))
    assert planner.check(planner.fixed(2, 1)) == pytest.approx(expected, rel=1e-3)
    plan = planner.plan(macs=2 * experts.macs_total)  # it is nearer to itself than random layers to it
    assert plan.dense and plan.steps == 2 and planner.check(plan) == pytest.approx(planner.drift[2])
    assert planner.plan(quality=2).dense


def test_a_plan_that_turns_out_worse_is_not_taken():
    """Errors that were measured on other weights promise what the samples do not keep."""
    pipe, experts, _ = made("dit")
    promising = dataclasses.replace(experts.measured, error_MB=0 * experts.measured.error_MB)
    planner = PlannerAsSpaced(dataclasses.replace(experts, measured=promising), pipe, CALLS["dit"], most=MOST)
    taken = []
    for steps in (2, MOST):
        promised, control = planner.front.within(steps * experts.macs_total), planner.fixed(steps, 1)
        single = planner.one_mask(control.macs)
        assert promised.steps == MOST and promised.cost < control.macs
        plan = planner.plan(macs=control.macs)
        rung = Rung(0.5, routes(promised.mask_N, planner.visited[MOST], 1000), False, steps=MOST)
        assert planner.check(plan) == min(displacement(planner._draw(rung, MOST), planner.reference),
                                          planner.check(single), planner.check(control))
        taken.append(plan == control)
    assert taken == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_plan_is_the_nearest_of_three(kind):
    """Of every second, third and fourth step at full depth, by what each of them draws."""
    pipe, experts, planner = made(kind)
    for share in (0.6, 0.9):
        plan = planner.cached(share * MOST * experts.macs_total)
        masks = plan.rung.expert_T[planner.visited[plan.steps]]
        assert plan.rung.cached and plan.macs <= share * MOST * experts.macs_total * (1 + 1e-9)
        assert masks[0] == planner.full and len(set(masks)) == 2
        with experts.apply(pipe), experts.at(plan.rung), plan.stepping(pipe):
            moved = distance(drawn(pipe, kind, plan.steps), planner.reference)
        assert plan.error == planner.check(plan) == pytest.approx(moved, rel=1e-3)
        others = [planner.check(planner._plan(option)) for period in (2, 3, 4) if (
            option := planner.front.cached(share * MOST * experts.macs_total, period)) is not None]
        assert plan.error == min(others) and len(set(others)) > 1
    with pytest.raises(InputError, match="macs=1: two steps, one of them of the cheapest mask, cost"):
        planner.cached(1.0)


def _whole():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, in_channels=4, out_channels=4,
                                  num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=1000)
    pipe = DiTPipeline(model.eval().requires_grad_(False), make_vae(), DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_pipeline_that_decodes_in_any_case(guidance):
    """diffusers' DiTPipeline: its latents are those of one of ours with the same model."""
    whole = _whole()
    randomise(whole.transformer)
    ours = ClassConditionalPipeline(whole.transformer, whole.scheduler)
    ours.set_progress_bar_config(disable=True)
    experts = chain(whole.transformer, measured=Measured(
        (0, 1000), np.zeros((2, 1)), {"latents": np.ones(1)}, "any", 3, 1.0, 1), ladder=(), chosen=0.5)
    call = {"class_labels": [3, 1, 4], "guidance_scale": guidance}
    found, expected = (PlannerAsSpaced(experts, pipe, call, batch_size=2) for pipe in (whole, ours))
    assert found.reference.shape == (3, 4, 8, 8)
    torch.testing.assert_close(found.reference, expected.reference, rtol=1e-4, atol=1e-4)
    assert found.drift == pytest.approx(expected.drift, rel=1e-3)
    plan = found.plan(macs=2.5 * experts.macs_total)
    assert found.check(plan) == pytest.approx(expected.check(plan), rel=1e-3) and found.check(plan) > 0


def test_refusals():
    pipe, experts, planner = made("dit")
    call = CALLS["dit"]
    whole, painted = _whole(), StableDiffusionImg2ImgPipeline(**make("sd").components)
    painted.set_progress_bar_config(disable=True)
    picture = {**CALLS["sd"], "image": 2 * [grey(80, (32, 32))], "strength": 0.5}
    for name in SIZE:
        del picture[name]
    cases = [
        (lambda: Planner(dataclasses.replace(experts, measured=None), pipe, call), "no measured errors of masks"),
        (lambda: PlannerAsSpaced(experts.only(0.35), pipe, call), "keeps every layer"),
        (lambda: experts.plan(pipe, call, macs=1e9, quality=3), "give one of"),
        (lambda: planner.plan(), "give one of"),
        (lambda: planner.plan(macs=1.0), "macs=1: .*the cheapest option costs"),
        (lambda: planner.plan(quality=99), "quality=99: choose 2 to 6"),
        (lambda: planner.fixed(99), "choose 2 to 6"),
        (lambda: PlannerAsSpaced(experts, pipe, call, most=1), "most=1: give at least 2"),
        (lambda: PlannerAsSpaced(experts, make("dit", scheduler=HeunDiscreteScheduler), call), "one call a step"),
        (lambda: PlannerAsSpaced(experts, make("dit", scheduler=DDPMScheduler), call), "adds noise at its steps"),
        (lambda: PlannerAsSpaced(experts, pipe, {**call, "strange": 1}), "strange"),
        (lambda: PlannerAsSpaced(measured_chain(painted), painted, picture), "calls its backbone .* strength"),
        (lambda: PlannerAsSpaced(chain(whole.transformer, measured=Measured(
            (0, 1000), np.zeros((2, 1)), {"latents": np.ones(1)}, "any", 2, 1.0, 1), ladder=(), chosen=0.5), whole,
            {"class_labels": torch.tensor([1, 2, 3]), "guidance_scale": 1.0}), "gives no latents of these"),
    ]
    for act, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)


def test_two_backbones_are_refused():
    pipe = make_pipeline("wan22")
    experts = chain(pipe.transformer, 4, component="transformer", measured=Measured(
        (0, 1000), np.zeros((3, 1)), {"latents": np.ones(1)}, "any", 2, 1.0, 1))
    with pytest.raises(InputError, match="has two backbones"):
        PlannerAsSpaced(experts, pipe, {"prompt": ["a red circle"]})
