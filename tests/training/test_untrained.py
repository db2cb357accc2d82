"""`alter measure --apply`: experts of a pretrained pipeline as it is, and what they lose."""

import numpy as np
import pytest
import torch
from conftest import make_dit, make_vae, save_pipeline
from diffusers import DPMSolverMultistepScheduler
from helpers import load_quietly
from pipelines import PROMPTS, SIZE, backbones, make_pipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import alter.commands.measure
from alter import TemporalExperts, load_config
from alter.backbones.draws import generator
from alter.backbones.latents import final_latents
from alter.commands import main
from alter.data.drawn import Drawn
from alter.evaluation.pairs import drift
from alter.experts.load import usual_guidance
from alter.training.setup.parts import Parts, build
from alter.training.untrained import Lost, check, find_untrained, verdict

QUICK = ["--bins", "3", "--keep", "0.7", "--images", "3", "evaluate.sampling_steps=4"]


def save(name, folder):
    """A tiny pipeline, and the arguments that name its conditions."""
    if name.startswith("dit"):
        save_pipeline(folder, make_dit() if name == "dit" else make_dit(channels=4))  # of pixels, or of latents
        if name == "dit_vae":
            make_vae().save_pretrained(folder / "vae")
        return ["--labels", "0-1,7"]
    make_pipeline(name, folder)
    (folder.parent / "prompts.txt").write_text("\n".join(PROMPTS))
    return ["--prompts", str(folder.parent / "prompts.txt"), "--resolution", "32"]


@pytest.mark.parametrize("name", ["dit", "dit_vae", "sd", "flux", pytest.param("wan22", marks=pytest.mark.slow)])
def test_two_lines(tmp_path, capsys, name):
    words = save(name, tmp_path / "pipe")
    component = "transformer_2" if name == "wan22" else None
    pair = [f"backbone.component={component}"] if component else []
    out = tmp_path / "experts"
    assert main(["measure", "--apply", "--pipeline", str(tmp_path / "pipe"), *words, "--out", str(out), *QUICK,
                 *pair]) == 0
    said = capsys.readouterr()
    assert "forwards of one sample" in said.err and "draw 3 images" in said.err
    experts = TemporalExperts.from_pretrained(out)
    assert experts.component == component and experts.keep_ratio_target == 0.7 and experts.measured.steps == (
        3 if component else 4)  # as many as were drawn; of two backbones, its own
    assert not any(rung.tuned for rung in experts.ladder)
    assert len(experts.measured.error_MB) == len(experts.mask_EL) and experts.measured.samples == 3
    each = {tuple(mask_L) for mask_L in experts.mask_EL}
    assert experts.mask_EL[0].all() and all(  # each but the first is another without one of its layers
        any(tuple(mask_L | (np.arange(len(mask_L)) == layer)) in each for layer in np.flatnonzero(~mask_L))
        for mask_L in experts.mask_EL[1:])
    errors = [rung.error for rung in experts.ladder]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0  # more cost, less error; the dense model, none
    for rung in experts.ladder:
        assert experts.choose(rung).keep_ratio <= rung.keep_ratio_target + 0.006
    assert experts.table() in said.out and "dense at " in said.out and "drift in latents" in said.out
    backbone = backbones(make_pipeline(name))[component or "transformer"] if name in ("flux", "wan22") else None
    if backbone is not None:
        experts.apply(backbone, keep_ratio=0.75)
        experts.remove(backbone)


def drawn_config(folder, count, **changes):
    return load_config({
        "backbone": {"pretrained": str(folder)},
        "data": {"path": "drawn", "resolution": 32, "holdout": 0}, "budget": {"keep_ratio": 1.0},
        "search": {"method": "elastic", "samples": count, "bins": 3}, "train": {"mixed_precision": "no"},
        "evaluate": {"sampling_steps": 4, "guidance_scale": 2.0}, **changes})


def test_masks_go_by_the_features_of_a_network(tmp_path, capsys):
    words = save("dit_vae", tmp_path / "pipe")
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=8)).save_pretrained(tmp_path / "clip")
    command = ["measure", "--apply", "--pipeline", str(tmp_path / "pipe"), *words, *QUICK,
               f"search.features={tmp_path / 'clip'}"]
    assert main([*command, "--out", str(tmp_path / "once")]) == 0
    assert ", in features)" in capsys.readouterr().out
    # Features three times as large move nine times as far, squared, and latents as before.
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    weights["visual_projection.weight"] *= 3
    save_file(weights, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    assert main([*command, "--out", str(tmp_path / "thrice")]) == 0
    once, thrice = (TemporalExperts.from_pretrained(tmp_path / name).measured for name in ("once", "thrice"))
    assert once.space == "features" and set(once.response) == {"features", "residuals", "latents"}
    np.testing.assert_allclose(thrice.response["features"], 9 * once.response["features"], rtol=1e-3)
    np.testing.assert_allclose(thrice.response["latents"], once.response["latents"])
    errors = [TemporalExperts.from_pretrained(tmp_path / name).rung.error for name in ("once", "thrice")]
    assert errors[1] == pytest.approx(9 * errors[0], rel=1e-3) and errors[0] > 0


@pytest.mark.parametrize(("name", "given", "message"), [
    ("dit_vae", "nowhere", "search.features='nowhere': no such model"),
    ("dit_vae", "clip", "clip: Error no file named"),  # a configuration without weights
    ("dit_latents", "clip", "samples of this backbone cannot be decoded"),
    ("flux", "clip", "samples of this backbone cannot be decoded")])
def test_features_that_cannot_be_had_are_refused_first(tmp_path, capsys, monkeypatch, name, given, message):
    words = save(name, tmp_path / "pipe")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Parts, "drawn", None)
    assert main(["measure", "--apply", "--pipeline", str(tmp_path / "pipe"), *words, "--out", str(tmp_path / "out"),
                 *QUICK, f"search.features={given}"]) == 2
    assert message in capsys.readouterr().err


