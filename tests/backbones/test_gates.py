import copy

import pytest
import torch
from conftest import make_inputs, make_model

from alter.backbones.gates import FeatureTap, HardRows, Simulator, SoftRows
from alter.backbones.sites import feature_points, find_sites
from alter.common.errors import InputError

both_kinds = pytest.mark.parametrize("kind", ["dit", "unet"])


def gated(kind):
    model = make_model(kind)
    return model, Simulator(model)


def random_mask(batch, sites, seed=3):
    mask = torch.rand(batch, sites, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[:, 0] = False  # a site that no sample keeps
    mask[:, 1] = True
    return mask


def run(model, kind, inputs=None):
    args, kwargs = inputs or make_inputs(kind)
    return model(*args, **kwargs).sample


def gradients(model):
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@both_kinds
def test_all_ones_equals_the_untouched_model_bit_for_bit(kind):
    untouched = make_model(kind)
    model, simulator = gated(kind)
    ones = torch.ones(5, len(simulator.sites))
    expected = run(untouched, kind)
    for rows in (None, SoftRows(ones), HardRows(ones.bool()), HardRows(ones[:1].bool())):
        with simulator.use(rows):
            assert torch.equal(run(model, kind), expected)


@both_kinds
def test_removing_restores_the_model(kind):
    model = make_model(kind)
    before = {name: type(module) for name, module in model.named_modules()}
    keys, expected = list(model.state_dict()), run(model, kind)
    simulator = Simulator(model)
    assert list(model.state_dict()) == keys
    simulator.set(HardRows(torch.zeros(1, len(simulator.sites), dtype=torch.bool)))
    assert not torch.equal(run(model, kind), expected)
    simulator.remove()
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(run(model, kind), expected)
    Simulator(model)


def test_gates_are_refused_twice():
    model = make_model("dit")
    Simulator(model)
    with pytest.raises(InputError, match="already has gates"):
        Simulator(model)


def test_a_skipped_dit_block_equals_a_model_without_it():
    model = make_model("dit")
    shorter = copy.deepcopy(model)
    del shorter.transformer_blocks[2]
    simulator = Simulator(model)
    mask = torch.ones(1, 4, dtype=torch.bool)
    mask[0, 2] = False
    with simulator.use(HardRows(mask)):
        assert torch.equal(run(model, "dit"), run(shorter, "dit"))


def test_a_skipped_unet_site_equals_a_model_with_an_identity_there():
    class KeepHidden(torch.nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.channels = channels

        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states if self.channels is None else hidden_states[:, : self.channels]

    for index, site in enumerate(find_sites(make_model("unet"))):
        model, replaced = make_model("unet"), make_model("unet")
        parent, _, leaf = site.name.rpartition(".")
        setattr(replaced.get_submodule(parent), leaf, KeepHidden(site.channels))
        simulator = Simulator(model)
        mask = torch.ones(1, len(simulator.sites), dtype=torch.bool)
        mask[0, index] = False
        with simulator.use(HardRows(mask)):
            assert torch.equal(run(model, "unet"), run(replaced, "unet")), site.name


@both_kinds
@pytest.mark.parametrize("uniform", [False, True], ids=["mixed", "uniform"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_soft_with_binary_masks_equals_hard(kind, uniform, checkpointing):
    results = []
    for hard in (False, True):
        model, simulator = gated(kind)
        model.double()
        if checkpointing:
            simulator.enable_gradient_checkpointing()
        mask = random_mask(5, len(simulator.sites))
        if uniform:
            mask = mask[:1].expand(5, -1)
        args, kwargs = make_inputs(kind)
        inputs = ((args[0].double(), args[1]), {n: v.double() if v.is_floating_point() else v
                                                for n, v in kwargs.items()})
        with simulator.use(HardRows(mask) if hard else SoftRows(mask.double())):
            output = run(model, kind, inputs)
        with simulator.use(None):  # a second forward in between must not disturb the first one's backward
            run(model, kind, inputs)
        output.square().sum().backward()
        results.append((output.detach(), gradients(model)))
    (soft, soft_gradients), (hard, hard_gradients) = results
    assert torch.allclose(soft, hard, rtol=0, atol=1e-12)
    for name, expected in soft_gradients.items():
        assert torch.allclose(expected, hard_gradients[name], rtol=1e-9, atol=1e-10), name


@both_kinds
def test_the_mask_gradient_matches_finite_differences(kind):
    model, simulator = gated(kind)
    model.double().eval()
    args, kwargs = make_inputs(kind)
    inputs = ((args[0].double(), args[1]), {n: v.double() if v.is_floating_point() else v for n, v in kwargs.items()})
    mask = (torch.rand(5, len(simulator.sites), dtype=torch.float64) * 0.8 + 0.1).requires_grad_()

    def loss(mask_BL):
        with simulator.use(SoftRows(mask_BL)):
            return run(model, kind, inputs).square().mean()

    (gradient,) = torch.autograd.grad(loss(mask), mask)
    direction = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        slope = (loss(mask + 1e-5 * direction) - loss(mask - 1e-5 * direction)) / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)


@both_kinds
def test_a_hard_layer_sees_only_the_samples_that_keep_it(kind):
    model, simulator = gated(kind)
    mask = random_mask(5, len(simulator.sites))
    seen = dict.fromkeys((site.name for site in simulator.sites), 0)
    for name in seen:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, len(args[0])))
    with simulator.use(HardRows(mask)):
        run(model, kind)
    assert list(seen.values()) == mask.sum(0).tolist()


def test_a_deepcopy_has_gates_of_its_own():
    model = make_model("dit")
    simulator = Simulator(model)
    twin = copy.deepcopy(model)
    expected = run(twin, "dit")
    simulator.set(HardRows(torch.zeros(1, 4, dtype=torch.bool)))
    assert torch.equal(run(twin, "dit"), expected)


@both_kinds
@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_are_taken_after_the_gate(kind, checkpointing):
    """With every site off, the tap still sees each feature point, and a skipped DiT block gives its input."""
    model, simulator = gated(kind)
    if checkpointing:
        simulator.enable_gradient_checkpointing()
    tap = FeatureTap(model, feature_points(model))
    off = HardRows(torch.zeros(1, len(simulator.sites), dtype=torch.bool))
    with simulator.use(off), tap.capture() as features:
        output = run(model, kind)
    assert len(features) == len(feature_points(model))
    if kind == "dit":
        args, _ = make_inputs(kind)
        assert torch.equal(features[0], model.pos_embed(args[0]))
    kept = [feature.clone() for feature in features]
    output.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(features, kept, strict=True))
