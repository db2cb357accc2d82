"""Ways to skip a UNet's layers other than the paper's: of a resnet the residual branch alone, of a transformer all.

The reference for skipping a layer: the same model with zeros where the residual is added, or with the layer taken out
by hand.
"""

import dataclasses
import importlib
import json
import sys

import numpy as np
import pytest
import torch
from conftest import make_dit, make_inputs, make_unet, save_stable_diffusion
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from test_pipelines import draw, load
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from alter import InputError, TemporalExperts, load_config, load_pipeline, train
from alter.backbones.cost import count_cost
from alter.backbones.gates import HardRows, Simulator, SoftRows
from alter.backbones.latency import measure_latency
from alter.backbones.sites import find_sites
from alter.common.config import ROOT
from alter.evaluation.report import figures as report
from alter.training.ablation import block_influence
from alter.training.measure import measure_sensitivity
from alter.evaluation.report.records import read_sensitivity, write_sensitivity
from alter.training.setup.dry_run import describe_run
from alter.training.setup.parts import build

BOTH = ("shortcut", "whole")
WAYS = [("shortcut", "block"), ("identity", "whole"), BOTH]
KEYS = {"resnet_skip": "shortcut", "transformer_skip": "whole"}
every_way = pytest.mark.parametrize("way", WAYS, ids="-".join)


def kinds(unet, kind):
    return [name for name, module in unet.named_modules() if type(module).__name__ == kind]


def changed_unet(**changes):
    torch.manual_seed(0)
    config = {key: value for key, value in make_unet().config.items() if not key.startswith("_")}
    return UNet2DConditionModel(**{**config, **changes})


def run(unet):
    args, kwargs = make_inputs("unet")
    return unet(*args, **kwargs).sample


def without_residual(unet, name):
    """Zeros in the last layer of the branch that is added."""
    module = unet.get_submodule(name.removesuffix(":residual"))
    last = module.conv2 if name.endswith(":residual") else module.proj_out
    for parameter in last.parameters():
        nn.init.zeros_(parameter)


class Kept(nn.Module):
    """What is left of a layer taken out by hand: its shortcut, if it has one."""

    def __init__(self, layer):
        super().__init__()
        self.conv_shortcut = getattr(layer, "conv_shortcut", None)

    def forward(self, hidden_states, *args, return_dict=True, **kwargs):
        output = self.conv_shortcut(hidden_states) if self.conv_shortcut else hidden_states
        return output if return_dict else (output,)


def take_out(unet, name):
    path = name.removesuffix(":residual")
    parent, _, child = path.rpartition(".")
    setattr(unet.get_submodule(parent), child, Kept(unet.get_submodule(path)))


def alone(count, index):
    mask = torch.ones(1, count, dtype=torch.bool)
    mask[0, index] = False
    return HardRows(mask)


def test_names():
    unet = make_unet()
    resnets, transformers = kinds(unet, "ResnetBlock2D"), kinds(unet, "Transformer2DModel")
    names = {way: [site.name for site in find_sites(unet, *way)] for way in WAYS}
    assert sorted(names[BOTH]) == sorted([f"{name}:residual" for name in resnets] + transformers)
    assert set(names[BOTH]) - set(names["shortcut", "block"]) == set(transformers)
    assert len(names["shortcut", "block"]) == len(names[BOTH])  # one block a transformer here
    paper = {site.name for site in find_sites(unet)}
    assert {name for name in names["identity", "whole"] if name not in transformers} == {
        name for name in paper if "transformer" not in name}


def test_resnets_that_sample_up_or_down_are_no_sites():
    unet = changed_unet(down_block_types=("ResnetDownsampleBlock2D",) * 2 + ("DownBlock2D",),
                        up_block_types=("UpBlock2D",) + ("ResnetUpsampleBlock2D",) * 2)
    sampling = {name for name in kinds(unet, "ResnetBlock2D") if "samplers" in name}
    assert len(sampling) == 3
    assert not sampling & {site.path for way in (("identity", "block"), *WAYS) for site in find_sites(unet, *way)}


