"""`alter plan`, and drawing with what it wrote."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import make_unet, save_stable_diffusion
from diffusers import DPMSolverMultistepScheduler
from helpers import chain, known_cost, load_quietly
from PIL import Image

from alter import TemporalExperts
from alter.backbones.stepping import only_steps
from alter.commands import main
from alter.method.measured import Measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    final, unet = save_stable_diffusion(root / "run/final"), make_unet()
    count = len(known_cost(unet, 16).sites)
    measured = Measured((0, 500, 1000), 0.01 * np.arange(count)[:, None] ** 2 * np.array([2.0, 1.0]),
                        {"latents": np.ones(2)}, "any", 4, 2.0, 8)
    chain(unet, 16, measured=measured).save_pretrained(final)
    (root / "prompts.txt").write_text("a red circle\na blue square\n")
    return root


def plan(folder, *arguments):
    return main(["plan", "--run", str(folder / "run"), "--prompts", str(folder / "prompts.txt"), "--out",
                 str(folder / "planned"), "--images", "2", *arguments])


def test_the_front_is_printed_drawn_and_written(folder, capsys):
    solver = ["--scheduler", "DPMSolverMultistepScheduler", "--guidance", "2"]
    assert plan(folder, *solver, "--dense-pipeline", str(folder / "run/final")) == 2  # its weights are tuned
    assert plan(folder, *solver) == 0
    printed = capsys.readouterr().out
    content = json.loads((folder / "planned/plan.json").read_text())
    chosen, rows = content["chosen"], content["front"]
    assert {row["series"] for row in rows} == {"dense", "chosen", "one mask", "experts", "planned"}
    assert all(title in printed for title in ("dense, fewer steps", "chosen steps", "one mask", "all steps",
                                              "planned"))
    assert chosen["share"] <= 0.5 and sum(row["share"] <= 0.5 for row in rows) > 3
    assert f"chosen: {chosen['steps']} steps of" in printed and len(chosen["layers"]) == chosen["steps"]
    for row in rows:
        if row["series"] == "planned":
            assert all(row["predicted"] <= other["predicted"] * (1 + 1e-3) for other in rows
                       if other["share"] <= row["share"])
    assert Image.open(folder / "planned/plan.png").size[0] > 300

    experts = TemporalExperts.from_pretrained(folder / "planned")
    assert experts.rung.steps == chosen["steps"] and experts.rung.error == chosen["predicted"]
    drawing = ["sample", "--run", str(folder / "run"), "--prompts", str(folder / "prompts.txt"), *solver, "--plan",
               str(folder / "planned"), "--out", str(folder / "drawn")]
    assert main([*drawing, "--steps", "99"]) == 2
    assert "is of" in capsys.readouterr().err
    assert main([*drawing, "--latents"]) == 0
    assert json.loads((folder / "drawn/manifest.json").read_text())["settings"]["steps"] == chosen["steps"]
    reference = ["sample", "--run", str(folder / "run"), "--prompts", str(folder / "prompts.txt"), *solver, "--dense",
                 "--steps", "16", "--latents", "--out", str(folder / "many")]
    against = ["evaluate", "--images", str(folder / "drawn"), "--against", str(folder / "many"), "--metrics",
               "drift_latents", "--out", str(folder / "against.json")]
    assert main(reference) == main(against) == 0
    drift = json.loads((folder / "against.json").read_text())["drift_latents"]["value"]
    assert chosen["drift"] == pytest.approx(drift, rel=1e-3)
    assert chosen["drift"] / chosen["predicted_drift"] == pytest.approx(chosen["measured"] / chosen["predicted"])
    pipe = load_quietly(folder / "run/final")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert _planned(pipe, experts, chosen) == Image.open(folder / "drawn/000000.png").tobytes()


def test_of_two_steps_at_most_the_front_is_short(folder):
    assert plan(folder, "--scheduler", "DPMSolverMultistepScheduler", "--most", "2", "--share", "1") == 0
    front = json.loads((folder / "planned/plan.json").read_text())["front"]
    assert {row["steps"] for row in front} == {2}


def test_a_cached_plan_is_drawn_by_its_folder(folder, tmp_path, capsys):
    solver = ["--scheduler", "DPMSolverMultistepScheduler", "--guidance", "2"]
    assert plan(folder, *solver, "--cached", "--share", "0.8") == 0
    content = json.loads((folder / "planned/plan.json").read_text())
    chosen, experts = content["chosen"], TemporalExperts.from_pretrained(folder / "planned")
    assert chosen["cached"] and experts.rung.cached and "cached" in capsys.readouterr().out
    assert chosen["predicted"] == chosen["measured"] and 0.3 < chosen["share"] <= 0.8
    assert len({row["share"] for row in content["front"] if row["series"] == "cached"}) > 2
    assert main(["sample", "--run", str(folder / "run"), "--prompts", str(folder / "prompts.txt"), *solver, "--plan",
                 str(folder / "planned"), "--out", str(tmp_path / "drawn")]) == 0
    pipe, uncached = load_quietly(folder / "run/final"), dataclasses.replace(
        experts, ladder=(dataclasses.replace(experts.rung, cached=False),))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    found = Image.open(tmp_path / "drawn/000000.png").tobytes()
    assert _planned(pipe, experts, chosen) == found != _planned(pipe, uncached, chosen)


def _planned(pipe, experts, chosen):
    """The first image, by the experts that the plan's folder holds."""
    with (experts.apply(pipe), only_steps(pipe.scheduler, chosen["taken"], chosen["asked"]),
          experts.following(pipe)):
        return pipe(["a red circle", "a blue square"], guidance_scale=2.0, num_inference_steps=chosen["asked"],
                    generator=[torch.Generator().manual_seed(i) for i in range(2)]).images[0].tobytes()


def test_a_plan_of_the_dense_model_is_drawn_by_it(folder, tmp_path, capsys):
    """By its weights, not by the tuned ones at full depth."""
    original, unet = save_stable_diffusion(tmp_path / "original"), make_unet()
    unet.conv_out.weight.data *= 1.5
    unet.save_pretrained(original / "unet")
    solver = ["--scheduler", "DPMSolverMultistepScheduler", "--guidance", "2"]
    assert plan(folder, *solver, "--dense-pipeline", str(original), "--quality", "3", "--own-steps") == 0
    assert "chosen: 3 steps of the dense model" in capsys.readouterr().out
    drawing = ["sample", "--prompts", str(folder / "prompts.txt"), *solver, "--seed", "5"]
    assert main([*drawing, "--run", str(folder / "run"), "--plan", str(folder / "planned"), "--out",
                 str(tmp_path / "planned")]) == 0
    assert main([*drawing, "--run", str(original), "--dense", "--steps", "3", "--out", str(tmp_path / "dense")]) == 0
    first, second = (Image.open(tmp_path / name / "000000.png").tobytes() for name in ("planned", "dense"))
    assert first == second


@pytest.mark.parametrize(("words", "message"), [
    (["--share", "0"], "--share 0.0: choose a number above 0"), (["--most", "1"], "--most 1: choose at least 2"),
    (["--cached", "--quality", "3"], "--cached: is planned for MACs"),
    (["--macs", "nan"], "--macs nan"), (["--original"], "has no config.yaml"),
])
def test_refusals(folder, capsys, words, message):
    assert plan(folder, *words) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
