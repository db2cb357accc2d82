import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import config_factory, make_dit, make_vae, save_latents, save_pipeline
from safetensors.torch import load_file, save_file

import alter.data.encode
import alter.training.setup.parts as parts_module
from alter import InputError
from alter.backbones.conditioning import Conditioner
from alter.common.config import BackboneConfig, Config, DataConfig
from alter.data.base import coin
from alter.data.batches import Fit, WithSubstitutes
from alter.data.encode import encode
from alter.data.images import Unreadable
from alter.data.open import FastDiT, Repa, open_source, shard_name
from alter.data.shapes import draw_shapes
from alter.training.run import make_accelerator
from alter.training.setup.parts import build
from alter.training.setup.plan import check
from alter.training.trainer import Trainer


def test_latents_of_fast_dit(tmp_path):
    classes = FastDiT(DataConfig(path=str(save_latents(tmp_path / "c", (4, 2, 2), 12))), 0)
    assert classes[0, 11]["labels"] == 1 and classes.encoding is None
    stored = np.load(tmp_path / "c" / "train_features" / "11.npy")
    assert np.array_equal(classes[0, 11]["latents"].numpy(), stored[0])
    texts = FastDiT(DataConfig(path=str(save_latents(tmp_path / "t", (4, 2, 2), 3, text=(7, 12)))), 0)
    assert texts[0, 0]["encoder_hidden_states"].shape == (7, 12) and texts.empty_text.shape == (7, 12)


def test_pickled_and_broken_arrays_are_unreadable(tmp_path):
    folder = save_latents(tmp_path / "c", (4, 2, 2), 3)
    np.save(folder / "train_features" / "0.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (folder / "train_features" / "1.npy").write_bytes(b"")
    (folder / "train_labels" / "2.npy").unlink()
    source = FastDiT(DataConfig(path=str(folder)), 0)
    for index in range(3):
        with pytest.raises(Unreadable, match="cannot be read"):
            source[0, index]


def write_repa(folder, count=6):
    rng = np.random.default_rng(0)
    (folder / "vae-sd" / "00000").mkdir(parents=True)
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(count)]
    for name in names:
        np.save(folder / "vae-sd" / name, rng.standard_normal((8, 2, 2), dtype=np.float32))
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": [[n, i % 3] for i, n in enumerate(names)]}))
    return folder


@pytest.mark.parametrize("place", ["", "vae-sd"])
def test_moments_of_repa(tmp_path, place):
    folder = write_repa(tmp_path / "r")
    source = open_source(latents_config(folder / place))
    assert isinstance(source, Repa) and len(source) == 6 and source.num_classes == 3
    stored = np.load(folder / "vae-sd/00000/img-mean-std-00000004.npy")
    sample = source[0, 4]
    assert sample["labels"] == 1
    assert np.allclose(sample["moments"], stored * 0.18215)


def latents_config(path, **changes):
    return Config(backbone=BackboneConfig(pretrained="x"), data=DataConfig(source="latents", path=str(path), **changes))


def encode_config(small_config, kind, tmp_path, **data):
    """A run on images: drawn shapes with captions, or classes of plain colours and a DiT with a VAE."""
    if kind == "sd":
        return small_config("sd", data=data)
    folder = tmp_path / "pipeline"
    if not folder.exists():
        save_pipeline(folder, make_dit(size=8, channels=4))
        make_vae().save_pretrained(folder / "vae")
    images = tmp_path / "classes"
    if not images.exists():
        shapes = draw_shapes(24, 1)[0]
        for i, image in enumerate(shapes):
            (images / f"c{i % 3}").mkdir(parents=True, exist_ok=True)
            image.save(images / f"c{i % 3}" / f"{i}.png")
    return small_config("dit", backbone={"pretrained": str(folder)}, data={
        "source": "image_folder", "path": str(images), "resolution": 16, **data})


def run_encode(config, out, **options):
    return encode(config, out, **{"shard_size": 10, "batch_size": 4, "state": PartialState(), **options})


