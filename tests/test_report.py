"""What the figures draw, against the artefact, and the page that holds them."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL, make_dit, make_inputs, make_model, make_unet, merge, save_pipeline
from matplotlib.collections import QuadMesh
from PIL import Image
from test_sensitivity import table_of

from alter import InputError, TemporalExperts, load_config, report, train
from alter.cost import count_cost
from alter.history import describe_masks, read_history
from alter.page import build_page, read_run
from alter.sites import find_sites

SCRIPTS = Path(__file__).parents[1] / "scripts"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = """<script>alert(1)</script> & "x" '$y$ ]]>"""
FULL = ("config.yaml", "metrics.jsonl", "history.jsonl", "summary.json", "metrics.json", "sensitivity.json",
        "samples.png")


def write_history(folder, experts, steps=(1, 2, 3)):
    random = np.random.default_rng(0)
    order = random.random(experts.mask_EL.shape)
    lines = []
    for step in steps:
        mask_EL = experts.mask_EL | (order > step / steps[-1])
        expert_T = np.where(random.random(len(experts.expert_T)) < step / steps[-1], experts.expert_T, 0)
        lines.append({"step": step, "keep_ratio": 1 - 0.1 * step, **describe_masks(mask_EL, expert_T)})
    (folder / "history.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on digits, with everything that the page can show."""
    root = tmp_path_factory.mktemp("report")
    content = merge(SMALL, {
        "name": "small", "backbone": {"pretrained": str(save_pipeline(root / "pretrained", make_dit()))},
        "output_dir": str(root / "run"), "data": {"source": "digits", "resolution": 8},
        "validate": {"every": 3, "labels": [1, 2]}})
    (root / "small.yaml").write_text(yaml.safe_dump(content))
    folder = train(load_config(root / "small.yaml"))
    experts = TemporalExperts.from_pretrained(folder / "final")
    write_history(folder, experts)
    table = dataclasses.replace(table_of(np.random.default_rng(1).exponential(size=(4, 5))), sites=experts.sites)
    table.save(folder / "sensitivity.json")
    (folder / "metrics.json").write_text(json.dumps({"fid": {"value": 12.5, "protocol": "some"}}))
    return folder


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copied"))


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
    figure = report.masks_figure(experts)
    axis = figure.axes[0]
    drawn = next(part for part in axis.collections if isinstance(part, QuadMesh)).get_array()
    crosses = {(row, column) for column, row in axis.collections[1].get_offsets()}
    for row, name in enumerate(rows(axis)):
        index = experts.sites.index(site_names(experts)[name])
        for e in range(4):
            assert drawn.mask[row, e] == (not experts.mask_EL[e, index]) == ((row + 0.5, e + 0.5) in crosses)
            if experts.mask_EL[e, index]:
                assert drawn[row, e] == pytest.approx(experts.macs[index] / experts.macs_total)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "1", "2", "3\nunused"]
    borders = sum(line.get_ydata()[0] not in (0, len(experts.sites)) for line in axis.lines)
    assert borders == (2 if kind == "unet" else 0)
    for e in range(4):
        said = re.search(rf"Expert {e} keeps (\d+) of (\d+) layers and skips ([^.]*)\.", figure.get_label())
        assert int(said[1]) == experts.mask_EL[e].sum() and int(said[2]) == len(experts.sites)
        assert {site_names(experts)[name] for name in said[3].split(", ")} == {
            site for site, keeps in zip(experts.sites, experts.mask_EL[e], strict=True) if not keeps}


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
    assert "Expert 3 serves 0 of 1000 timesteps." in figure.get_label()

    macs = [experts.macs_total - sum(m for m, keeps in zip(experts.macs, experts.mask_EL[e], strict=True) if not keeps)
            for e in experts.expert_T]
    line, mean = report.macs_figure(experts).axes[0].lines
    assert np.allclose(line.get_ydata() * experts.macs_total, macs)
    assert mean.get_ydata()[0] == pytest.approx(np.mean(macs) / experts.macs_total)
    sampled = dataclasses.replace(experts, timesteps=(5, 500))
    assert report.macs_figure(sampled).axes[0].lines[1].get_ydata()[0] == pytest.approx(
        (macs[5] + macs[500]) / 2 / experts.macs_total)