@every_way
def test_a_skipped_layer_adds_nothing(way):
    sites = find_sites(make_unet(), *way)
    for index, site in enumerate(sites):
        model, zeroed = make_unet(), make_unet()
        for each in (model, zeroed):
            each.mid_block.resnets[0].output_scale_factor = 2.0
            each.up_blocks[1].resnets[1].output_scale_factor = 2.0
        simulator = Simulator(model, sites)
        if "transformer_blocks" in site.name or way[0] == "identity" and "resnets" in site.name:
            continue  # the paper's, tested in test_simulator.py
        without_residual(zeroed, site.name)
        expected = run(zeroed)
        with simulator.use(alone(len(sites), index)):
            assert torch.equal(run(model), expected), site.name
        with simulator.use(SoftRows((torch.arange(len(sites)) != index).float().expand(5, -1))):
            assert torch.equal(run(model), expected), site.name


def test_a_transformer_of_several_blocks_is_one_site():
    model, zeroed = (changed_unet(transformer_layers_per_block=2, use_linear_projection=True) for _ in range(2))
    sites = find_sites(model, *BOTH)
    assert len(find_sites(model, "shortcut", "block")) - len(sites) == len(kinds(model, "Transformer2DModel"))
    simulator = Simulator(model, sites)
    index = [site.name for site in sites].index("mid_block.attentions.0")
    without_residual(zeroed, "mid_block.attentions.0")
    with simulator.use(alone(len(sites), index)):
        assert torch.equal(run(model), run(zeroed))


def test_attention_masks_are_chosen_with_their_samples():
    unet = make_unet()
    simulator = Simulator(unet, find_sites(unet, *BOTH))
    (sample, timesteps), kwargs = make_inputs("unet")
    kwargs["encoder_attention_mask"] = torch.arange(7) < torch.arange(2, 7)[:, None]
    mask = torch.rand(5, len(simulator.sites), generator=torch.Generator().manual_seed(0)) < 0.5
    with simulator.use(HardRows(mask)):
        together = unet(sample, timesteps, **kwargs).sample
    for i in range(5):
        one = {name: value[i : i + 1] for name, value in kwargs.items()}
        with simulator.use(HardRows(mask[i : i + 1])):
            single = unet(sample[i : i + 1], timesteps[i : i + 1], **one).sample
        assert torch.allclose(together[i : i + 1], single, atol=1e-5)


def test_a_skipped_resnets_shortcut_is_trained():
    unet = make_unet()
    sites = find_sites(unet, *BOTH)
    name = "down_blocks.1.resnets.0:residual"
    simulator = Simulator(unet, sites)
    with simulator.use(alone(len(sites), [site.name for site in sites].index(name))):
        run(unet).square().sum().backward()
    gradients = {child: parameter.grad for child, parameter in unet.down_blocks[1].resnets[0].named_parameters()}
    assert all((gradient is not None) == child.startswith("conv_shortcut") for child, gradient in gradients.items())
    assert gradients["conv_shortcut.weight"].abs().max() > 0


@every_way
def test_costs_are_those_of_the_layers_taken_out(way):
    unet = make_unet()
    sites = find_sites(unet, *way)
    cost = count_cost(unet, 16, sites)
    mask_L = np.random.default_rng(0).random(len(sites)) < 0.5
    if way[0] == "identity":
        mask_L |= ["resnets" in name for name in cost.sites]
    with torch.device("meta"):
        left = type(unet).from_config(unet.config)
        gated = type(unet).from_config(unet.config)
        inputs = {"sample": torch.zeros(1, 4, 16, 16), "timestep": torch.zeros(1), "encoder_hidden_states":
                  torch.zeros(1, 77, 12)}
    simulator = Simulator(gated, sites)
    simulator.set(HardRows(torch.from_numpy(mask_L)[None]))
    before = sum(parameter.numel() for parameter in left.parameters())
    for name in np.array(cost.sites)[~mask_L]:
        take_out(left, name)
    for model in (left, gated):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(**inputs)
        assert counter.get_total_flops() // 2 == cost.macs_total - np.array(cost.macs)[~mask_L].sum()
    gone = before - sum(parameter.numel() for parameter in left.parameters())
    assert gone == np.array(cost.parameters)[~mask_L].sum() > 0