def first_losses(config, tmp_path, name):
    trainer = Trainer(config, build(config), make_accelerator(config), tmp_path)
    batches = trainer._prepare(trainer.micro_batches(1))
    trainer.update_backbone(batches, *trainer.masks())
    trainer.readout.read()
    return trainer, batches[0], trainer.readout.metrics


@pytest.mark.parametrize("kind, precision", [("sd", "no"), ("sd", "bf16"), ("dit", "no")])
def test_training_from_latents_equals_training_from_images(small_config, tmp_path, kind, precision, monkeypatch):
    """Same samples, same noise, the posterior sampled: what the backbone sees differs by the rounding to float16."""
    from_images = encode_config(small_config, kind, tmp_path)
    from_images = dataclasses.replace(
        from_images, train=dataclasses.replace(from_images.train, mixed_precision=precision))
    index = run_encode(from_images, tmp_path / "encoded")
    assert index["count"] == 24 and not index["unreadable"] and index["resolution"] == from_images.data.resolution
    cached = dataclasses.replace(from_images.data, source="latents", path=str(tmp_path / "encoded"))
    _, expected, losses = first_losses(from_images, tmp_path, "images")
    for loader in ("load_vae", "Conditioner"):
        monkeypatch.setattr(parts_module, loader, None)
    trainer, batch, cached_losses = first_losses(dataclasses.replace(from_images, data=cached), tmp_path, "latents")
    assert trainer.parts.vae is None and trainer.parts.conditioner is None
    assert torch.equal(batch.timesteps, expected.timesteps)
    assert torch.allclose(batch.noisy_latents, expected.noisy_latents, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(batch.noisy_latents[0], batch.noisy_latents[1], atol=0.1)
    for name, value in expected.conditioning.items():
        assert torch.allclose(batch.conditioning[name].float(), value.float(), atol=1e-3, rtol=1e-3)
    for name, value in losses.items():
        assert cached_losses[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_mirrored_latents_and_several_captions_are_drawn_as_from_images(small_config, tmp_path):
    config = encode_config(small_config, "sd", tmp_path, flip=True)
    run_encode(config, tmp_path / "encoded", shard_size=7)
    images = open_source(config)
    latents = open_source(dataclasses.replace(config, data=dataclasses.replace(
        config.data, source="latents", path=str(tmp_path / "encoded"))))
    parts = build(config)
    mirrored = set()
    for key in [(epoch, index) for epoch in range(3) for index in (0, 9, 20, 23)]:
        sample, raw = latents[key], images[key]
        moments = parts.vae.encode(raw["images"][None]).latent_dist
        expected = torch.cat([moments.mean, moments.std], dim=1)[0] * 0.5
        assert torch.allclose(sample["moments"], expected, atol=1e-3, rtol=2e-3)
        text = parts.conditioner([raw["captions"]]).rows["encoder_hidden_states"]
        assert torch.allclose(sample["conditioning"]["encoder_hidden_states"], text, atol=2e-3, rtol=2e-3)
        mirrored.add(coin(config.seed, *key))
    assert mirrored == {True, False}
    assert len({images.captions(0)[0], *images.captions(0)}) > 1


def test_encoding_goes_on_where_it_was_stopped(small_config, tmp_path):
    config = encode_config(small_config, "sd", tmp_path)
    run_encode(config, tmp_path / "whole")
    halves = tmp_path / "halves"
    real = alter.data.encode._save

    def interrupted(file, *rest):
        if file.name == shard_name(1):
            raise KeyboardInterrupt
        real(file, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(alter.data.encode, "_save", interrupted)
        run_encode(config, halves)
    with pytest.raises(InputError, match="index.json|expected"):
        open_source(latents_config(halves, resolution=32))
    kept = (halves / shard_name(0)).stat().st_mtime_ns
    with pytest.raises(InputError, match="was encoded with mirrored=False, not True"):
        run_encode(encode_config(small_config, "sd", tmp_path, flip=True), halves)
    with pytest.raises(InputError, match="was encoded with data="):
        run_encode(encode_config(small_config, "sd", tmp_path, prompt="a shape"), halves)
    index = run_encode(config, halves)
    assert (halves / shard_name(0)).stat().st_mtime_ns == kept
    assert index == json.loads((tmp_path / "whole/index.json").read_text())
    damaged = halves / shard_name(1)
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert run_encode(config, halves) == index
    for number in range(3):
        assert (halves / shard_name(number)).read_bytes() == (tmp_path / "whole" / shard_name(number)).read_bytes()


def test_unusable_images_keep_their_place_and_are_bounded(small_config, tmp_path):
    config = encode_config(small_config, "sd", tmp_path, max_unreadable=0.05)
    names = sorted((tmp_path / "shapes").glob("*.png"))
    names[3].write_bytes(b"")
    index = run_encode(config, tmp_path / "encoded")
    assert list(index["unreadable"]) == ["3"] and names[3].name in index["unreadable"]["3"]
    source = open_source(latents_config(tmp_path / "encoded", resolution=32))
    with pytest.raises(Unreadable, match="was not encoded.*not an image"):
        source[0, 3]
    assert "moments" in source[0, 4]
    names[17].write_bytes(b"")
    for _ in range(3):  # what earlier attempts have found is not forgotten
        with pytest.raises(InputError, match="data.max_unreadable=0.05: at least 2 of 24"):
            run_encode(config, tmp_path / "again")
    assert not (tmp_path / "again/index.json").exists()


def test_a_damaged_or_missing_shard_is_unreadable(small_config, tmp_path):
    run_encode(encode_config(small_config, "dit", tmp_path), tmp_path / "encoded")
    source = open_source(latents_config(tmp_path / "encoded", resolution=16))
    file = tmp_path / "encoded" / shard_name(1)
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "encoded" / shard_name(2)).unlink()
    assert source[0, 9]["labels"] in (0, 1, 2)
    for index in (10, 19, 20, 23):
        with pytest.raises(Unreadable, match="cannot be read"):
            source[0, index]


@pytest.mark.parametrize("change, message", [
    ({"resolution": 32}, "with resolution 16, .* data.resolution=32 has 32"),
    ({"flip": True}, "data.flip=true: .* holds no mirror images"),
    ({"crop": "random"}, "data.crop='random'"),
    ("vae", "with VAE [0-9a-f]{64}, but backbone.pretrained=.* has [0-9a-f]{64}"),
    ("scale", "with scaling factor 0.5, .* has 0.25"),
    ("shift", "with shift factor 0.0, .* has 0.1"),
])
def test_latents_made_otherwise_are_refused(small_config, tmp_path, change, message):
    config = encode_config(small_config, "dit", tmp_path)
    run_encode(config, tmp_path / "encoded")
    data = {"source": "latents", "path": str(tmp_path / "encoded")}
    if isinstance(change, dict):
        data |= change
    else:
        vae = make_vae()
        if change == "vae":
            vae.encoder.conv_in.weight.data += 1
        elif change == "scale":
            vae.register_to_config(scaling_factor=0.25)
        else:
            vae.register_to_config(shift_factor=0.1)
        vae.save_pretrained(tmp_path / "pipeline/vae")
    with pytest.raises(InputError, match=message):
        build(encode_config(small_config, "dit", tmp_path, **data))
    with pytest.raises(InputError, match=message):
        check(encode_config(small_config, "dit", tmp_path, **data), 1)


def test_latents_of_another_text_encoder_are_refused(small_config, tmp_path):
    config = encode_config(small_config, "sd", tmp_path)
    run_encode(config, tmp_path / "encoded")
    file = Path(str(config.backbone.pretrained)) / "text_encoder/model.safetensors"
    weights = load_file(file)
    save_file({name: value + 1 for name, value in weights.items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match="with text encoder [0-9a-f]{64}"):
        build(encode_config(small_config, "sd", tmp_path, source="latents", path=str(tmp_path / "encoded")))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    run_encode(config_factory(folder)("sd"), folder / "latents")
    return folder / "latents"


@pytest.mark.parametrize("change", [{"shard_size": 0}, {"num_classes": "x"}, {"vae_settings": "a"},
                                    {"alter_latents": 3}, {"unreadable": []}, "conditioning.pt", "no JSON"], ids=str)
def test_a_broken_index_is_one_line(encoded, tmp_path, change):
    shutil.copytree(encoded, tmp_path / "encoded")
    index = tmp_path / "encoded/index.json"
    if change == "conditioning.pt":
        index.with_name(change).unlink()
    else:
        index.write_text("{" if change == "no JSON" else json.dumps({**json.loads(index.read_text()), **change}))
    with pytest.raises(InputError, match="data.path: .*index.json") as caught:
        open_source(latents_config(tmp_path / "encoded", resolution=32))
    assert "\n" not in str(caught.value)


def test_a_list_of_files_outside_the_folder_is_refused(tmp_path):
    folder = write_repa(tmp_path / "r")
    for name in ("../../secret.npy", "/secret.npy"):
        (folder / "vae-sd/dataset.json").write_text(json.dumps({"labels": [[name, 0]]}))
        with pytest.raises(InputError, match="file in the folder"):
            open_source(latents_config(folder))


def test_validation_images_load_the_decoder_and_the_text_encoder_for_themselves(small_config, tmp_path):
    config = encode_config(small_config, "sd", tmp_path)
    run_encode(config, tmp_path / "encoded")
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, source="latents", path=str(tmp_path / "encoded")),
        validate=dataclasses.replace(config.validate, every=3, prompts=("a red circle",)))
    loaded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "Conditioner", counted(Conditioner, loaded))
        parts = build(config)
        assert not loaded and parts.vae is None and parts.conditioner is None
        (tmp_path / "run").mkdir()
        Trainer(config, parts, make_accelerator(config), tmp_path / "run").run()
    assert len(loaded) == 3  # dense, step 3, step 6
    assert parts.vae is None and parts.conditioner is None
    assert len(list((tmp_path / "run/samples").glob("*.png"))) == 3


