"""Aspect-ratio buckets: batches of one shape, from images and from encoded data."""

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import config_factory
from helpers import make_trainer, metrics_of
from PIL import Image
from pipelines import make_pipeline

from alter import InputError, train
from alter.data.batches import GlobalBatches, Order, WithSubstitutes, of_one_shape
from alter.data.encode import encode
from alter.data.images import bucket_sizes, load_pixels, measure
from alter.data.open import open_source
from alter.training.probe import Probe
from alter.training.setup.parts import build
from alter.training.setup.plan import check

RATIOS = [(32, 32), (64, 32), (30, 60), (48, 40)]


def bucket_config(folder, name, **changes):
    """Captioned shapes of four ratios of sides for a tiny pipeline of that name."""
    if not (folder / name).exists():
        make_pipeline(name, folder / name)
    data = {"bucket_step": 8, "label_dropout": 0.5, **changes.pop("data", {})}
    config = config_factory(folder)("sd", backbone={"pretrained": str(folder / name)}, data=data, **changes)
    if not (folder / "stretched").exists():
        shutil.copytree(folder / "shapes", folder / "stretched")
        for i, file in enumerate(sorted((folder / "stretched").glob("*.png"))):
            Image.open(file).resize(RATIOS[i % 4]).save(file)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(folder / "stretched")))


def encoded(config, folder):
    encode(config, folder, 10, 4, PartialState())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source="latents", path=str(folder)))


@pytest.mark.parametrize("resolution, step", [(1024, 64), (512, 64), (512, 16), (96, 96)])
def test_shapes_have_about_as_many_pixels_as_the_square(resolution, step):
    sizes = bucket_sizes(resolution, step)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert (width, height) in sizes and height % step == width % step == 0
        assert height * width == pytest.approx(resolution**2, rel=0.25) and 1 / 4 <= height / width <= 4
    assert step == resolution or {(resolution // 2, 2 * resolution), (2 * resolution, resolution // 2)} <= set(sizes)


def stream(buckets, processes, first=0, last=40):
    """The batches of all processes."""
    order = Order(np.arange(3, 3 + 50), 0)
    each = [list(GlobalBatches(order, 8, 2, rank, processes, first, last, buckets)) for rank in range(processes)]
    return [sum((part for rank in range(processes) for part in each[rank][2 * step : 2 * step + 2]), [])
            for step in range(last - first)]


def test_global_batches_have_one_shape_and_every_sample_its_turn():
    buckets = np.random.default_rng(0).choice([0, 1, 5], 60, p=[0.7, 0.25, 0.05])
    batches = stream(buckets, 1)
    for batch in batches:
        assert len(batch) == 8 and len({buckets[index] for _, index in batch}) == 1
    drawn = Counter(key for batch in batches for key in batch)
    assert max(drawn.values()) == 1
    turns = Counter(index for _, index in drawn)
    assert {index for index in turns if buckets[index] < 5} == {i for i in range(3, 53) if buckets[i] < 5}
    assert stream(buckets, 2) == batches == stream(buckets, 4)
    assert stream(buckets, 2, 13, 21) == batches[13:21]


def test_parts_of_one_shape():
    buckets = np.array([0, 1, 0, 0, 1, 0])
    parts = of_one_shape(np.array([5, 4, 3, 2, 1]), 2, buckets)
    assert [part.tolist() for part in parts] == [[5, 3], [2], [4, 1]]
    assert [part.tolist() for part in of_one_shape(np.arange(5), 3, None)] == [[0, 1, 2], [3, 4]]


def test_headers_tell_the_shape_that_is_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (20, 10)).save(tmp_path / "plain.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.tif", exif=exif)
    Image.new("RGB", (20, 10)).save(tmp_path / "profile.png", exif=b"Exif\0\0no profile")
    (tmp_path / "broken.png").write_bytes(b"x")
    for name in ("turned.jpg", "plain.png", "turned.tif", "profile.png"):
        shown = load_pixels(tmp_path / name, [(10, 10)], (0.5, 0.5), False)
        assert measure(tmp_path / name) == tuple(shown["sizes"][:2].tolist()), name
    assert measure(tmp_path / "turned.jpg") == (20, 10) and measure(tmp_path / "broken.png") is None


def test_an_unusable_sample_is_replaced_by_one_of_its_shape(tmp_path):
    config = bucket_config(tmp_path, "sd")
    files = sorted(Path(config.data.path).glob("*.png"))
    source = open_source(config)
    files[1].write_bytes(files[1].read_bytes()[:120])
    sample = WithSubstitutes(source, np.arange(24), 0)[0, 1]
    assert sample["skipped"] and sample["bucket"] == source.buckets[1]
    assert tuple(sample["images"].shape[1:]) == source.framing.sizes[source.buckets[1]] == (24, 48)


def test_a_shape_of_which_no_sample_can_be_used(tmp_path):
    """Its batches are of one other shape, of all its samples."""
    config = bucket_config(tmp_path, "sd")
    files = sorted(Path(config.data.path).glob("*.png"))
    for i in (0, 4):  # a shape of two samples
        Image.open(files[i]).resize((96, 32)).save(files[i])
    source = open_source(config)
    two = np.flatnonzero(source.buckets == source.buckets[0])
    assert two.tolist() == [0, 4]
    for i in two:
        files[i].write_bytes(files[i].read_bytes()[:120])
    usable = WithSubstitutes(source, np.arange(24), 0)
    found = [usable[epoch, int(index)] for epoch in range(6) for index in two]
    assert len({sample["images"].shape for sample in found}) == len({sample["bucket"] for sample in found}) == 1
    assert found[0]["bucket"] != source.buckets[0] and all(len(sample["skipped"]) == 2 for sample in found)
    assert len({sample["images"].sum().item() for sample in found}) > 1
    for file in files:
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match="none of 24 samples can be used"):
        usable[0, 0]


