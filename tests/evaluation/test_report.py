"""What the figures draw, against the artefact."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from conftest import make_dit, make_inputs, make_model, make_unet
from helpers import TARGETS, chain, table_of
from matplotlib.collections import QuadMesh
from PIL import Image

from alter import TemporalExperts, train
from alter.backbones.cost import count_cost
from alter.backbones.sites import find_sites
from alter.evaluation.report import figures as report
from alter.evaluation.report.experts import identical
from alter.evaluation.report.records import describe_masks, read_history
from alter.evaluation.report.samples import read_strip, save_strip
from alter.evaluation.report.words import macs

NASTY = """<script>alert(1)</script> & "x" '$y$ ]]>"""


def write_history(folder, experts, steps=(1, 2, 3)):
    random = np.random.default_rng(0)
    order = random.random(experts.mask_EL.shape)
    lines = []
    for step in steps:
        mask_EL = experts.mask_EL | (order > step / steps[-1])
        expert_T = np.where(random.random(len(experts.expert_T)) < step / steps[-1], experts.expert_T, 0)
        lines.append({"step": step, "keep_ratio": 1 - 0.1 * step, **describe_masks(mask_EL, expert_T)})
    (folder / "history.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def experts_of(kind, count=4, timesteps=1000, seed=0):
    cost, random = count_cost(make_unet() if kind == "unet" else make_dit(12), 16 if kind == "unet" else 8), \
        np.random.default_rng(seed)
    expert_T = np.repeat(random.integers(count - (count > 1), size=timesteps // 20), 20)  # the last one is unused
    return TemporalExperts.build(random.random((count, len(cost.sites))) < 0.6, expert_T, cost, 0.6, "total")


def site_names(experts):
    """The figures' short name of every site, told apart by the numbers in both."""
    order, names = report.layers(experts.sites)
    assert sorted(order) == list(range(len(names))) and len(set(names)) == len(names)
    return dict(zip(names, (experts.sites[i] for i in order), strict=True))


def rows(axis):
    return [label.get_text() for label in axis.get_yticklabels()]


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_layers_come_in_the_order_in_which_data_passes_them(kind):
    """Reference: the order of the calls in a forward of the model."""
    model = make_model(kind).eval()
    sites, calls = tuple(site.name for site in find_sites(model)), []
    for name in sites:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    positional, named = make_inputs(kind)
    with torch.no_grad():
        model(*positional, **named)
    order, names = report.layers(sites)
    assert [sites[i] for i in order] == calls
    assert [re.findall(r"\d+", name) for name in names] == [
        re.findall(r"\d+", call.removesuffix(".transformer_blocks.0") if kind == "unet" else call) for call in calls]
    parts = [name.split()[0] for name in names]
    assert parts == (["block"] * 4 if kind == "dit" else sorted(parts, key=["down", "mid", "up"].index))


def test_layer_names_stay_apart():
    several = tuple(f"up_blocks.0.attentions.1.transformer_blocks.{i}" for i in range(11))
    assert report.layers(several) == (
        list(range(11)), ["up 0 attention 1", *(f"up 0 attention 1.{i}" for i in range(1, 11))])
    assert report.layers(("elsewhere.2", "mid_block.resnets.0")) == ([1, 0], ["mid resnet 0", "elsewhere.2"])


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_masks_are_the_experts_masks(kind):
    experts = experts_of(kind)
    value_L = (np.array(experts.macs) / experts.macs_total if kind == "unet" else
               report.kept_frequency(experts.mask_EL, experts.expert_T))
    figure = report.masks_figure(experts)
    axis = figure.axes[0]
    drawn = next(part for part in axis.collections if isinstance(part, QuadMesh)).get_array()
    crosses = {(row, column) for column, row in axis.collections[1].get_offsets()}
    for row, name in enumerate(rows(axis)):
        index = experts.sites.index(site_names(experts)[name])
        for e in range(3):
            assert drawn.mask[row, e] == (not experts.mask_EL[e, index]) == ((row + 0.5, e + 0.5) in crosses)
            if experts.mask_EL[e, index]:
                assert drawn[row, e] == pytest.approx(value_L[index])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "1", "2"]
    assert axis.get_title("left").endswith("\nUnused: expert 3") and "Identical" not in figure.get_label()
    borders = sum(line.get_ydata()[0] not in (0, len(experts.sites)) for line in axis.lines)
    assert borders == (2 if kind == "unet" else 0)
    for e in range(3):
        said = re.search(rf"Expert {e} keeps (\d+) of (\d+) layers and skips ([^.]*)\.", figure.get_label())
        assert int(said[1]) == experts.mask_EL[e].sum() and int(said[2]) == len(experts.sites)
        assert {site_names(experts)[name] for name in said[3].split(", ")} == {
            site for site, keeps in zip(experts.sites, experts.mask_EL[e], strict=True) if not keeps}


def test_identical_experts_are_named_and_layers_of_one_cost_stay_apart():
    experts = experts_of("dit", 6)
    mask_EL = experts.mask_EL.copy()
    mask_EL[3], mask_EL[4], mask_EL[2] = mask_EL[0], mask_EL[1], mask_EL[0]
    mask_EL[5] = mask_EL[1]  # unused
    experts = dataclasses.replace(experts, mask_EL=mask_EL)
    assert identical(experts) == [[0, 2, 3], [1, 4]] and len(set(experts.macs)) == 1
    figure = report.masks_figure(experts)
    axis = figure.axes[0]
    assert "\nIdentical experts: 0 = 2 = 3; 1 = 4\n" in axis.get_title("left")
    assert "Identical experts: 0 = 2 = 3; 1 = 4." in figure.get_label()
    drawn = next(part for part in axis.collections if isinstance(part, QuadMesh)).get_array()
    frequency_L = report.kept_frequency(mask_EL, experts.expert_T)[report.layers(experts.sites)[0]]
    assert len(set(frequency_L)) > 2
    for row, frequency in enumerate(frequency_L):
        assert np.allclose(drawn[row].compressed(), frequency)


def test_of_a_ladder_the_chosen_rungs_experts_are_drawn(tmp_path):
    experts = chain(make_dit(12))
    for target in TARGETS:
        one = experts.choose(target)
        masks, routes, alike = (draw(one) for draw in (report.masks_figure, report.routes_figure,
                                                       report.similarity_figure))
        numbers = [str(e) for e in sorted(set(one.expert_T.tolist()))]
        assert len(numbers) == 2 and [label.get_text() for label in masks.axes[0].get_xticklabels()] == numbers
        some = {int(e) for rung in experts.ladder for e in rung.expert_T}
        assert f"\n{len(some) - 2} more in other rungs, {12 - len(some)} unused" in masks.axes[0].get_title("left")
        assert [name.split()[0] for name in rows(routes.axes[0])] == rows(alike.axes[0]) == numbers
        crosses = {(row, column) for column, row in masks.axes[0].collections[1].get_offsets()}
        skipped = ~one.mask_EL[one.used][:, report.layers(one.sites)[0]]
        assert crosses == {(row + 0.5, column + 0.5) for column, row in np.argwhere(skipped)}
        colours = {e: bars.get_facecolor()[0].tolist() for e, bars in zip(one.used, routes.axes[0].collections,
                                                                          strict=True)}
        steps = report.steps_figure(one, [999, 400, 100])
        assert [list(bar.get_facecolor()) for bar in steps.axes[0].patches] == [
            colours[e] for e in one.expert_T[[999, 400, 100]]]
        assert len(set(map(tuple, colours.values()))) == 2
        report.plot_experts(one, tmp_path / "experts.png")


def test_routes_and_macs_of_every_timestep():
    experts = experts_of("unet")
    figure = report.routes_figure(experts)
    painted = np.full(1000, -1)
    for e, bars in enumerate(figure.axes[0].collections):
        for path in bars.get_paths():
            box = path.get_extents()
            assert box.y0 < e < box.y1
            painted[round(box.x0):round(box.x1)] = e
    assert np.array_equal(painted, experts.expert_T)
    assert f"Expert 0 serves {(experts.expert_T == 0).sum()} of 1000 timesteps, in" in figure.get_label()
    assert experts.used == [0, 1, 2] and "Expert 3" not in figure.get_label()

    macs = [experts.macs_total - sum(m for m, keeps in zip(experts.macs, experts.mask_EL[e], strict=True) if not keeps)
            for e in experts.expert_T]
    line, mean = report.macs_figure(experts).axes[0].lines
    assert np.allclose(line.get_ydata() * experts.macs_total, macs)
    assert mean.get_ydata()[0] == pytest.approx(np.mean(macs) / experts.macs_total)
    sampled = dataclasses.replace(experts, timesteps=(5, 500))
    nearest_T = np.arange(1000) > 252  # to 500, not to 5
    mean = (np.mean(np.array(macs)[~nearest_T]) + np.mean(np.array(macs)[nearest_T])) / 2
    assert report.macs_figure(sampled).axes[0].lines[1].get_ydata()[0] == pytest.approx(mean / experts.macs_total)


def test_a_bar_for_every_denoising_step():
    experts, timesteps = experts_of("dit"), [999, 640, 320, 1, 0]
    figure = report.steps_figure(experts, timesteps)
    axis = figure.axes[0]
    assert [bar.get_height() for bar in axis.patches] == pytest.approx(
        [experts.macs_T[t] / experts.macs_total for t in timesteps])
    assert [text.get_text() for text in axis.texts] == [str(experts.expert_T[t]) for t in timesteps]
    assert [label.get_text() for label in axis.get_xticklabels()] == list(map(str, timesteps))
    total = sum(experts.macs_T[t] for t in timesteps)
    assert f"5 denoising steps take {macs(total)}, {total / 5 / experts.macs_total:.1%} of dense" \
        in figure.get_label()


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_kept_frequency_and_similarity(kind):
    experts = experts_of(kind)
    axis = report.frequency_figure(experts).axes[0]
    for name, bar in zip(rows(axis), axis.patches, strict=True):
        index, kept = experts.sites.index(site_names(experts)[name]), 0
        for expert in experts.expert_T:
            kept += experts.mask_EL[expert, index]
        assert bar.get_width() == pytest.approx(kept / 1000)

    figure = report.similarity_figure(experts)
    kept = [{i for i, keeps in enumerate(mask_L) if keeps} for mask_L in experts.mask_EL[:3]]
    expected = [[sum(experts.macs[i] for i in a & b) / sum(experts.macs[i] for i in a | b) for b in kept] for a in kept]
    assert np.allclose(figure.axes[0].collections[0].get_array(), expected)
    assert [text.get_text() for text in figure.axes[0].texts] == [f"{v:.2f}" for row in expected for v in row]
    highest = max((expected[a][b], (a, b)) for a in range(3) for b in range(a))
    assert "Most similar: experts {1[1]} and {1[0]} ({0:.2f}).".format(*highest) in figure.get_label()
    assert report.similarity_figure(experts_of(kind, count=1)).get_label() == "There is only one expert."
    nothing = dataclasses.replace(experts, mask_EL=np.zeros_like(experts.mask_EL))
    assert (report.similarity(nothing) == 1).all()


def test_the_course_of_the_search(tmp_path):
    experts = experts_of("unet")
    write_history(tmp_path, experts, (10, 20, 40))
    records = read_history(tmp_path / "history.jsonl", 1000)
    ratio, kept, _ = report.evolution_figure(records, experts).axes
    assert ratio.lines[0].get_xydata().tolist() == [[10, 0], [20, -1], [40, -3]]
    drawn, names = kept.collections[0].get_array(), rows(kept)
    routing, masks = report.routing_figure(records, experts), report.mask_history_figure(records, experts)
    assert len(masks.axes) == len(routing.axes) == 3  # of four, of which one never serves
    for column, record in enumerate(records):
        for row, name in enumerate(names):
            index = experts.sites.index(site_names(experts)[name])
            runs = [record["mask_EL"][e, index] for e in record["expert_T"]]
            assert drawn[row, column] == pytest.approx(np.mean(runs))
            for e, axis in enumerate(masks.axes):
                assert axis.collections[0].get_array()[row, column] == record["mask_EL"][e, index]
        for e, axis in enumerate(routing.axes):
            for low in range(100):
                assert axis.collections[0].get_array()[low, column] == pytest.approx(
                    np.mean([expert == e for expert in record["expert_T"][10 * low:10 * low + 10]]))
    assert f"Expert 1 serves {(records[0]['expert_T'] == 1).mean():.0%} of the timesteps at step 10, " in \
        routing.get_label()
    assert f"Expert 2 keeps {records[0]['mask_EL'][2].sum()} layers at step 10, " in masks.get_label()
    for figure in (report.evolution_figure, report.mask_history_figure, report.routing_figure):
        assert figure(records[:1], experts)


def test_losses_of_both_phases(small_config):
    run = train(small_config("dit")).run_dir
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure = report.losses_figure(lines)
    assert [axis.get_title("left").removesuffix(", log scale") for axis in figure.axes] == list(report.LOSSES.values())
    for axis, name in zip(figure.axes, report.LOSSES, strict=True):
        for phase, label in (("search", "hypernetwork's update"), ("train", "backbone's update")):
            expected = [(line["step"], line[f"{phase}/{name}"]) for line in lines if f"{phase}/{name}" in line]
            drawn = [line.get_xydata().tolist() for line in axis.lines if line.get_label() == label]
            assert drawn == ([list(map(list, expected))] if expected else [])
        assert [patch.get_x() for patch in axis.patches] == [1]  # the search: steps 1 to 3
        assert [patch.get_x() + patch.get_width() for patch in axis.patches] == [3]
    falling = [{"step": s, "train/perf": 10.0**-s, "train/denoise": 0.0} for s in range(3)]
    assert [axis.get_yscale() for axis in report.losses_figure(falling).axes] == ["log", "linear"]


def test_sensitivity(tmp_path):
    experts = experts_of("unet")
    error_LB = np.random.default_rng(0).exponential(size=(len(experts.sites), 4))
    table = dataclasses.replace(table_of(error_LB, denoise=2.0), sites=experts.sites)
    figure = report.sensitivity_figure(table)
    for row, name in enumerate(rows(figure.axes[0])):
        index = experts.sites.index(site_names(experts)[name])
        drawn = figure.axes[0].collections[0].get_array()[row]
        assert np.allclose(drawn, np.maximum(error_LB[index] / 2, error_LB.max() / 2e4))
    worst = np.unravel_index(error_LB.argmax(), error_LB.shape)
    names = {site: name for name, site in site_names(experts).items()}
    assert f"Skipping {names[experts.sites[worst[0]]]} at timesteps {250 * worst[1]}-" in figure.get_label()
    report.plot_sensitivity(dataclasses.replace(table, error_LB=np.zeros_like(error_LB)), tmp_path / "none.png")
    assert (tmp_path / "none.png").is_file()


def test_samples_and_pngs(tmp_path):
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    figure = report.samples_figure({"dense\n9 GMACs": images, "ex$perts": images * 3}, ["0", "1", NASTY])
    assert np.allclose(figure.axes[1].images[0].get_array(), (images[1, 0] + 1) / 2)
    assert figure.axes[4].images[0].get_array().max() <= 1
    assert [axis.get_ylabel() for axis in figure.axes[::3]] == ["dense\n9 GMACs", "ex$perts"]
    assert {axis.yaxis.label.get_rotation() for axis in figure.axes[::3]} == {0}
    assert [axis.get_title("center") for axis in figure.axes[:2]] == ["0", "1"]
    assert "Rows: dense, 9 GMACs; ex$perts." in figure.get_label()
    report.plot_samples({"dense": images}, ["a $5 note", "of $1", NASTY], tmp_path / "samples.png")
    report.plot_samples({"dense": images[:1].expand(14, -1, -1, -1)}, 14 * ["0"], tmp_path / "many.png")
    assert Image.open(tmp_path / "many.png").width <= 1700
    for count in (1, 4, 10):
        report.plot_experts(experts_of("unet", count), tmp_path / f"{count}.png")
        assert np.asarray(Image.open(tmp_path / f"{count}.png").convert("L")).std() > 30


@pytest.mark.parametrize("channels", [1, 3])
def test_a_strip_keeps_its_images_and_captions(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(256, size=(3, 8, 8, channels), dtype=np.uint8)
    captions = ["a red circle", NASTY, "Größe"]
    save_strip(pixels, captions, tmp_path / "strip.png")
    images, found = read_strip(tmp_path / "strip.png")
    assert found == captions
    assert all(np.array_equal(np.asarray(image).reshape(8, 8, channels), wanted)
               for image, wanted in zip(images, pixels, strict=True))
    images[0].resize((16, 8)).save(tmp_path / "without.png")
    assert read_strip(tmp_path / "without.png")[1] == ["image 1", "image 2"]


def test_the_figure_of_an_ablation():
    rows = [{"variant": variant, "run": variant, "budget": 1.0, "rung": rung, "seed": seed, "share": share, "fd": fd,
             "drift": fd / 100}
            for variant, rung, seed, share, fd in (
                ("dense", 0.5, 0, 0.5, 6.0), ("dense", 0.5, 1, 0.5, 8.0), ("dense", 1.0, 0, 1.0, 4.0),
                ("planned", 0.5, 0, 0.48, 5.0), ("planned", 0.25, 0, 0.25, 9.0))]
    figure = report.fronts_figure(rows)
    figure.canvas.draw()
    distance, drift = figure.axes
    for axis, scale in ((distance, 1), (drift, 0.01)):
        dense, planned = (line.get_xydata() for line in axis.lines)
        assert np.allclose(dense, [(0.5, 7 * scale), (1, 4 * scale)])
        assert np.allclose(planned, [(0.25, 9 * scale), (0.48, 5 * scale)])
        band = axis.collections[0].get_paths()[0].vertices
        assert np.allclose((band[:, 1].min(), band[:, 1].max()), (4 * scale, (7 + 2**0.5) * scale))
        assert {text.get_text() for text in axis.texts} == {"dense, fewer steps", "steps and depth planned"}