"""Cached rungs: a skipped layer adds what it added when it last ran. Against layers whose `forward` does so by hand."""

import contextlib
import contextvars
import copy
import dataclasses
import inspect
import threading
from collections import defaultdict

import numpy as np
import pytest
import torch
from by_hand import Skip, counting, make_experts
from conftest import make_dit
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    StableDiffusionImg2ImgPipeline,
)
from diffusers.hooks import apply_first_block_cache
from pipelines import PIPELINES, PROMPTS, backbones, draw, make_pipeline

from alter import ClassConditionalPipeline, InputError, TemporalExperts
from alter.experts.ladder import Rung
from alter.experts.plan import Planner
from alter.experts.trajectory import followed, following
from alter.method.measured import Measured
from alter.method.planning import routes

STEPS = 5
GUIDED = {"flux": {"negative_prompt": ["", ""], "true_cfg_scale": 2.0}, "sd": {"guidance_scale": 2.0},
          "sd3": {"guidance_scale": 2.0}, "wan": {"guidance_scale": 2.0},
          "qwen": {"negative_prompt": ["", ""], "true_cfg_scale": 2.0}}


def visited(pipe):
    draw(pipe, num_inference_steps=STEPS)
    rows = pipe.scheduler.timesteps.double().round().long().clip(0, 999).unique(sorted=False)
    return np.array(sorted(rows.tolist(), reverse=True))


def cached(experts, at, period=2):
    """Every layer at the first of every `period` steps; at the others every second."""
    second_L = np.arange(len(experts.sites)) % 2 == 0
    mask_EL = np.stack([np.ones_like(second_L), second_L])
    rung = Rung(0.6, routes((np.arange(len(at)) % period > 0).astype(int), at, 1000), cached=True)
    return dataclasses.replace(experts, mask_EL=mask_EL, ladder=(rung,), chosen=0)


def cache_by_hand(backbone, experts, whole):
    """Let the layers that the second expert skips add, unless `whole()`, what they added in the same forward of the
    step before. Returns a function that begins a forward: told the place of it in its step."""
    place, added = [0], defaultdict(dict)

    def replace(layer, name):
        given, forward = Skip(layer), layer.forward

        def instead(*args, **kwargs):
            around = given(*args, **kwargs)
            several = isinstance(around, tuple)
            if whole():
                output = forward(*args, **kwargs)
                pairs = zip(output, around, strict=True) if several else [(output, around)]
                added[place[0]][name] = [None if one is None else one - other for one, other in pairs]
                return output
            streams = [stream if more is None else stream + more for stream, more in
                       zip(around if several else [around], added[place[0]][name], strict=True)]
            return tuple(streams) if several else streams[0]

        layer.forward = instead

    for name, runs in zip(experts.sites, experts.mask_EL[1], strict=True):
        if not runs:
            replace(backbone.get_submodule(name), name)
    return lambda forward: place.__setitem__(0, forward)


def drawn_by_hand(pipe, component, experts, at, forwards, **arguments):
    backbone, calls, step = getattr(pipe, component), [0], [0]
    begin = cache_by_hand(backbone, experts, lambda: step[0] % 2 == 0)

    def count(*_):
        step[0], forward = divmod(calls[0], forwards)
        begin(forward)
        calls[0] += 1

    backbone.register_forward_pre_hook(count)
    images = draw(pipe, num_inference_steps=STEPS, **arguments)
    assert calls[0] == forwards * len(at)
    return images


def draw_cached(pipe, experts, **arguments):
    with experts.following(pipe):
        return draw(pipe, num_inference_steps=STEPS, **arguments)


@pytest.mark.parametrize(("name", "guided"), [
    *((name, False) for name in PIPELINES if name != "wan22"), *((name, True) for name in GUIDED)])
def test_images_of_every_family(name, guided):
    arguments = {"prompts": PROMPTS, **GUIDED[name]} if guided else {}
    pipe = make_pipeline(name)
    (component, backbone), = backbones(pipe).items()
    at = visited(pipe)
    experts = cached(make_experts(backbone), at)
    with experts.apply(pipe), counting(backbone, ["", *experts.sites]) as counts:
        drawn = draw_cached(pipe, experts, **arguments)
    forwards, left = divmod(counts[""], STEPS)
    assert left == 0 and (not guided or forwards == (2 if name in ("flux", "wan", "qwen") else 1))
    whole = 3 * forwards  # steps 0, 2 and 4
    assert all(counts[site] == (STEPS * forwards if runs else whole)
               for site, runs in zip(experts.sites, experts.mask_EL[1], strict=True))
    assert np.array_equal(drawn, drawn_by_hand(make_pipeline(name), component, experts, at, forwards, **arguments))
    rung = dataclasses.replace(experts.rung, cached=False)
    with dataclasses.replace(experts, ladder=(rung,)).apply(pipe):
        assert np.abs(drawn - draw(pipe, num_inference_steps=STEPS, **arguments)).max() > 1e-4