def test_a_bar_for_every_denoising_step():
    experts, timesteps = experts_of("dit"), [999, 640, 320, 1, 0]
    figure = report.steps_figure(experts, timesteps)
    axis = figure.axes[0]
    assert [bar.get_height() for bar in axis.patches] == pytest.approx(
        [experts.macs_T[t] / experts.macs_total for t in timesteps])
    assert [text.get_text() for text in axis.texts] == [str(experts.expert_T[t]) for t in timesteps]
    assert [label.get_text() for label in axis.get_xticklabels()] == list(map(str, timesteps))
    total = sum(experts.macs_T[t] for t in timesteps)
    assert f"5 denoising steps take {report.count(total)} MACs, {total / 5 / experts.macs_total:.1%} of dense" \
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
    kept = [{i for i, keeps in enumerate(mask_L) if keeps} for mask_L in experts.mask_EL]
    expected = [[sum(experts.macs[i] for i in a & b) / sum(experts.macs[i] for i in a | b) for b in kept] for a in kept]
    assert np.allclose(figure.axes[0].collections[0].get_array(), expected)
    assert [text.get_text() for text in figure.axes[0].texts] == [f"{v:.2f}" for row in expected for v in row]
    highest = max((expected[a][b], (a, b)) for a in range(4) for b in range(a))
    assert "Most alike are experts {1[1]} and {1[0]} ({0:.2f}).".format(*highest) in figure.get_label()
    assert report.similarity_figure(experts_of(kind, count=1)).get_label() == ""
    nothing = dataclasses.replace(experts, mask_EL=np.zeros_like(experts.mask_EL))
    assert (report.similarity(nothing) == 1).all()


def test_the_course_of_the_search(tmp_path):
    experts = experts_of("unet")
    write_history(tmp_path, experts, (10, 20, 40))
    records = read_history(tmp_path / "history.jsonl", 1000)
    ratio, kept, _ = report.evolution_figure(records, experts).axes
    assert ratio.lines[0].get_xydata().tolist() == [[10, 0], [20, -1], [40, -3]]
    drawn, names = kept.collections[0].get_array(), rows(kept)
    routing = report.routing_figure(records, experts)
    for column, record in enumerate(records):
        for row, name in enumerate(names):
            index = experts.sites.index(site_names(experts)[name])
            runs = [record["mask_EL"][e, index] for e in record["expert_T"]]
            assert drawn[row, column] == pytest.approx(np.mean(runs))
        for e, axis in enumerate(routing.axes):
            for low in range(100):
                assert axis.collections[0].get_array()[low, column] == pytest.approx(
                    np.mean([expert == e for expert in record["expert_T"][10 * low:10 * low + 10]]))
    assert f"Expert 1 serves {(records[0]['expert_T'] == 1).mean():.0%} of the timesteps at step 10, " in \
        routing.get_label()
    assert report.evolution_figure(records[:1], experts) and report.routing_figure(records[:1], experts)


def test_losses_of_both_phases(run):
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
    figure = report.samples_figure({"dense": images, "ex$perts": images * 3}, ["0", "1", NASTY])
    assert np.allclose(figure.axes[1].images[0].get_array(), (images[1, 0] + 1) / 2)
    assert figure.axes[4].images[0].get_array().max() <= 1
    report.plot_samples({"dense": images}, ["a $5 note", "of $1", NASTY], tmp_path / "samples.png")
    for count in (1, 4, 10):
        report.plot_experts(experts_of("unet", count), tmp_path / f"{count}.png")
        assert np.asarray(Image.open(tmp_path / f"{count}.png").convert("L")).std() > 30


def test_nothing_global_changes(run):
    matplotlib.get_backend()  # which is found at the first question
    before = matplotlib.rcParams.copy()
    build_page([read_run(run)])
    assert matplotlib.rcParams == before and not plt.get_fignums()


class Page(HTMLParser):
    """Refuses unbalanced tags; collects what is in the page."""

    VOID = {"meta", "img", "br", "hr", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.headings = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            self.headings.append((int(self.open[-1][1]), data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def check(text):
    """What holds for every page."""
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "metadata"})
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), attributes[name][:80]
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", str(attributes)))
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style and "http" not in style
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"] for _, attributes in page.tags if attributes.get("href", "").startswith("#")}
    targets = {link[1:] for link in links} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert targets <= set(ids)
    assert all(attributes["role"] == "img" and len(attributes["aria-label"]) > 20 for attributes in page.all("svg"))
    assert all(len(attributes["alt"]) > 10 for attributes in page.all("img"))
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(page.all("svg")) + len(page.all("img"))
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1 and max(np.diff(levels)) <= 1
    assert report.INK not in text and page.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    return page


def test_a_page_of_everything(run):
    loaded = read_run(run)
    page = check(build_page([loaded]))
    text = "".join(page.text)
    assert len(page.all("svg")) == 10 and len(page.all("img")) == 4  # samples.png, and at steps 0, 3 and 6
    assert ": the run has no" not in text and "The ranking of the layers is" in text
    assert loaded.experts.summary() in text
    for key, value in (("Output error against the dense model", loaded.summary["output_error"]),
                       ("Fréchet distance, experts", loaded.summary["fd_experts"]), ("fid (metrics.json)", 12.5)):
        assert f"{key}{report.readable(value)}\n" in text
    assert "train.steps632000\n" in text and "train.search_steps3None\n" in text  # key, value, default
    assert "seed00" not in text and "holdout: 8" in text
    labels = " ".join(attributes["aria-label"] for attributes in page.all("svg"))
    for e, mask_L in enumerate(loaded.experts.mask_EL):
        assert f"Expert {e} keeps {mask_L.sum()} of 4 layers" in labels
    assert build_page([read_run(run)]) == build_page([loaded])  # nothing random, no date


