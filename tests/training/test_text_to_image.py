"""Captioned images to a fine-tuned Stable Diffusion with experts, on a tiny complete pipeline."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL, merge, save_stable_diffusion
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from helpers import KEYS, SHORT, run_script
from helpers import load_quietly as pipeline
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPTextModel

from alter import InputError, TemporalExperts, load_config, train
from alter.backbones.draws import generator
from alter.backbones.schedules import load_scheduler
from alter.common.load import CONFIGS, save_config
from alter.data.shapes import COLOURS, KINDS, draw_shapes, kinds, write_shapes
from alter.evaluation.report.figures import summary_table
from alter.training.demo import make_tokenizer
from alter.training.demo_images import demo_reference
from alter.training.setup.parts import build
from alter.training.setup.plan import check

TEMPLATE = CONFIGS / "models/demo/sd-shapes"
PROMPTS = ["a small red circle left of a large blue square", "a green triangle"]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run directory of a small run with validation images and an average of the weights."""
    folder = tmp_path_factory.mktemp("sd")
    save_stable_diffusion(folder / "pretrained")
    write_shapes(folder / "shapes", 24, 0)
    (folder / "config.yaml").write_text(yaml.safe_dump(merge(SMALL, {
        "backbone": {"pretrained": str(folder / "pretrained")}, "output_dir": str(folder / "run"), "name": "tiny",
        "data": {"path": str(folder / "shapes"), "resolution": 32}, "log": {"tracker": "tensorboard"},
        "train": {"ema_decay": 0.5}, "validate": {"every": 3, "prompts": PROMPTS},
        "evaluate": {"guidance_scale": 2.0},
    })))
    return train(load_config(folder / "config.yaml")).run_dir


def test_prompts_are_encoded_as_the_pipeline_encodes_them(small_config):
    parts = build(small_config("sd"))
    pipe = pipeline(parts.folder)
    given, nothing = pipe.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=["", ""])
    batch = {"captions": PROMPTS}
    kept = parts.conditioning(batch, torch.tensor([False, False]))["encoder_hidden_states"]
    half = parts.conditioning(batch, torch.tensor([False, True]))["encoder_hidden_states"]
    assert torch.equal(kept, given)
    assert torch.allclose(half, torch.stack([given[0], nothing[1]]), atol=1e-6)


def test_samples_are_those_of_the_pipeline(small_config):
    parts = build(small_config("sd", evaluate={"guidance_scale": 3.0}))
    pipe = pipeline(parts.folder)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(parts.scheduler.config)
    theirs = pipe(PROMPTS, generator=[generator(3, i, 7) for i in range(2)], height=32, width=32,
                  num_inference_steps=4, guidance_scale=3.0, output_type="pt").images
    ours = parts.draw(parts.teacher.eval(), {"captions": PROMPTS}, 4, 3)
    assert torch.allclose((ours + 1) / 2, theirs, atol=1e-4)


def test_final_is_a_pipeline_whose_experts_serve_text_and_image_to_image(finished):
    final = finished / "final"
    experts = TemporalExperts.from_pretrained(final)
    image = Image.new("RGB", (32, 32), "white")
    for cls, arguments in ((StableDiffusionPipeline, {"height": 32, "width": 32}),
                           (StableDiffusionImg2ImgPipeline, {"image": image, "strength": 0.6})):
        pipe = pipeline(final, cls)

        def draw(pipe=pipe, arguments=arguments):
            return np.asarray(pipe(PROMPTS[0], num_inference_steps=5, generator=torch.Generator().manual_seed(0),
                                   **arguments).images[0])

        dense = draw()
        assert dense.shape == (32, 32, 3)
        experts.apply(pipe)
        skipping = draw()
        experts.remove(pipe)
        assert not np.array_equal(dense, skipping) and np.array_equal(dense, draw())