@pytest.fixture
def sd():
    pipe = make_pipeline("sd")
    return pipe, cached(make_experts(pipe.unet), visited(pipe))


def test_the_file_holds_it(sd, tmp_path):
    pipe, experts = sd
    experts.save_pretrained(tmp_path)
    loaded = TemporalExperts.from_pretrained(tmp_path)
    assert loaded.same(experts) and loaded.rung.cached and "cached" in loaded.table()
    assert not loaded.same(dataclasses.replace(experts, ladder=(dataclasses.replace(experts.rung, cached=False),)))
    assert loaded.only(0.6).rung.cached
    text = (tmp_path / "experts.json").read_text()
    (tmp_path / "experts.json").write_text(text.replace('"cached": true', '"cached": 1'))
    with pytest.raises(InputError, match=r"ladder\[0\]: cached: expected true or false, found 1"):
        TemporalExperts.from_pretrained(tmp_path)


def test_a_call_that_was_stopped_leaves_nothing_to_the_next(sd):
    """Not even to one that begins at a lower timestep, as image to image does."""
    pipe, experts = sd
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    other = StableDiffusionImg2ImgPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)

    def edited():
        return draw_cached(other, experts, image=picture, strength=0.6)

    def stop(pipe, step, *_):
        raise _Stop

    experts.apply(pipe)
    with experts.following(pipe):
        expected = [draw(pipe, num_inference_steps=STEPS), edited()]
        for again in range(2):
            with pytest.raises(_Stop):
                draw(pipe, num_inference_steps=STEPS, prompts="another", callback_on_step_end=stop)
            assert np.array_equal(draw(pipe, num_inference_steps=STEPS) if again else edited(), expected[1 - again])


class _Stop(Exception):
    pass


def test_threads_share_a_backbone_and_no_cache(sd):
    """Each draws a step when the other has."""
    pipe, experts = sd
    prompts, found, turn = ["a red circle", "another"], {}, threading.Barrier(2, timeout=60)
    experts.apply(pipe)
    expected = [draw_cached(pipe, experts, prompts=prompt) for prompt in prompts]

    def wait(pipe, step, timestep, kept):
        turn.wait()
        return kept

    own = {name: copy.deepcopy(getattr(pipe, name)) for name in ("scheduler", "tokenizer")}  # neither knows threads
    other = type(pipe)(**{**pipe.components, **own})
    other.set_progress_bar_config(disable=True)

    def work(which):
        found[which] = draw_cached((other, pipe)[which], experts, prompts=prompts[which], callback_on_step_end=wait)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(np.array_equal(found[which], expected[which]) for which in range(2))


def test_nothing_is_kept_after_the_last_step(sd):
    pipe, experts = sd
    experts.apply(pipe)
    seen = []
    with experts.following(pipe):
        draw(pipe, num_inference_steps=STEPS, callback_on_step_end=lambda pipe, step, timestep, kept: (
            seen.append(len(followed().of)), kept)[1])
    assert seen == [1] * (STEPS - 1) + [0]


def test_layers_that_are_skipped_at_the_first_step_run_there_and_those_of_no_expert_never(sd):
    pipe, experts = sd
    turned = dataclasses.replace(experts, mask_EL=experts.mask_EL[::-1].copy())
    turned.mask_EL[:, 0] = False
    with turned.apply(pipe), counting(pipe.unet, turned.sites) as counts:
        draw_cached(pipe, turned)
    for number, site in enumerate(turned.sites):  # steps 0, 2 and 4 have the small expert, but for what none has run
        assert counts[site] == (0 if number == 0 else STEPS if turned.mask_EL[0, number] else 3)


def test_a_compiled_pipeline_draws_the_same(sd):
    pipe, experts = sd
    with experts.apply(pipe):
        expected = draw_cached(pipe, experts)
    experts.compile(pipe, backend="eager")
    assert np.abs(draw_cached(pipe, experts) - expected).max() < 1e-6


def test_schedulers_that_are_copied_or_told_the_timestep_elsewhere():
    """CogVideoX's DPM takes it as the third argument. A copy of a scheduler that is followed steps for itself."""
    pipe = make_pipeline("cogvideox")
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    experts = cached(make_experts(pipe.transformer), visited(pipe))
    with experts.apply(pipe), counting(pipe.transformer, experts.sites) as counts:
        draw_cached(pipe, experts)
    assert counts[experts.sites[1]] * STEPS == counts[experts.sites[0]] * 3
    with experts.following(pipe):
        other = copy.deepcopy(pipe.scheduler)
        other.set_timesteps(7)
        assert len(other.timesteps) == 7 and len(pipe.scheduler.timesteps) == STEPS
    ddim = DDIMScheduler()
    with following(ddim):  # pipelines look for what `step` takes
        assert inspect.signature(ddim.step) == inspect.signature(DDIMScheduler().step)