def test_latency_leaves_out_the_shortcut(monkeypatch):
    """By a clock that only a slow shortcut and a slow convolution beside it move."""
    now = [0.0]
    unet = make_unet()
    resnet = unet.up_blocks[0].resnets[0]
    for module, seconds in ((resnet.conv_shortcut, 2.0), (resnet.conv1, 3.0), (unet.mid_block.attentions[0].norm, 5.0)):
        module.register_forward_hook(lambda *_, seconds=seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr("alter.backbones.latency.time.perf_counter", lambda: now[0])
    latency = measure_latency(unet.eval(), 16, 1, runs=2, sites=find_sites(unet, *BOTH))
    seconds = dict(zip(latency.sites, latency.seconds, strict=True))
    assert seconds.pop("up_blocks.0.resnets.0:residual") == 3 and seconds.pop("mid_block.attentions.0") == 5
    assert latency.seconds_total == 10 and not any(seconds.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("sd") / "pipe")


def experts_of(unet, way, count=2):
    cost = count_cost(unet, 16, find_sites(unet, *way))
    mask_EL = np.random.default_rng(1).random((count, len(cost.sites))) < 0.6
    return TemporalExperts.build(mask_EL, np.arange(1000) * count // 1000, cost, 0.6, "total")


@every_way
def test_in_a_pipeline_saved_trimmed_and_loaded(folder, tmp_path, way):
    pipe = load(folder)
    dense = draw(pipe)
    experts_of(pipe.unet, way).save_pretrained(tmp_path)
    experts = TemporalExperts.from_pretrained(tmp_path)
    with experts.apply(pipe):
        expected = draw(pipe)
    assert np.array_equal(draw(pipe), dense) and np.abs(expected - dense).max() > 1e-3
    unused = [name for name, used in zip(experts.sites, experts.mask_EL.any(axis=0), strict=True) if not used]
    assert any("resnets" in name for name in unused) and (way[1] == "block" or any(
        "attentions" in name for name in unused))
    lost = [parameter for name in unused for child, parameter in pipe.unet.get_submodule(
        name.removesuffix(":residual")).named_parameters() if ":residual" not in name or "shortcut" not in child]
    assert experts.trim(pipe) == sum(parameter.numel() * 4 for parameter in lost)
    assert np.array_equal(draw(pipe), expected)
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is StableDiffusionPipeline and np.array_equal(draw(loaded), expected)
    stored = load_file(tmp_path / "unet/alter_trimmed.safetensors")
    for name in unused:
        path = name.removesuffix(":residual")
        left = {key.removeprefix(f"{path}.").split(".")[0] for key in stored if key.startswith(f"{path}.")}
        assert left <= ({"conv_shortcut"} if path != name else set())
    experts.remove(loaded)
    with pytest.raises(InputError, match="trimmed and has no dense form"):
        draw(loaded)
    with pytest.raises(InputError, match="they run .*, which this backbone was trimmed of"):
        dataclasses.replace(experts, mask_EL=np.ones_like(experts.mask_EL)).apply(loaded)
    with pytest.raises(InputError, match="sites are not the"):
        experts_of(make_unet(), ("identity", "block")).apply(loaded)


def test_experts_of_every_way_alternate_on_one_backbone(folder):
    """Against the same pipeline over copies whose residuals are zero."""
    pipe = load(folder)
    for way in WAYS:
        experts = experts_of(pipe.unet, way, count=1)
        experts.mask_EL[:] |= np.array([way[0] == "identity" and "resnets" in name for name in experts.sites])
        other = load(folder)
        for name in np.array(experts.sites)[~experts.mask_EL[0]]:
            without_residual(other.unet, name) if "transformer_blocks" not in name else other.unet.get_submodule(
                name).register_forward_hook(lambda module, inputs, output: inputs[0])
        with experts.apply(pipe):
            assert np.abs(draw(pipe) - draw(other)).max() < 1e-6


@pytest.mark.parametrize("way", ["layers", "experts"])
def test_compiled(folder, way):
    torch._dynamo.reset()
    pipe = load(folder)
    experts = experts_of(pipe.unet, BOTH)
    with experts.apply(pipe):
        expected = draw(pipe)
    result = experts.compile(pipe, ways=[way], backend="eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert result.kept == way and np.abs(draw(pipe) - expected).max() < 1e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_compiled_with_gradient_checkpointing():
    """Inside a compiled transformer, whose blocks are checkpointed, nothing breaks the graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gradients = []
    for compiled in (False, True):
        unet = make_unet()
        simulator = Simulator(unet, find_sites(unet, *BOTH))
        simulator.enable_gradient_checkpointing()
        if compiled:
            simulator.compile(backend="eager", dynamic=True)
        mask = torch.rand(5, len(simulator.sites), generator=torch.Generator().manual_seed(0)) < 0.6
        with simulator.use(HardRows(mask)):
            output = run(unet)
        output.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in unet.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("key, value", KEYS.items())
def test_a_dit_refuses_them(small_config, key, value):
    for check in (build, describe_run):
        with pytest.raises(InputError, match=rf"^experts\.{key}='{value}' is for a UNet.*: set (identity|block)$"):
            check(small_config("dit", experts={key: value}))
    with pytest.raises(InputError, match="28 sites are not the 4 of this DiT"):
        experts_of(make_unet(), BOTH).apply(make_dit())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_run_and_what_follows_it(small_config, tmp_path, checkpointing):
    steps = {"train": {"steps": 2, "search_steps": 1}, "backbone": {"gradient_checkpointing": checkpointing}}
    config = small_config("sd", experts=KEYS, **steps)
    assert "resnets.0:residual" in describe_run(config)
    final = train(config) / "final"
    experts = TemporalExperts.from_pretrained(final)
    assert experts.sites == tuple(site.name for site in find_sites(make_unet(), *BOTH))
    assert draw(load_pipeline(final)).shape == (1, 32, 32, 3)
    with pytest.raises(InputError, match="experts.resnet_skip='identity' differs from 'shortcut'"):
        train(small_config("sd", experts={**KEYS, "resnet_skip": "identity"}, resume="latest", **steps))
    tuned = train(small_config("sd", experts={"pretrained": str(final)}, output_dir=str(tmp_path / "tuned"),
                               train={"steps": 1}))
    again = TemporalExperts.from_pretrained(tuned / "final")
    assert again.sites == experts.sites and np.array_equal(again.mask_EL, experts.mask_EL)


def test_a_budget_of_time_sensitivity_influence_and_figures(small_config, tmp_path):
    config = small_config("unet", experts=KEYS, budget={"cost": "latency"})
    parts = build(config)
    assert parts.latency.sites == parts.cost.sites == tuple(site.name for site in parts.simulator.sites)
    assert (block_influence(config, parts, samples=4) > 0).all()
    table = measure_sensitivity(config, parts, bins=2, samples=4)
    write_sensitivity(table, tmp_path / "table.json")
    assert read_sensitivity(tmp_path / "table.json").sites == parts.cost.sites
    assert (table.error_LB > 0).all()
    order, names = report.layers(parts.cost.sites)
    assert len(set(names)) == len(names) and names[0] == "down 0 resnet 0" and names[1] == "down 0 attention 0"
    assert [name.split()[0] for name in names] == sorted((name.split()[0] for name in names),
                                                         key=["down", "mid", "up"].index)
    report.plot_sensitivity(table, tmp_path / "sensitivity.png")
    report.plot_experts(experts_of(make_unet(), BOTH), tmp_path / "experts.png")


def test_scripts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    out = tmp_path / "latency.json"
    settings = [f"experts.{key}={value}" for key, value in KEYS.items()]
    monkeypatch.setattr(sys, "argv", ["latency.py", "--config", "configs/demo_sd.yaml", "--out", str(out), *settings])
    assert importlib.import_module("latency").main() == 0
    config = load_config("configs/demo_sd.yaml", [*settings, "budget.cost=latency", f"budget.latency_file={out}"])
    assert "keep 0." in describe_run(config)

    benchmark, cases = importlib.import_module("benchmark"), importlib.import_module("benchmarking.cases")
    case = cases.load_case("demo_sd", torch.device("cpu"), "fp32")
    cost = count_cost(case.backbone, case.size, find_sites(case.backbone, *BOTH))
    cases.draw_experts(cost, 0.6, 0, 2).save_pretrained(tmp_path / "final")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--json", str(tmp_path / "rows.json"), "--cases", "demo_sd",
                                      "--run", str(tmp_path), "--runs", "1"])
    assert benchmark.main() == 0  # which compares the outputs with those of layers taken out by hand
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 3