@pytest.mark.parametrize("missing", [FULL, FULL[::2], FULL[1::2]])
def test_a_page_says_what_a_run_lacks(copied, missing):
    for name in missing:
        (copied / name).unlink()
    if "samples.png" in missing:
        shutil.rmtree(copied / "samples")
    text = "".join(check(build_page([read_run(copied)])).text)
    assert sorted(re.findall("the run has no ([^ ]+)\\.(?=\n|$)", text)) == sorted({*missing} - {"metrics.json"})


def test_a_saved_folder_alone(run, tmp_path):
    experts = read_run(run).experts
    experts.save_pretrained(tmp_path / "saved")
    page = check(build_page([read_run(tmp_path / "saved")]))
    assert (2, "saved") in page.headings and "the run has no scheduler/." in "".join(page.text)
    with_latency = tmp_path / "runs"
    with_latency.mkdir()
    (with_latency / "latest").symlink_to(run)
    assert read_run(with_latency).name == read_run(run / "final").name == "small"


def test_several_runs_are_compared(run, copied):
    (copied / "metrics.json").unlink()
    config = yaml.safe_load((copied / "config.yaml").read_text())
    (copied / "config.yaml").write_text(yaml.safe_dump({**config, "name": "other"}))
    page = check(build_page([read_run(run), read_run(copied)]))
    assert [text for level, text in page.headings if level == 2] == ["Comparison", "small (run)", "other (copied)"]
    assert "fid (metrics.json)12.5000–\n" in "".join(page.text) and len(page.all("svg")) == 20


def test_content_is_escaped(copied):
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config = merge(config, {"name": NASTY, "validate": {"labels": [], "prompts": [NASTY]}, "data": {"path": NASTY}})
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    (copied / "summary.json").write_text(json.dumps({NASTY: NASTY, "output_error": NASTY, "fd_dense": None}))
    experts = (copied / "final/experts.json").read_text()
    assert experts.count('"transformer_blocks.2"') == 1
    (copied / "final/experts.json").write_text(experts.replace('"transformer_blocks.2"', json.dumps(NASTY)))
    (copied / "sensitivity.json").unlink()
    (copied / "metrics.json").write_text(json.dumps({NASTY: {"value": NASTY}}))
    (copied / "samples" / "step-000009-a & <b> 'c'.png").write_bytes((copied / "samples.png").read_bytes())
    page = check(build_page([read_run(copied)]))
    assert (2, NASTY) in page.headings and "".join(page.text).count(NASTY) >= 11
    assert "Fréchet distance, dense" not in "".join(page.text)
    assert NASTY in " ".join(attributes["aria-label"] for attributes in page.all("svg"))
    assert any("<b> 'c'" in attributes["alt"] for attributes in page.all("img"))


def test_contrast():
    """WCAG AA, in both colour schemes: 4.5 for text, 3 for the graphics' own colours."""
    def luminance(colour):
        colour = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    style = build_page([]).partition("<style>")[2]
    found = [dict(re.findall(r"--(\w+): (#\w+)", part)) for part in style.split("@media")]
    assert len(found) == 2
    for colours in found:
        for text in ("ink", "muted"):
            assert contrast(colours[text], colours["paper"]) >= 4.5 <= contrast(colours["ink"], colours["soft"])
        assert all(contrast(colour, colours["paper"]) >= 2.8 for colour in report.EXPERTS)
    cividis = matplotlib.colormaps["cividis"]
    for value in np.linspace(0, 1, 101):
        text = "#000000" if value > 0.47 else "#ffffff"
        assert contrast(matplotlib.colors.to_hex(cividis(value)), text) >= 4.4


@pytest.mark.parametrize("name, content", [
    ("config.yaml", "no: such key"), ("summary.json", "{"), ("summary.json", "[1]"), ("metrics.json", '{"fid": 3}'),
    ("metrics.jsonl", "nothing"), ("history.jsonl", '{"step": 1}'), ("sensitivity.json", "{}"),
    ("history.jsonl", '{"step": 1, "keep_ratio": 1, "masks": ["01", "10"], "routes": [[0, 1]]}'),
])
def test_bad_files_are_named(copied, name, content):
    (copied / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(str(copied / name))) as error:
        read_run(copied)
    assert "\n" not in str(error.value)


