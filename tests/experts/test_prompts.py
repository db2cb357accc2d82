"""Plans of what nobody named."""

import pytest
from pipelines import make_pipeline
from test_plan import make, measured_chain

from alter import InputError
from alter.experts.plan import Planner
from alter.experts.prompts import usual_call


def test_a_plan_without_conditions_is_that_of_the_usual_ones():
    pipe = make("dit")
    experts = measured_chain(pipe)
    labels = usual_call(pipe)["class_labels"]
    assert labels == sorted(labels) and set(labels) == set(range(pipe.transformer.config.num_embeds_ada_norm))
    told = Planner(experts, pipe, {"class_labels": labels}, most=3).plan(macs=2.5 * experts.macs_total)
    plan = experts.plan(pipe, macs=2.5 * experts.macs_total, most=3)
    assert plan.error == told.error and plan.rung.expert_T.tolist() == told.rung.expert_T.tolist()


def test_usual_prompts_are_ones_that_a_pipeline_takes():
    pipe = make_pipeline("sd")
    prompts = usual_call(pipe)["prompt"]
    assert len(prompts) == 24 and len(set(prompts)) == 8
    assert len(pipe(prompts[:2], num_inference_steps=1, height=32, width=32).images) == 2


def test_other_conditions_have_to_be_given():
    class Other:
        def __call__(self, image):
            """Draws from an image."""

    with pytest.raises(InputError, match="plan: Other takes no prompts: give `call`"):
        usual_call(Other())
