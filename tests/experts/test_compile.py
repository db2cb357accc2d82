"""`TemporalExperts.compile` and a user's torch.compile: the same images, and a change of expert compiles nothing."""

import copy

import numpy as np
import pytest
import torch
from conftest import make_dit, make_inputs, make_unet, save_stable_diffusion
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from helpers import draw, experts_for
from helpers import load_quietly as load

from alter import InputError
from alter.backbones.dit import embedders
from alter.backbones.gates import HardRows, Simulator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("sd") / "pipe")


@pytest.fixture(scope="module")
def small(folder, tmp_path_factory):
    """The same with a UNet of two levels, of which dynamo traces the whole."""
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4)
    place = tmp_path_factory.mktemp("small") / "pipe"
    load(folder, unet=unet).save_pretrained(place)
    return place


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):  # and put back what compiling raises it to
        yield


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_pipeline_draws_the_same_and_compiles_nothing_more(folder, backend):
    """Integer timesteps, and then Euler's floats."""
    pipe = load(folder)
    experts = experts_for(pipe.unet, 16)
    dense = draw(pipe)
    experts.apply(pipe)
    tolerance = 1e-6 if backend == "eager" else 1e-3
    expected = draw(pipe, num_inference_steps=9)
    assert experts.compile(pipe, backend=backend) is None
    assert np.abs(draw(pipe, num_inference_steps=9) - expected).max() < tolerance
    compiled = graphs()
    assert 0 < compiled <= 12  # one of each kind of layer, width and shape
    draw(pipe, num_inference_steps=30)
    own, pipe.scheduler = pipe.scheduler, EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    draw(pipe)
    assert graphs() == compiled
    pipe.scheduler = own
    experts.remove(pipe)
    assert np.array_equal(draw(pipe), dense) and graphs() == compiled


def test_compile_applies_experts_that_are_not_and_refuses_others(folder):
    pipe = load(folder)
    experts = experts_for(pipe.unet, 16)
    with experts.apply(pipe):
        expected = draw(pipe)
    experts.compile(pipe, backend="eager")
    assert np.abs(draw(pipe) - expected).max() < 1e-6 and graphs() > 0
    with pytest.raises(InputError, match="others are applied"):
        experts_for(pipe.unet, 16, seed=5).compile(pipe)


def test_a_dit_batches_of_several_experts_and_copies():
    model = make_dit(layers=6).eval()
    for embedder in embedders(model):
        embedder.load_state_dict(embedders(model)[0].state_dict())
    experts = experts_for(model, 8)
    experts.apply(model)
    (latents, _), conditioning = make_inputs("dit", batch=2)

    @torch.no_grad()
    def run(backbone, *timesteps):
        timestep = torch.tensor(timesteps).expand(2)
        return backbone(latents, timestep=timestep, **conditioning).sample

    asked = [(10,), (500,), (900,), (10, 900), (10, 500)]
    expected = [run(model, *timesteps) for timesteps in asked]
    experts.compile(model, backend="eager")
    for timesteps, output in zip(asked, expected, strict=True):
        assert torch.equal(run(model, *timesteps), output)
    before = graphs()
    for timesteps in ((900,), (10,), (500,), (950,)):
        run(model, *timesteps)
    assert graphs() == before
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, 500), expected[1])
    run(model, 10)
    assert torch.equal(run(twin, 900), expected[2])


def test_layers_that_the_user_compiled_stay_so(folder):
    pipe = load(folder)
    experts = experts_for(pipe.unet, 16)
    layer = pipe.unet.get_submodule(experts.sites[0])
    layer.compile(backend="eager")
    own = layer._compiled_call_impl
    experts.compile(pipe, backend="eager")
    assert layer._compiled_call_impl is not own
    experts.compile(pipe, backend="eager")  # a second time replaces the first
    experts.remove(pipe)
    assert layer._compiled_call_impl is own
    assert not any(pipe.unet.get_submodule(name)._compiled_call_impl for name in experts.sites[1:])


def test_gradients_through_compiled_layers_that_are_recomputed():
    """With gradient checkpointing, whose function must not break the graph of a layer."""
    gradients = []
    for compiled in (False, True):
        unet = make_unet()
        simulator = Simulator(unet)
        simulator.enable_gradient_checkpointing()
        if compiled:
            simulator.compile(backend="eager", dynamic=True)
        mask = torch.rand(5, len(simulator.sites), generator=torch.Generator().manual_seed(0)) < 0.6
        args, kwargs = make_inputs("unet")
        with simulator.use(HardRows(mask)):
            output = unet(*args, **kwargs).sample
        output.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in unet.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("order", ["compile first", *(
    pytest.param(order, marks=pytest.mark.slow) for order in ("apply first", "in place"))])
def test_a_backbone_that_the_user_compiles(small, order):
    """Traced by dynamo and run by its eager backend: the same images, and later steps compile nothing."""
    experts, eager, pipe = experts_for(load(small).unet, 16), load(small), load(small)
    assert len(np.unique(experts.mask_EL, axis=0)) == 3
    experts.apply(eager)
    if order == "compile first":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        experts.apply(pipe)
    elif order == "apply first":
        experts.apply(pipe)
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        experts.apply(pipe)
        pipe.unet.compile(backend="eager")
    first = draw(pipe, num_inference_steps=9)
    before = graphs()
    assert before >= 1 and np.abs(first - draw(eager, num_inference_steps=9)).max() < 1e-5
    draw(pipe, num_inference_steps=30)
    assert graphs() == before
    experts.remove(pipe)
    experts.remove(eager)
    assert np.abs(draw(pipe) - draw(eager)).max() < 1e-5