def test_what_is_lost_is_what_the_users_pipeline_loses(tmp_path):
    """Reference: the pipeline as diffusers loads it, with the experts applied as a user does, or with fewer steps."""
    prompts = [*PROMPTS, "a large red square"]
    make_pipeline("sd", tmp_path)
    config = drawn_config(tmp_path, 3)
    parts = build(config, source=Drawn(prompts), frozen=torch.float32)
    assert parts.teacher is parts.backbone and parts.vae is parts.conditioner.pipe.vae
    before = {name: value.clone() for name, value in parts.backbone.state_dict().items()}
    experts, lost = find_untrained(config, parts, prompts, [0.8], batch_size=2)
    assert all(torch.equal(value, before[name]) for name, value in parts.backbone.state_dict().items())
    assert [one.name for one in lost] == ["keep 0.8", "dense at 3 steps"] and lost[1].macs == 0.75

    pipe = load_quietly(tmp_path)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

    def draw(steps):
        # The second batch of two has one image.
        return torch.cat([pipe(prompts[i : i + 2], **SIZE, num_inference_steps=steps, guidance_scale=2.0,
                               output_type="latent", generator=[generator(0, k, 7) for k in range(i, min(i + 2, 3))]
                               ).images for i in (0, 2)])

    dense = draw(4)
    torch.testing.assert_close(parts.source.latents, dense, atol=1e-4, rtol=1e-3)
    visited = pipe.scheduler.timesteps.numpy()
    with experts.apply(pipe, keep_ratio=0.8):
        ours = draw(4)
    assert lost[0].latents.value == pytest.approx(drift(ours, dense).value, rel=1e-3)
    assert lost[1].latents.value == pytest.approx(drift(draw(3), dense).value, rel=1e-3)
    assert lost[0].macs == pytest.approx(experts.macs_T[visited].mean() / experts.macs_total)
    # The prediction's unit: mean squared displacement of an element, relative to that between dense samples.
    between = np.mean([(dense[i] - dense[k]).square().sum().item() for i in range(3) for k in range(3) if i != k])
    measured, bins = experts.measured, np.searchsorted(experts.measured.edges, np.arange(1000), side="right") - 1
    each_T = measured.error_MB[experts.rung.expert_T, bins] / np.diff(measured.edges)[bins]
    moved = float(each_T @ measured.response["latents"][bins])
    assert lost[0].predicted == pytest.approx(moved * dense[0].numel() / between, rel=1e-3)
    assert "less than dense at 3 steps" in verdict(lost)


def test_final_latents_are_those_of_every_call():
    pipe = make_pipeline("sd")
    settings = {**SIZE, "num_inference_steps": 2, "output_type": "latent"}
    with final_latents(pipe.scheduler) as found:
        each = [pipe("a red circle", **settings, generator=torch.Generator().manual_seed(seed)).images
                for seed in range(2)]
    assert len(found) == 2 and all(map(torch.equal, found, each))
    assert not {"step", "set_timesteps"} & vars(pipe.scheduler).keys()


def test_budgets_that_no_mask_reaches_are_left_out_or_refused(tmp_path, capsys):
    save_pipeline(tmp_path, make_dit())
    config = drawn_config(tmp_path, 3, data={"path": "drawn", "resolution": 8, "holdout": 0})
    parts = build(config, source=Drawn([0, 1, 2]), frozen=torch.float32)
    least = parts.budget.fixed + 0.25 * parts.budget.share_L.sum()
    low, high = least - 0.02, least + 0.02
    assert check(config, parts, [low, high]) == [high] and f"keep {low:g} is left out" in capsys.readouterr().err
    with pytest.raises(alter.InputError, match="of this backbone's cost remains at least"):
        check(config, parts, [low])


def test_the_usual_guidance(tmp_path):
    for name, scale in (("sd", 7.5), ("flux", 3.5), ("qwen", 4.0)):
        make_pipeline(name, tmp_path / name)
        assert usual_guidance(tmp_path / name) == scale
    save_pipeline(tmp_path / "dit", make_dit())
    assert usual_guidance(tmp_path / "dit") == 1.0  # it names no pipeline's class


def test_verdict_says_when_fewer_steps_lose_less():
    def lost(name, value, width):
        return Lost(name, 0.7, alter.evaluation.pairs.Estimate(value, 0.1, value - width, value + width), None, None,
                    None)

    for ours, control, width, better, told in (
            (0.1, 0.5, 0.05, True, True), (0.5, 0.1, 0.05, False, True), (0.5, 0.4, 0.2, False, False)):
        said = verdict([lost("keep 0.7", ours, width), lost("dense at 14 steps", control, width)])
        assert (", less than dense at" in said) == better and ("cannot tell apart" not in said) == told
        assert ("draw fewer steps" in said) == (told and not better)