def test_plans_are_made_where_a_cached_rung_is_applied(sd):
    pipe, experts = sd
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    measured = Measured((0, 1000), np.array([[0.0], [0.1]]), {"latents": np.ones(1)}, "any", 3, 1.0, 1)
    experts = dataclasses.replace(experts, measured=measured)
    experts.apply(pipe)
    planner = Planner(experts, pipe, {"prompt": PROMPTS, "guidance_scale": 1.0, "height": 32, "width": 32})
    assert planner.check(planner.cached(2.9 * experts.macs_total)) > 0


def test_two_backbones_in_turn():
    """The second one's layers run at its own first step."""
    pipe = make_pipeline("wan22")
    at = visited(pipe)
    both = [cached(make_experts(backbone, None if name == "transformer" else name), at)
            for name, backbone in backbones(pipe).items()]
    for experts in both:
        experts.apply(pipe)
    with counting(pipe.transformer, both[0].sites) as first, counting(pipe.transformer_2, both[1].sites) as second:
        draw_cached(pipe, both[0])
    whole = both[0].sites[0], both[1].sites[0]
    steps = [first[whole[0]], second[whole[1]]]
    assert min(steps) > 0 and sum(steps) % STEPS == 0
    forwards = sum(steps) // STEPS
    begun = steps[0] // forwards  # the step at which the second one begins
    full = {step for step in range(STEPS) if step % 2 == 0 or step == begun}
    assert first[both[0].sites[1]] == forwards * len(full & {*range(begun)})
    assert second[both[1].sites[1]] == forwards * len(full & {*range(begun, STEPS)})


def test_what_cannot_be_served_is_refused(sd):
    pipe, experts = sd
    experts.apply(pipe)
    with pytest.raises(InputError, match="whose steps these are is not known: call the pipeline inside"):
        draw(pipe)

    def end_guidance(pipe, step, timestep, kept):
        if step < 2:
            return kept
        pipe._guidance_scale = 1.0
        return {**kept, "prompt_embeds": kept["prompt_embeds"][-1:]}

    with pytest.raises(InputError, match="a cached rung needs the same samples at every step"):
        draw_cached(pipe, experts, guidance_scale=2.0, callback_on_step_end=end_guidance,
                    callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    full = dataclasses.replace(experts.rung, cached=True, expert_T=0 * experts.expert_T)
    with experts.following(pipe), pytest.raises(InputError, match="the rung changed within a trajectory"):
        with contextlib.ExitStack() as stack:
            draw(pipe, num_inference_steps=STEPS, callback_on_step_end=lambda pipe, step, timestep, kept: (
                stack.enter_context(experts.at(full)), kept)[1])

    scheduler = DPMSolverMultistepScheduler()
    pipe = ClassConditionalPipeline(make_dit(4).eval(), scheduler)
    experts = cached(make_experts(pipe.transformer), np.array([999, 500, 100]))
    experts.apply(pipe)
    latents, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 1])

    def forward(*timestep):
        count = len(timestep)
        with torch.no_grad():
            return pipe.transformer(latents[:count], torch.tensor(timestep), labels[:count]).sample

    def steps(*forwards):
        """So many forwards at each of the first timesteps."""
        scheduler.set_timesteps(4)
        for timestep, many in zip(scheduler.timesteps, forwards, strict=False):
            answers = [forward(int(timestep)) for _ in range(many)]
            scheduler.step(answers[0], timestep, latents[:1])
        return answers[-1]

    with experts.following(pipe):
        with pytest.raises(InputError, match="timesteps of several"):
            forward(999, 500)
        with pytest.raises(InputError, match="called 2 times in a step and 1 times in the one before"):
            steps(1, 2)
        with pytest.raises(InputError, match="called 1 times in a step and 2 times in the one before"):
            steps(2, 1)
        with pytest.raises(InputError, match="timestep 999, which is not its next"):  # of another part of a panorama
            steps(1)
            forward(999)
            scheduler.step(latents[:1], torch.tensor(999), latents[:1])
        scheduler.set_timesteps(4)
        with pytest.raises(InputError, match="at timesteps 999 and 500 without a step of the scheduler"):
            [forward(timestep) for timestep in (999, 500)]
        assert torch.equal(steps(1, 1), steps(1, 1))
        with pytest.raises(InputError, match="another thread or task follows this DPMSolver"):
            contextvars.Context().run(experts.following(pipe).__enter__)
    assert not {"step", "set_timesteps"} & vars(scheduler).keys()


@pytest.mark.parametrize("put_on", [
    lambda model: model.enable_cache(FirstBlockCacheConfig(threshold=0.5)),
    lambda model: apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.5))])
def test_a_cache_of_diffusers_is_refused(put_on):
    pipe = make_pipeline("flux")
    experts = cached(make_experts(pipe.transformer), visited(pipe))
    put_on(pipe.transformer)
    with pytest.raises(InputError, match="a rung is cached, and so is the backbone by diffusers"):
        experts.apply(pipe)
