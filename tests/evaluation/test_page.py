"""The page that holds the figures."""

import dataclasses
import json
import os
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
import yaml
from conftest import SMALL, make_dit, merge, save_pipeline
from helpers import table_of
from PIL import Image
from test_report import NASTY, experts_of, write_history

from alter import InputError, TemporalExperts, load_config, train
from alter.backbones.latency import Latency
from alter.evaluation.report import figures as report
from alter.evaluation.report.page import build_page, read_run
from alter.evaluation.report.records import write_sensitivity
from alter.evaluation.report.words import number, percent

SCRIPTS = Path(__file__).parents[2] / "scripts"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FULL = ("config.yaml", "metrics.jsonl", "history.jsonl", "summary.json", "metrics.json", "sensitivity.json",
        "samples.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on digits, with everything that the page can show."""
    root = tmp_path_factory.mktemp("report")
    content = merge(SMALL, {
        "name": "small", "backbone": {"pretrained": str(save_pipeline(root / "pretrained", make_dit()))},
        "output_dir": str(root / "run"), "data": {"source": "digits", "resolution": 8},
        "validate": {"every": 3, "labels": [1, 2]}, "evaluate": {"dense": True}})
    (root / "small.yaml").write_text(yaml.safe_dump(content))
    folder = train(load_config(root / "small.yaml")).run_dir
    experts = TemporalExperts.from_pretrained(folder / "final")
    write_history(folder, experts)
    table = dataclasses.replace(table_of(np.random.default_rng(1).exponential(size=(4, 5))), sites=experts.sites)
    write_sensitivity(table, folder / "sensitivity.json")
    (folder / "metrics.json").write_text(json.dumps({"fid": {"value": 12.5, "protocol": "some"}}))
    return folder


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copied"))


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
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(page.all("svg")) + sum(
        attributes["class"] == "samples" for attributes in page.all("img"))  # others are cells of a table with a head
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1 and max(np.diff(levels)) <= 1
    assert report.INK not in text and page.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    return page


def test_a_page_of_everything(run):
    loaded = read_run(run)
    page = check(build_page([loaded]))
    text = "".join(page.text)
    assert len(page.all("svg")) == 11 and len(page.all("img")) == 7  # samples.png; two at each of steps 0, 3 and 6
    assert "Stepclass 1class 2\n0, dense\n" in text and "\n6, experts\n" in text and "None" not in text
    assert [text for level, text in page.headings] == [
        "Temporal experts", "small", "Samples", "Measurements", "Experts", "Cost", "Search and training",
        "Validation images", "Sensitivity", "Configuration"]
    assert [link["href"] for link in page.all("a")] == [f"#{attributes['id']}" for tag, attributes in page.tags
                                                        if tag in ("h2", "h3")]
    before, _, after = text.partition("small: ")
    assert "Samples" not in before and re.match(
        r"[\d.]+% of the dense model's MACs per step \(target: 65%\)\. An image in 2 steps takes [\d.]+ .MACs, "
        r"[\d.]+ times fewer than the [\d.]+ .MACs of the dense model in 50 steps\. Fréchet distance "
        r"[\d.,]+, accuracy [\d.]+%; dense in 50 steps: Fréchet distance [\d.,]+, accuracy [\d.]+%\.", after)
    assert ": the run has no" not in text and "The ranking of the layers is" in text
    assert loaded.experts.summary() in text
    for key, value in (("against the dense model's output", loaded.summary["output_error"]), ("fid", 12.5)):
        assert f"{key}{number(value)}\n" in text
    assert f"experts, 2 stepsFréchet distance {number(loaded.summary['fd_experts'])}, accuracy " in text
    assert f"fd_experts: {loaded.summary['fd_experts']}\n" in text
    assert "train.steps632000\n" in text and "train.search_steps3null\n" in text  # key, value, default
    assert "seed00" not in text and "holdout: 8" in text
    labels = " ".join(attributes["aria-label"] for attributes in page.all("svg"))
    for e, mask_L in enumerate(loaded.experts.mask_EL):
        assert (f"Expert {e} keeps {mask_L.sum()} of 4 layers and" in labels) == (e in loaded.experts.used)
    assert build_page([read_run(run)]) == build_page([loaded])  # nothing random, no date


def test_a_measured_time_is_in_the_headline_and_the_table(run):
    loaded = read_run(run)
    latency = Latency(loaded.experts.sites, (1.0,) * 4, 5.0, "some GPU", "fp16", 1, 8)
    experts = dataclasses.replace(loaded.experts, latency=latency)
    text = "".join(check(build_page([dataclasses.replace(loaded, experts=experts)])).text)
    assert f"MACs per step, {percent(experts.time_ratio)} of its time (target: 65%)" in text
    assert f"time kept{percent(experts.time_ratio)} of the dense model's, measured on {latency.place}\n" in text


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
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/latest").symlink_to(run)
    assert read_run(tmp_path / "runs").name == read_run(run / "final").name == "small"


def test_several_runs_are_compared(run, copied):
    (copied / "metrics.json").unlink()
    config = yaml.safe_load((copied / "config.yaml").read_text())
    (copied / "config.yaml").write_text(yaml.safe_dump({**config, "name": "other"}))
    page = check(build_page([read_run(run), read_run(copied)]))
    shared = Path(os.path.commonpath([run.resolve().parent, copied.resolve().parent]))
    places = [str(folder.resolve().relative_to(shared)) for folder in (run, copied)]
    assert [text for level, text in page.headings if level == 2] == ["Comparison", f"small ({places[0]})",
                                                                     f"other ({places[1]})"]
    text = "".join(page.text)
    assert "fid12.5–\n" in text and len(page.all("svg")) == 22
    compared = text.partition("Everything in summary.json")[0]
    assert "namesmallother\n" in compared and "train.steps" not in compared  # keys that differ, no other


def test_content_is_escaped(copied):
    config = yaml.safe_load((copied / "config.yaml").read_text())
    name = NASTY.replace("/", "|")
    config = merge(config, {"name": name, "validate": {"labels": [], "prompts": [NASTY]}, "data": {"path": NASTY}})
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    (copied / "summary.json").write_text(json.dumps({NASTY: NASTY, "output_error": NASTY, "fd_dense": None}))
    experts = (copied / "final/experts.json").read_text()
    assert experts.count('"transformer_blocks.2"') == 1
    (copied / "final/experts.json").write_text(experts.replace('"transformer_blocks.2"', json.dumps(NASTY)))
    (copied / "sensitivity.json").unlink()
    (copied / "metrics.json").write_text(json.dumps({NASTY: {"value": NASTY}}))
    (copied / "samples" / "step-000009-a & <b> 'c'.png").write_bytes((copied / "samples.png").read_bytes())
    page = check(build_page([read_run(copied)]))
    assert (2, name) in page.headings and "".join(page.text).count(NASTY) >= 11
    assert "Fréchet distance" not in "".join(page.text)
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
        assert all(contrast(colour, colours["paper"]) >= 3 for colour in report.EXPERTS)
    cividis = matplotlib.colormaps["cividis"]
    for value in np.linspace(0, 1, 101):
        text = "#000000" if value > 0.47 else "#ffffff"
        assert contrast(matplotlib.colors.to_hex(cividis(value)), text) >= 4.5


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


def test_nothing_global_changes(run):
    matplotlib.get_backend()  # which is found at the first question
    before = matplotlib.rcParams.copy()
    build_page([read_run(run)])
    assert matplotlib.rcParams == before and not plt.get_fignums()
