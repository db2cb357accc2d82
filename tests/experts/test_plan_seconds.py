"""Plans for a budget of seconds."""

import dataclasses

import numpy as np
import pytest
from helpers import uneven_latency
from test_plan import CALLS, PlannerAsSpaced, made, make, measured_chain

import alter.experts.plan


def test_seconds_of_the_experts_latency():
    pipe = make("dit")
    latency = uneven_latency()
    experts = measured_chain(pipe, latency=latency)
    planner = PlannerAsSpaced(experts, pipe, CALLS["dit"], most=4)
    for budget in (1.5, 1.8, 2.4):
        plan = planner.plan(seconds=budget)
        masks = experts.mask_EL[plan.rung.expert_T[planner.visited[plan.steps]]]
        spent = sum(latency.seconds_total - sum(np.array(latency.seconds)[~mask_L]) for mask_L in masks)
        assert plan.seconds == pytest.approx(spent) and spent <= budget * (1 + 1e-9)
        assert plan.rung.keep_ratio_target == pytest.approx(spent / plan.steps)


@pytest.mark.parametrize(("kind", "batch", "forwards"), [("sd", 2, 1), ("flux", 1, 2)])
def test_seconds_are_measured_for_one_image_with_its_guidance(kind, batch, forwards, monkeypatch):
    pipe, experts, planner = made(kind)
    assert planner.plan(macs=1e99).seconds is None
    real, given = alter.experts.plan.measure_latency, []

    def fixed(backbone, latent_size, rows, inputs):
        given.append(rows)
        found = real(backbone, latent_size, rows, runs=1, inputs=inputs)
        share = np.array(experts.macs) / experts.macs_total
        return dataclasses.replace(found, seconds=tuple(0.1 * share), seconds_total=0.1)

    monkeypatch.setattr(alter.experts.plan, "measure_latency", fixed)
    planner = PlannerAsSpaced(experts, pipe, CALLS[kind], most=2)
    plan = planner.plan(seconds=0.17 * forwards)
    assert given == [batch] and 0 < plan.seconds <= 0.17 * forwards
    assert plan.seconds == pytest.approx(0.1 * forwards * plan.macs / experts.macs_total)