def strip_of(folder, experts=None):
    """What the pipeline in `folder` draws for PROMPTS with the run's seed and settings, side by side."""
    pipe = pipeline(folder)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(load_scheduler(folder).config)
    if experts is not None:
        experts.apply(pipe)
    images = pipe(PROMPTS, generator=[generator(0, i, 7) for i in range(2)], height=32, width=32,
                  num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    return np.concatenate(list(images * 255), axis=1)


def test_validation_images_are_of_the_dense_model_first_and_then_of_what_would_be_exported(finished):
    names = sorted(path.name for path in (finished / "samples").iterdir())
    assert names == ["step-000000-dense.png", "step-000003-experts.png", "step-000006-experts.png"]
    experts = TemporalExperts.from_pretrained(finished / "final")
    dense, _, last = (np.asarray(Image.open(finished / "samples" / name)).astype(float) for name in names)
    for shown, wanted in ((dense, strip_of(finished.parent / "pretrained")),
                          (last, strip_of(finished / "final", experts))):
        assert shown.shape == (32, 64, 3) and abs(shown - wanted).max() <= 1
    assert abs(dense - last).max() > 2

    (events,) = finished.glob("**/events.out.tfevents*")
    log = EventAccumulator(str(events.parent), size_guidance={"images": 0}).Reload()
    assert {image.step for image in log.Images("samples/experts")} == {3, 6}
    assert {image.step for image in log.Images("samples/dense")} == {0}


def test_the_model_card_is_written_from_the_run(finished):
    card = (finished / "final/README.md").read_text()
    summary = json.loads((finished / "summary.json").read_text())
    assert card.startswith("---\nlibrary_name: diffusers\n") and "StableDiffusionPipeline.from_pretrained" in card
    assert f"{summary['keep_ratio']:.1%}" in card and f"{summary['macs_experts']:,}" in card
    assert "against the dense model's output" in card and summary_table(summary) in card and "names none" in card


def test_the_card_takes_the_licence_of_the_base_model(small_config):
    config = small_config("sd", train={"steps": 1, "search_steps": 1})
    base = Path(str(config.backbone.pretrained))
    (base / "README.md").write_text("---\nlicense: openrail++\ntags: [x]\n---\n# Base\n")
    card = (train(config).run_dir / "final/README.md").read_text()
    assert "license: openrail++" in card and "Licence: openrail++" in card and "# Base" not in card


def test_one_caption_of_several_is_drawn_and_too_long_ones_are_counted(small_config, tmp_path):
    config = small_config("sd", data={"label_dropout": 0.0, "holdout": 0})
    file = tmp_path / "shapes/metadata.jsonl"
    long = "a small red circle " * 8
    lines = [{**json.loads(line), "text": [long, long]} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((train(config).run_dir / "summary.json").read_text())
    assert summary["truncated_prompts"] == 6 * 8 and summary["output_error"] is None
    pipe = pipeline(config.backbone.pretrained)
    expected = pipe.encode_prompt([long], "cpu", 1, False)[0]
    told = build(config).conditioning({"captions": [long]}, torch.tensor([False]))
    assert torch.equal(told["encoder_hidden_states"], expected)


def test_unreadable_images_are_skipped_counted_named_and_bounded(small_config, tmp_path):
    changes = {"data": {"holdout": 0, "max_unreadable": 0.1}, "train": {"batch_size": 24}}
    config = small_config("sd", **changes)
    (tmp_path / "shapes/00003.png").write_bytes(b"")
    run = train(config).run_dir
    assert json.loads((run / "summary.json").read_text())["skipped_samples"] == 6
    named = [json.loads(line) for line in (run / "unreadable.jsonl").read_text().splitlines()]
    assert [line["step"] for line in named] == [1, 2, 3, 4, 5, 6]
    assert all("00003.png: " in line["sample"] for line in named)

    for i in range(4):
        (tmp_path / f"shapes/0000{i}.png").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"data.max_unreadable=0.1: 4 samples of data.path=.* could not be read"):
        train(small_config("sd", **changes, output_dir="second"))


def _rewrite(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _wide_text(folder):
    _rewrite(folder / "text_encoder/config.json", hidden_size=16)


def _long_tokenizer(folder):
    _rewrite(folder / "tokenizer/tokenizer_config.json", model_max_length=77)


def _no_tokenizer(folder):
    (folder / "tokenizer/tokenizer_config.json").unlink()


def _few_tokens(folder):
    model = CLIPTextModel.from_pretrained(folder / "text_encoder")
    model.resize_token_embeddings(20)
    model.save_pretrained(folder / "text_encoder")


def _other_prediction(folder):
    _rewrite(folder / "scheduler/scheduler_config.json", prediction_type="flow")


def _broken_line(folder):
    file = folder.parent / "shapes/metadata.jsonl"
    file.write_text("\n".join([*file.read_text().splitlines()[:4], '{"file_name": "00004.png"']))


def _missing_image(folder):
    (folder.parent / "shapes/00002.png").unlink()


def test_counts_survive_a_resume(small_config, tmp_path):
    changes = {"data": {"holdout": 0, "max_unreadable": 0.5}, "train": {"batch_size": 24}, "checkpoint": {"every": 4}}
    config = small_config("sd", **changes)
    (tmp_path / "shapes/00003.png").write_bytes(b"")
    run = train(config).run_dir
    before = (run / "unreadable.jsonl").read_text()
    train(small_config("sd", output_dir=None, resume=str(run / "checkpoints/step-000004"), **changes))
    assert json.loads((run / "summary.json").read_text())["skipped_samples"] == 6
    assert (run / "unreadable.jsonl").read_text() == before


@pytest.mark.parametrize("spoil, message", [
    (_wide_text, "hidden_size=16 does not fit the backbone's cross_attention_dim=12"),
    (_long_tokenizer, "model_max_length=77 does not fit the text encoder's max_position_embeddings=16"),
    (_no_tokenizer, "tokenizer_config.json cannot be read"),
    (_few_tokens, "tokens do not fit the text encoder's vocab_size=20"),
    (_other_prediction, "prediction_type='flow': use one of epsilon"),
    (_broken_line, "line 5"), (_missing_image, "00002.png"),
])
def test_bad_input_is_refused_before_anything_is_written(small_config, tmp_path, spoil, message):
    config = small_config("sd")
    spoil(Path(str(config.backbone.pretrained)))
    with pytest.raises(InputError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()


def test_bad_input_through_the_script(small_config, tmp_path):
    config = small_config("sd")
    _broken_line(Path(str(config.backbone.pretrained)))
    save_config(config, tmp_path / "bad.yaml")
    result = run_script("train", "--config", "bad.yaml", cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and "metadata.jsonl line 5: not JSON" in line


def test_what_json_tells_is_refused_before_weights_are_loaded(small_config):
    config = small_config("sd")
    _wide_text(Path(str(config.backbone.pretrained)))
    with pytest.raises(InputError, match="hidden_size=16"):
        check(config, 1)


def test_drawings_show_what_their_captions_say():
    images, captions = draw_shapes(60, 5)
    background = np.array([245, 245, 245])
    for image, (full, short) in zip(images, captions, strict=True):
        pixels = np.asarray(image).astype(int)
        asked = [kind for kind in KINDS if kind in full]
        assert kinds(full).tolist() == [float(kind in asked) for kind in KINDS] == kinds(short).tolist()
        assert len(asked) == (2 if " a " in full[1:] else 1)
        seen = {name for name, colour in COLOURS.items() if (abs(pixels - colour).max(-1) < 12).sum() > 12}
        assert seen == {kind.split()[0] for kind in asked}
        assert (abs(pixels - background).max(-1) < 3).mean() > 0.3
        if len(seen) == 2:
            first, second = (next(name for name in part.split() if name in COLOURS) for part in full.split(" a "))
            (y1, x1), (y2, x2) = (np.argwhere(abs(pixels - COLOURS[name]).max(-1) < 12).mean(0)
                                  for name in (first, second))
            relation = next(name for name in ("left of", "above") if name in full)
            assert {"left of": x1 < x2, "above": y1 < y2}[relation]


def test_the_demos_tokenizer_keeps_every_word_whole():
    tokenizer = make_tokenizer(TEMPLATE / "text_encoder")
    _, captions = draw_shapes(200, 0)
    for caption in [caption for several in captions for caption in several]:
        tokens = tokenizer(caption).input_ids
        assert len(tokens) == len(caption.split()) + 2 <= tokenizer.model_max_length
    assert tokenizer.decode(tokenizer("unseen words").input_ids, skip_special_tokens=True).strip() == "unseen words"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_reference_for_every_seed_that_has_not_seen_the_training_data(seed):
    source = SimpleNamespace(encoded=False)
    first, again = (demo_reference(load_config("configs/demo_sd.yaml", [f"seed={s}", "evaluate.samples=100"]), source)
                    for s in (0, seed))
    assert torch.equal(first.images, again.images) and first.titles == again.titles
    trained = {image.tobytes() for image in draw_shapes(800, seed)[0]}
    compared = {((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy().tobytes() for image in again.images}
    assert len(compared) > 500 and len(trained & compared) < 0.02 * len(compared)  # some are alike by chance


@pytest.mark.parametrize("dense", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_demo_in_short(tmp_path, real_pictures, dense):
    config = load_config("configs/demo_sd.yaml", [
        *SHORT, "demo.steps=4", "demo.vae_steps=4", "demo.images=300", "train.steps=4", "train.search_steps=2",
        "validate.every=4", "demo.batch_size=8", "train.batch_size=8",
        f"evaluate.dense={str(dense).lower()}",
    ])
    run = train(config).run_dir
    summary = json.loads((run / "summary.json").read_text())
    measured = KEYS if dense else KEYS - {"fd_dense", "fd_dense_50", "accuracy_dense"}
    assert measured <= summary.keys()
    assert 0.5 <= summary["keep_ratio"] <= 0.655  # the least error within the budget, after four steps
    assert summary["truncated_prompts"] == 0 == summary["skipped_samples"]
    for name in ("samples.png", "experts.png"):
        assert np.array(Image.open(run / name)).std() > 3
    pipe = pipeline("outputs/demo_sd/teacher")
    sites = {site.rpartition(".")[0].split(".")[0] for site in TemporalExperts.from_pretrained(run / "final").sites}
    assert sites == {"down_blocks", "mid_block", "up_blocks"}
    assert pipe(PROMPTS[0], num_inference_steps=2).images[0].size == (32, 32)
