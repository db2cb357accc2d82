"""`TemporalExperts.compile`: the same images, and no compilation when the expert changes."""

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from conftest import make_dit, make_inputs, save_stable_diffusion
from test_pipelines import draw, experts_for, load

from alter import InputError
from alter.sites import embedders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("sd") / "pipe")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("way", ["layers", "experts"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_pipeline_draws_the_same_and_compiles_nothing_more(folder, way, backend):
    pipe = load(folder)
    experts = experts_for(pipe.unet, 16)
    dense, cls = draw(pipe), type(pipe.unet)
    experts.apply(pipe)
    expected = draw(pipe, num_inference_steps=9)
    report = experts.compile(pipe, ways=[way], backend=backend)
    assert report.kept == way and report.seconds[way] > 0
    assert graphs() == report.graphs[way] and 0 < graphs() <= (3 if way == "experts" else 12)
    assert np.abs(draw(pipe, num_inference_steps=9) - expected).max() < (1e-6 if backend == "eager" else 1e-3)
    draw(pipe, num_inference_steps=30)
    assert graphs() == report.graphs[way]
    experts.remove(pipe)
    assert type(pipe.unet) is cls and np.array_equal(draw(pipe), dense)
    assert graphs() == report.graphs[way]


def test_a_dit_with_shared_embedding_and_batches_of_several_experts():
    model = make_dit(layers=6).eval()
    for embedder in embedders(model):
        embedder.load_state_dict(embedders(model)[0].state_dict())
    experts = experts_for(model, 8)
    experts.apply(model)
    (latents, _), conditioning = make_inputs("dit", batch=2)

    def run(backbone, *timesteps):
        with torch.no_grad():
            return backbone(latents, timestep=torch.tensor(timesteps[:1]).expand(2) if len(timesteps) == 1
                            else torch.tensor(timesteps), **conditioning).sample

    asked = [(10,), (500,), (900,), (10, 900), (10, 500)]
    expected = [run(model, *timesteps) for timesteps in asked]
    for ways in (["layers"], ["experts"], None):
        report = experts.compile(model, ways=ways, backend="eager")
        before = graphs()
        for timesteps, output in zip(asked, expected, strict=True):
            assert torch.equal(run(model, *timesteps), output)
        if report.kept == "experts":
            assert graphs() == before
        assert torch.equal(run(copy.deepcopy(model), 500), expected[1])
    assert set(report.seconds) == {"eager", "layers", "experts"} and f"{report.kept} " in str(report)
    assert report.seconds[report.kept] == min(report.seconds.values())


def test_what_cannot_be_compiled_is_reported(folder):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    pipe = load(folder)
    experts = experts_for(pipe.unet, 16)
    report = experts.compile(pipe, ways=["eager", "experts"], backend=broken)
    assert report.kept == "eager" and "no compiler here" in report.failed["experts"] and "failed" in str(report)
    with pytest.raises(InputError, match="torch.compile failed"):
        experts.compile(pipe, ways=["experts"], backend=broken)
    with pytest.raises(InputError, match="ways='fast': use eager, layers, experts"):
        experts.compile(pipe, ways=["fast"])
    draw(pipe)  # still served, eagerly


def test_compile_first_then_offload(folder):
    pipe = load(folder)
    experts = experts_for(pipe.unet, 16)
    experts.apply(pipe)
    expected = draw(pipe)
    experts.compile(pipe, ways=["experts"], backend="eager")
    before = graphs()
    cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    assert np.array_equal(draw(pipe), expected) and graphs() == before
    pipe = load(folder)
    cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    with pytest.raises(InputError, match="compile first"):
        experts.compile(pipe)
