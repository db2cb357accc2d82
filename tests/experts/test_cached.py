"""Cached rungs: a skipped layer adds what it added when it last ran. Against layers whose `forward` does so by hand."""

import copy
import dataclasses
import threading
from collections import defaultdict

import numpy as np
import pytest
import torch
from by_hand import Skip, counting, make_experts
from conftest import make_dit
from diffusers import FirstBlockCacheConfig
from pipelines import PIPELINES, PROMPTS, backbones, draw, make_pipeline

from alter import ClassConditionalPipeline, InputError, TemporalExperts
from alter.experts.ladder import Rung
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


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "wan22"])
def test_images_of_every_family(name, guided):
    if guided and name not in GUIDED:
        return
    arguments = {"prompts": PROMPTS, **GUIDED[name]} if guided else {}
    pipe = make_pipeline(name)
    (component, backbone), = backbones(pipe).items()
    at = visited(pipe)
    experts = cached(make_experts(backbone), at)
    with experts.apply(pipe), counting(backbone, ["", *experts.sites]) as counts:
        drawn = draw(pipe, num_inference_steps=STEPS, **arguments)
    forwards, left = divmod(counts[""], STEPS)
    assert left == 0 and forwards == (2 if guided and name in ("flux", "wan", "qwen") else forwards)
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
    pipe, experts = sd
    expected = drawn_with(pipe, experts)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    experts.apply(pipe)
    for steps in (0, 2):
        with pytest.raises(Stop):
            draw(pipe, num_inference_steps=STEPS, prompts="another",
                 callback_on_step_end=lambda pipe, step, *_, last=steps: stop() if step == last else {})
        assert np.array_equal(draw(pipe, num_inference_steps=STEPS), expected)


def drawn_with(pipe, experts):
    with experts.apply(pipe):
        return draw(pipe, num_inference_steps=STEPS)


def test_threads_share_a_backbone_and_no_cache(sd):
    pipe, experts = sd
    prompts, found = ["a red circle", "another"], {}
    experts.apply(pipe)
    expected = [draw(pipe, prompts=prompt, num_inference_steps=STEPS) for prompt in prompts]

    def work(which):
        own = type(pipe)(**{name: copy.deepcopy(part) if name == "scheduler" else part
                            for name, part in pipe.components.items()})
        own.set_progress_bar_config(disable=True)
        found[which] = draw(own, prompts=prompts[which], num_inference_steps=STEPS)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(np.array_equal(found[which], expected[which]) for which in range(2))


def test_nothing_is_kept_after_the_last_step(sd):
    pipe, experts = sd
    experts.apply(pipe)
    chooser = pipe.unet._alter_applied.chooser
    draw(pipe, num_inference_steps=STEPS, callback_on_step_end=lambda pipe, step, *_: (
        {} if bool(chooser.trajectory.added[0]) == (step < STEPS - 1) else 1 / 0))
    assert chooser.trajectory.added == [{}]


def test_layers_that_are_skipped_at_the_first_step_run_there_and_those_of_no_expert_never(sd):
    pipe, experts = sd
    turned = dataclasses.replace(experts, mask_EL=experts.mask_EL[::-1].copy())
    turned.mask_EL[:, 0] = False
    with turned.apply(pipe), counting(pipe.unet, turned.sites) as counts:
        draw(pipe, num_inference_steps=STEPS)
    for number, site in enumerate(turned.sites):  # 0, 2 and 4 have the small expert, but for its first step
        assert counts[site] == (0 if number == 0 else STEPS if turned.mask_EL[0, number] else 3)


def test_a_compiled_pipeline_draws_the_same(sd):
    pipe, experts = sd
    expected = drawn_with(pipe, experts)
    experts.compile(pipe, backend="eager")
    assert np.abs(draw(pipe, num_inference_steps=STEPS) - expected).max() < 1e-6


def test_what_cannot_be_served_is_refused(sd):
    pipe, experts = sd
    pipe = ClassConditionalPipeline(make_dit(4).eval(), pipe.scheduler)
    experts = cached(make_experts(pipe.transformer), np.array([999, 500, 100]))
    experts.apply(pipe)
    latents, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 1])

    def forward(*timestep):
        count = len(timestep)
        with torch.no_grad():
            return pipe.transformer(latents[:count], torch.tensor(timestep), labels[:count]).sample

    with pytest.raises(InputError, match="one timestep at a time"):
        forward(999, 500)
    with pytest.raises(InputError, match="called 2 times at timestep 500 and 1 times at the step before"):
        [forward(timestep) for timestep in (999, 500, 500)]
    first = forward(999)
    with pytest.raises(InputError, match="called 1 times at timestep 500 and 2 times at the step before"):
        [forward(timestep) for timestep in (999, 500, 100)]  # the second call of 999 after `first`
    assert torch.equal(forward(999), first)


def test_a_cache_of_diffusers_is_refused():
    pipe = make_pipeline("flux")
    experts = cached(make_experts(pipe.transformer), visited(pipe))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with pytest.raises(InputError, match="the rung is cached itself: call disable_cache"):
        experts.apply(pipe)
