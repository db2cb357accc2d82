"""Experts on a pipeline by hand: copies of its backbone without layers, chosen by the scheduler's own timesteps."""

import copy
import inspect
from collections import Counter
from contextlib import contextmanager

import numpy as np
from diffusers.models.resnet import ResnetBlock2D
from pipelines import draw, make_pipeline
from torch import nn

from alter import TemporalExperts
from alter.backbones.cost import CostTable
from alter.backbones.family import backbone_class
from alter.backbones.sites import find_sites

# What these blocks return; all others their hidden states.
RETURNS = {
    **dict.fromkeys(("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock",
                     "Flux2TransformerBlock", "QwenImageTransformerBlock"), ("encoder_hidden_states", "hidden_states")),
    "CogVideoXBlock": ("hidden_states", "encoder_hidden_states"),
    "ZImageTransformerBlock": ("x",),
    "ResnetBlock2D": ("input_tensor",),
}
FIRST_TIMESTEPS = (0, 400, 700, 850)  # of the four experts


def make_experts(backbone, component=None, expert_T=None):
    """Four experts, each without every fourth layer; the last, at the noisiest timesteps, without the first layer.

    expert_T: which serves each timestep; None: intervals.
    """
    sites = tuple(site.name for site in find_sites(backbone))
    ones = (1,) * len(sites)
    cost = CostTable(sites, ones, ones, 2 * len(sites), len(sites), backbone_class(backbone).__name__)
    mask_EL = np.array([[(site + expert) % 4 != 3 for site in range(len(sites))] for expert in range(4)])
    if expert_T is None:
        expert_T = np.searchsorted(FIRST_TIMESTEPS, np.arange(1000), side="right") - 1
    return TemporalExperts.build(mask_EL, expert_T, cost, 0.6, "total", component=component)


class Skip(nn.Module):
    """What is left of a layer that was taken out."""

    def __init__(self, layer):
        super().__init__()
        self.signature = inspect.signature(type(layer).forward)
        self.returns = RETURNS.get(type(layer).__name__, ("hidden_states",))
        self.channels = layer.out_channels if isinstance(layer, ResnetBlock2D) else None
        if hasattr(layer, "context_pre_only"):  # SD3 reads it in its blocks
            self.context_pre_only = layer.context_pre_only

    def forward(self, *args, **kwargs):
        given = self.signature.bind(self, *args, **kwargs).arguments
        kept = tuple(given[name] for name in self.returns)
        return kept if len(kept) > 1 else kept[0][:, : self.channels]


def serve_by_hand(pipe, component, experts, option=lambda backbone: None):
    """Send each forward to a copy of the backbone, with the option, without what the expert of the step skips.

    Returns: how often each layer ran, and the backbone itself, which is called "".
    """
    backbone, copies, counts = getattr(pipe, component), [], Counter()
    for mask_L in experts.mask_EL:
        copies.append(copy.deepcopy(backbone))
        for name, runs in zip(experts.sites, mask_L, strict=True):
            layer = copies[-1].get_submodule(name)
            if runs:
                _count(layer, name, counts)
            else:
                parent, _, child = name.rpartition(".")
                setattr(copies[-1].get_submodule(parent), child, Skip(layer))
        option(copies[-1])
    timestep_now = _follow(pipe)

    def forward(*args, **kwargs):
        counts[""] += 1
        nearest = min(max(round(timestep_now()), 0), 999)
        return copies[experts.expert_T[nearest]](*args, **kwargs)

    backbone.forward = forward
    return counts


def _follow(pipe):
    """What tells the timestep of the step that comes next: the scheduler's, which no pipeline has rounded yet."""
    step, set_timesteps, done = pipe.scheduler.step, pipe.scheduler.set_timesteps, [0]

    def counted(*args, **kwargs):
        done[0] += 1
        return step(*args, **kwargs)

    def begun(*args, **kwargs):
        done[0] = 0
        return set_timesteps(*args, **kwargs)

    # Pipelines look at the signature.
    counted.__signature__, begun.__signature__ = inspect.signature(step), inspect.signature(set_timesteps)
    pipe.scheduler.step, pipe.scheduler.set_timesteps = counted, begun

    def now():
        timesteps = pipe.scheduler.timesteps
        left_out = len(timesteps) - getattr(pipe, "_num_timesteps", len(timesteps))  # image to image begins later
        return float(timesteps[left_out + done[0]])

    return now


def _count(layer, name, counts):
    def hook(*_):
        counts[name] += 1

    return layer.register_forward_hook(hook)


@contextmanager
def counting(backbone, names):
    """Yields how often each layer ran inside the block."""
    counts = Counter()
    hooks = [_count(backbone.get_submodule(name), name, counts) for name in names]
    yield counts
    for hook in hooks:
        hook.remove()


def compare(name, change=lambda pipe: pipe, before=lambda backbone: None, after=lambda backbone: None, component=None,
            expert_T=None, **arguments):
    """A pipeline with experts and one altered by hand draw the same, and otherwise than the dense one, which comes
    back.

    change: makes the pipeline another one, of another scheduler for example.
    before, after: options of the backbone, taken before or after the experts are applied.
    """
    pipe, other = (change(make_pipeline(name)) for _ in range(2))
    component = component or ("unet" if hasattr(pipe, "unet") else "transformer")
    backbone = getattr(pipe, component)
    experts = make_experts(backbone, None if component in ("unet", "transformer") else component, expert_T)
    for each in (pipe, other):
        before(getattr(each, component))
    experts.apply(pipe)
    counts = serve_by_hand(other, component, experts, after)
    after(backbone)
    with counting(backbone, ["", *experts.sites]) as found:
        drawn = draw(pipe, **arguments)
    assert np.array_equal(drawn, draw(other, **arguments))
    assert found == counts and counts.total() - counts[""] < len(experts.sites) * counts[""]
    experts.remove(pipe)
    plain = draw(pipe, **arguments)
    assert np.abs(drawn - plain).max() > 1e-3
    dense = change(make_pipeline(name))
    before(getattr(dense, component))
    after(getattr(dense, component))
    assert np.array_equal(draw(dense, **arguments), plain)
    return pipe