def counted(function, calls):
    return lambda *arguments: (calls.append(function), function(*arguments))[1]


@pytest.mark.parametrize("poison", [np.array([-1]), np.array([np.nan]), np.array([]), np.array([3.7])], ids=str)
def test_labels_that_are_none_are_replaced(tmp_path, poison):
    folder = save_latents(tmp_path / "c", (4, 2, 2), 12)
    np.save(folder / "train_labels/5.npy", poison)
    tolerant = WithSubstitutes(FastDiT(DataConfig(path=str(folder)), 0), np.arange(12), 0, Fit((4, 2, 2), 10))
    assert "5.npy" in tolerant[0, 5]["skipped"][0]


def test_text_of_another_length_is_replaced(tmp_path):
    folder = save_latents(tmp_path / "t", (4, 2, 2), 12, text=(7, 12))
    np.save(folder / "train_text/5.npy", np.zeros((6, 12), np.float32))
    source = FastDiT(DataConfig(path=str(folder)), 0)
    tolerant = WithSubstitutes(source, np.arange(12), 0, Fit((4, 2, 2), text_shape=tuple(source.empty_text.shape)))
    assert "text states of shape (6, 12)" in tolerant[0, 5]["skipped"][0] and tolerant[0, 4]["skipped"] == []


@pytest.mark.parametrize("poison", ["nan", "shape", "label"])
def test_samples_that_do_not_fit_are_replaced(tmp_path, poison):
    folder = save_latents(tmp_path / "c", (4, 2, 2), 12)
    bad = folder / "train_features/5.npy"
    if poison == "nan":
        np.save(bad, np.full((1, 4, 2, 2), np.nan, np.float32))
    elif poison == "shape":
        np.save(bad, np.zeros((1, 4, 2, 3), np.float32))
    else:
        np.save(folder / "train_labels/5.npy", np.array([10]))
    source = FastDiT(DataConfig(path=str(folder)), 0)
    tolerant = WithSubstitutes(source, np.arange(12), 0, Fit((4, 2, 2), 10))
    assert tolerant[0, 4]["skipped"] == []
    (line,) = tolerant[0, 5]["skipped"]
    assert "5.npy" in line and {"nan": "not finite", "shape": "do not fit", "label": "class 10"}[poison] in line