@pytest.mark.parametrize("name", ["flux", *(pytest.param(name, marks=pytest.mark.slow)
                                            for name in ("sdxl", "qwen", "sd"))])
def test_encoded_batches_are_those_of_images(tmp_path, name):
    config = bucket_config(tmp_path, name)
    online = make_trainer(config, tmp_path)
    stored = make_trainer(encoded(config, tmp_path / "encoded"), tmp_path)
    assert stored.parts.source.buckets.tolist() == online.parts.source.buckets.tolist()
    shapes = set()
    batches = [trainer.micro_batches(6) for trainer in (online, stored)]
    for _ in range(6):
        expected, batch = (trainer._prepare(some)[0] for trainer, some in zip((online, stored), batches, strict=True))
        torch.testing.assert_close(batch.noisy_latents, expected.noisy_latents, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(batch.conditioning, expected.conditioning, atol=2e-3, rtol=2e-3, check_dtype=False)
        torch.testing.assert_close(batch.teacher_pred, expected.teacher_pred, atol=1e-2, rtol=1e-2)
        key = "img_ids" if name == "flux" else "added_cond_kwargs"
        told = batch.conditioning.get(key)
        shapes.add(str(told["time_ids"][0, 4:].tolist() if name == "sdxl" else told))
    assert len(shapes) > 1 or name in ("qwen", "sd")


def test_a_run_with_buckets_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"train": {"batch_size": 4, "steps": 6, "search_steps": 3}, "checkpoint": {"every": 4}}
    stored = encoded(bucket_config(tmp_path, "sd", **changes), tmp_path / "encoded")
    whole = train(stored).run_dir
    resumed = dataclasses.replace(stored, output_dir=None, resume=str(whole / "checkpoints/step-000004"))
    before = metrics_of(whole)
    train(resumed)
    assert metrics_of(whole) == before and len(before) == 6


def test_a_probes_samples_are_of_the_images_that_it_names(tmp_path):
    """Their latents are drawn from that image's moments, though samples of one shape come together."""
    parts = build(stored := encoded(bucket_config(tmp_path, "sd"), tmp_path / "encoded"))
    probe = Probe(stored, parts, samples=16, batch_size=3)
    latents = [sample for batch in probe._batches for sample in batch[1]]
    assert len(latents) == len(probe.image_S) == 16 and (np.diff(probe.image_S) < 0).any()
    source = WithSubstitutes(parts.source, np.arange(24), 0)
    moments = {int(image): source[0, int(image)]["moments"].chunk(2) for image in probe.image_S}
    for found, image in zip(latents, probe.image_S, strict=True):
        mean, std = moments.pop(int(image))
        assert ((found - mean).abs() <= 6 * std).all()
        same_shape = [other for other, _ in moments.values() if other.shape == mean.shape]
        assert all((found - mean).norm() < (found - other).norm() for other in same_shape)
        moments[int(image)] = mean, std


def test_what_has_no_buckets_is_refused(tmp_path):
    config = bucket_config(tmp_path, "sd")
    check(config, 1)
    data = encoded(config, tmp_path / "encoded")
    squares = dataclasses.replace(data, data=dataclasses.replace(data.data, bucket_step=None))
    with pytest.raises(InputError, match="data.bucket_step=None: .* was encoded with 8"):
        check(squares, 1)
    for step, message in ((2, "choose a multiple of 4,"), (12, "choose a divisor of data.resolution=32")):
        with pytest.raises(InputError, match=message):
            check(bucket_config(tmp_path, "sd", data={"bucket_step": step}), 1)
    with pytest.raises(InputError, match="known only for folders of captioned images"):
        check(config_factory(tmp_path)("unet", data={"bucket_step": 8}), 1)
