"""Gates on all backbones in the zoo, against the plain model: its samples alone, its blocks without weights."""

import diffusers
import pytest
import torch
from zoo import ZOO, alone, answer, blocks, inputs, make, of_the_newest, removed

from alter import InputError
from alter.backbones.gates import HardRows, Simulator, SoftRows
from alter.backbones.sites import find_sites

BATCH = 3
# Blocks that do not give their input when their weights are zeros.
OTHERS = {
    "CosmosTransformer3DModel": "transformer_blocks.",  # each adds the positions to its input
    "HunyuanDiT2DModel": ("blocks.4", "blocks.5"),  # they mix in an earlier block's output
}
# Backbones whose samples cannot run different layers.
REFUSED = [
    "ErnieImageTransformer2DModel",  # the batch is on the second axis
    # Blocks get other rows of the time's embedding than there are samples:
    "QwenImageEdit2511",  # 2 B: each sample's own, then as many at time 0
    "QwenImage21Transformer2DModel",  # B + 1: the last at time 0
]


def apart(left, right):
    return ((left - right).norm() / right.norm().clamp(min=1e-30)).item()


def specimen(name):
    """A model in the best precision that it has, its inputs, and how far apart equal outputs may be."""
    dtype, bound = (torch.float64, 1e-12) if ZOO[name].double else (torch.float32, 3e-6)
    if name == "HunyuanDiT2DModel":  # its norms are of float32 in any precision, which a last place may tip over
        bound = 1e-7
    model = make(name, dtype)
    return model, inputs(name, model, BATCH), bound


def random_mask(sites):
    """bool [B, L]: a site that no sample keeps, one that all keep, the rest each sample for itself."""
    mask = torch.rand(BATCH, sites, generator=torch.Generator().manual_seed(5)) < 0.5
    mask[:, 0], mask[:, 1] = False, True
    return mask


def gradient(model, output):
    """Of a loss to all parameters, in one row."""
    model.zero_grad()
    output.square().mean().backward()
    slopes = [torch.zeros_like(value) if value.grad is None else value.grad for value in model.parameters()]
    return torch.cat([slope.flatten() for slope in slopes])


def params(*others):
    return pytest.mark.parametrize("name", [
        pytest.param(name, marks=pytest.mark.slow if ZOO[name].slow else ()) for name in ZOO if name not in others])


@params()
@torch.no_grad()
def test_a_skipped_block_is_one_without_weights(name):
    model, given, bound = specimen(name)
    dense, keys = answer(model, given), list(model.state_dict())
    classes = {path: type(module) for path, module in model.named_modules()}
    sites = [site.name.removesuffix(".block") for site in find_sites(model)]
    paths = [*blocks(name, model)]
    assert sites == paths if ZOO[name].lists else set(paths) < set(sites)
    expected = {path: removed(model, path, given) for path in paths if not path.startswith(OTHERS.get(name, "none"))}

    simulator, ones = Simulator(model), torch.ones(BATCH, len(sites), dtype=torch.bool)
    rows = [HardRows(ones), HardRows(ones[:1])] + [SoftRows(ones.to(dense.dtype))] * (name not in REFUSED)
    for all_ones in rows:
        with simulator.use(all_ones):
            kept = answer(model, given)
        if isinstance(all_ones, HardRows):
            assert torch.equal(kept, dense)
        else:  # a mixture may lie otherwise in memory, and some CPUs round it otherwise (measured: 3e-16)
            assert apart(kept, dense) < bound
    for path, without in expected.items():
        mask = ones[:1].clone()
        mask[:, sites.index(path)] = False
        with simulator.use(HardRows(mask)):
            assert apart(answer(model, given), without) < 1e-6, path

    simulator.remove()
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert list(model.state_dict()) == keys and torch.equal(answer(model, given), dense)


@params(*REFUSED)
def test_samples_run_their_own_layers(name):
    model, given, bound = specimen(name)
    simulator = Simulator(model)
    mask = random_mask(len(simulator.sites))
    outputs, gradients = [], []
    for rows in (HardRows(mask), SoftRows(mask.to(torch.float64 if ZOO[name].double else torch.float32))):
        with simulator.use(rows), torch.set_grad_enabled(ZOO[name].backward):
            output = answer(model, given)
        outputs.append(output.detach())
        gradients.append(gradient(model, output) if ZOO[name].backward else output)
    assert apart(outputs[1], outputs[0]) < bound
    assert apart(gradients[1], gradients[0]) < 1e4 * bound  # some attention is of float32 in any model
    for index in range(BATCH):
        with simulator.use(HardRows(mask[index : index + 1])), torch.no_grad():
            single = answer(model, alone(given, index, BATCH))
        assert apart(outputs[0][index : index + 1], single) < max(bound, 1e-7), index


@pytest.mark.parametrize("name", [name for name in REFUSED if name in ZOO])
def test_samples_that_cannot_run_their_own_layers_are_refused(name):
    model, given, _ = specimen(name)
    simulator = Simulator(model)
    with simulator.use(HardRows(random_mask(len(simulator.sites)))), pytest.raises(InputError, match="experts: "):
        answer(model, given)


@of_the_newest
def test_a_stream_that_is_not_given():
    model, given, bound = specimen("Kandinsky6Transformer3DModel")
    given["audio_hidden_states"] = None
    expected, simulator = answer(model, given), Simulator(model)
    ones = torch.ones(BATCH, len(simulator.sites), dtype=torch.bool)
    mask = random_mask(len(simulator.sites))
    for rows in (HardRows(ones), SoftRows(ones.to(expected.dtype))):
        with simulator.use(rows):
            assert torch.equal(answer(model, given), expected)
    outputs = []
    for rows in (HardRows(mask), SoftRows(mask.to(expected.dtype))):
        with simulator.use(rows):
            outputs.append(answer(model, given))
    assert apart(*outputs) < bound


@pytest.mark.parametrize("name", ["Kandinsky3UNet", "StableCascadeUNet", "UNet2DModel", "UNet3DConditionModel"])
def test_other_unets_are_refused(name):
    with torch.device("meta"):
        model = getattr(diffusers, name)()
    with pytest.raises(InputError, match="no layers known to be prunable"):
        find_sites(model)