def test_the_script(run, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    sys.modules.pop("report", None)
    import report as script

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        return script.main(), capsys.readouterr()

    code, output = main("--run", run)
    assert code == 0 and str(run / "report.html") in output.out
    check((run / "report.html").read_text())
    assert main("--run", run, run, "--out", tmp_path / "both.html")[0] == 0
    check((tmp_path / "both.html").read_text())
    for arguments, said in ((["--run", tmp_path / "none"], "name a finished run"),
                            (["--run", run, "--out", tmp_path / "no/such.html"], "--out"),
                            (["--run", run, "--out", tmp_path], "--out")):
        code, output = main(*arguments)
        assert code == 2 and output.out == "" and said in output.err
        assert output.err.startswith("error: ") and output.err.count("\n") == 1


MEASURE = """<script>
const problems = [], near = (a, b) => a > b + 1;
addEventListener("error", event => problems.push("error: " + event.message));
addEventListener("load", () => {
  const page = document.documentElement;
  if (page.scrollWidth > innerWidth) problems.push("page of " + page.scrollWidth);
  for (const element of document.querySelectorAll("main > *, figure, table, pre"))
    if (near(element.getBoundingClientRect().right, innerWidth) && !element.closest(".box"))
      problems.push(element.tagName + " is too wide");
  for (const svg of document.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
    texts.forEach(([name, box], i) => {
      if (near(frame.left, box.left) || near(box.right, frame.right) || near(frame.top, box.top) ||
          near(box.bottom, frame.bottom)) problems.push("clipped: " + name);
      for (const [other, next] of texts.slice(i + 1))
        if (Math.min(box.right, next.right) - Math.max(box.left, next.left) > 1 &&
            Math.min(box.bottom, next.bottom) - Math.max(box.top, next.top) > 3)
          problems.push("overlap: " + name + " and " + other);
    });
    const scale = frame.width / svg.viewBox.baseVal.width;
    for (const text of svg.querySelectorAll("text"))
      if (parseFloat(getComputedStyle(text).fontSize) * scale < 9.9) problems.push("tiny: " + text.textContent);
    const fill = getComputedStyle(svg.querySelector("text")).fill;
    if (fill !== getComputedStyle(document.body).color) problems.push("text of colour " + fill);
  }
  for (const entry of performance.getEntriesByType("resource"))
    if (!entry.name.startsWith("data:")) problems.push("request: " + entry.name);
  parent.postMessage(JSON.stringify([innerWidth, getComputedStyle(document.body).color, problems]), "*");
});
</script>"""
FRAME = """<html style="color-scheme: light dark"><script>
addEventListener("message", event => document.documentElement.setAttribute("data-said", event.data));
</script><iframe src="measured.html" width="WIDTH" height="9000" frameborder="0"></iframe></html>"""


@pytest.fixture(scope="module")
def pages(run, tmp_path_factory):
    """page.html on two runs, and measured.html, which looks at itself."""
    folder = tmp_path_factory.mktemp("pages")
    unet = experts_of("unet", 10)
    unet.save_pretrained(folder / "unet")
    write_history(folder / "unet", unet)
    text = build_page([read_run(run), read_run(folder / "unet")])
    (folder / "page.html").write_text(text)
    (folder / "measured.html").write_text(text.replace("<head>", "<head>" + MEASURE, 1))
    return folder


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(pages, tmp_path, width, dark):
    """Nothing overflows, overlaps or is clipped; both colour schemes are followed; nothing is logged or requested."""
    def browse(page, *arguments):
        done = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
             f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
             f"--window-size={width},9000", *arguments, (pages / page).as_uri()],
            capture_output=True, text=True, timeout=120)
        assert "CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    (pages / f"frame-{width}.html").write_text(FRAME.replace("WIDTH", str(width)))
    inside, colour, problems = json.loads(
        Page(browse(f"frame-{width}.html", "--dump-dom")).all("html")[0]["data-said"])
    assert inside == width and problems == []
    assert colour == ("rgb(231, 234, 238)" if dark else "rgb(26, 31, 38)")
    browse("page.html", f"--screenshot={tmp_path / 'shot.png'}")
    picture = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    assert picture.shape == (9000, width, 3)
    assert (picture[2, 2] == ((20, 24, 29) if dark else (255, 255, 255))).all()
    assert picture[:2000].std() > 20


def test_the_figure_of_an_ablation_has_plain_numbers_at_its_axes():
    rows = [{"variant": "alter", "sampling_steps": 20, "time_ratio": time, "output_error": error, "fd": 1e4 * error}
            for time, error in ((0.5, 0.0019), (0.65, 0.031))]
    figure = report._quality_figure(rows)
    figure.canvas.draw()
    labels = [text.get_text() for axis in figure.axes for text in axis.get_yticklabels(which="both")]
    assert {"0.002", "0.02", "20", "200"} <= set(labels) and not any("$" in label for label in labels)
