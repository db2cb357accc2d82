"""Clips: videos, and folders of their frames, to batches of a backbone of videos."""

import dataclasses

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import config_factory
from helpers import make_trainer, metrics_of_updates, prepared
from PIL import Image
from pipelines import make_pipeline

import alter.data.videos
from alter import InputError, train
from alter.data.encode import encode
from alter.data.images import Unreadable
from alter.data.open import open_source
from alter.training.setup.plan import check

CLIPS, LENGTH = 12, 7


def frames_of(clip):
    """LENGTH pictures, 48 wide and 32 high, whose grey tells clip and time."""
    return [Image.new("RGB", (48, 32), (20 * clip + time,) * 3) for time in range(LENGTH)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Folders of frames with captions beside them."""
    folder = tmp_path_factory.mktemp("clips")
    for clip in range(CLIPS):
        place = folder / f"part/clip.{clip:02d}"
        place.mkdir(parents=True)
        for time, image in enumerate(frames_of(clip)):
            image.save(place / f"frame.{time + 5}.png")  # 5 to 11: not the order of the names
        (folder / f"part/clip.{clip:02d}.txt").write_text("a red circle" if clip % 2 else "a small green triangle")
    return folder


def clip_config(folder, clips, name="wan", **changes):
    if not (folder / name).exists():
        make_pipeline(name, folder / name)
    data = {"source": "video_folder", "path": str(clips), "frames": 5, "label_dropout": 0.5, "holdout": 4,
            **changes.pop("data", {})}
    return config_factory(folder)("sd", backbone={"pretrained": str(folder / name)}, data=data,
                                  train={"batch_size": 4}, **changes)


def shades(sample):
    """The grey of each frame, each of one grey."""
    frames = (sample["images"] + 1) * 127.5
    assert frames.shape[:1] + frames.shape[2:] == (3, 32, 32) and frames.amax((0, 2, 3)).equal(frames.amin((0, 2, 3)))
    return frames[0, :, 0, 0].round().int().tolist()


def test_consecutive_frames_with_the_caption_beside(clips, tmp_path):
    source = open_source(clip_config(tmp_path, clips))
    assert len(source) == CLIPS
    sample = source[0, 3]
    assert shades(sample) == [61, 62, 63, 64, 65] and sample["captions"] == "a red circle"
    assert sample["sizes"].tolist() == [32, 48, 0, 8]
    anywhere = open_source(clip_config(tmp_path, clips, data={"crop": "random"}))
    begins = {shades(anywhere[epoch, 0])[0] for epoch in range(20)}
    assert begins == {0, 1, 2}
    long = open_source(clip_config(tmp_path, clips, data={"frames": 9}))
    with pytest.raises(Unreadable, match="has 7 frames, and data.frames=9"):
        long[0, 0]


def test_a_video_file(tmp_path):
    av = pytest.importorskip("av")
    (tmp_path / "videos").mkdir()
    with av.open(str(tmp_path / "videos/a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height = 48, 32
        for image in frames_of(3):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    (tmp_path / "videos/a.txt").write_text("a shape")
    (tmp_path / "videos/b.mp4").write_bytes(b"no video")
    source = open_source(clip_config(tmp_path, tmp_path / "videos"))
    shown = (source[0, 0]["images"] + 1) * 127.5
    assert np.abs(shown.mean((0, 2, 3)).numpy() - [61, 62, 63, 64, 65]).max() < 3 and shown.shape == (3, 5, 32, 32)
    with pytest.raises(Unreadable, match="no video"):
        source[0, 1]


def test_without_its_package_videos_are_refused(tmp_path, monkeypatch):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(b"")
    monkeypatch.setattr(alter.data.videos.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="a.mp4 needs the package av: pip install av"):
        open_source(clip_config(tmp_path, tmp_path / "videos"))


@pytest.mark.parametrize("name", ["wan", pytest.param("ltx", marks=pytest.mark.slow)])
def test_training_from_encoded_clips_equals_training_from_clips(tmp_path, clips, name):
    config = clip_config(tmp_path, clips, name)
    encode(config, tmp_path / "encoded", 5, 4, PartialState())
    stored = dataclasses.replace(config, data=dataclasses.replace(config.data, source="latents",
                                                                  path=str(tmp_path / "encoded")))
    trainers = [make_trainer(each, tmp_path) for each in (config, stored)]
    (expected,), (batch,) = map(prepared, trainers)
    assert batch.noisy_latents.shape == ((4, 4, 2, 4, 4) if name == "wan" else (4, 2 * 8 * 8, 8))
    torch.testing.assert_close(batch.noisy_latents, expected.noisy_latents, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(batch.conditioning, expected.conditioning, atol=2e-3, rtol=2e-3, check_dtype=False)
    losses, found = (metrics_of_updates(trainer, [each]) for trainer, each in
                     zip(trainers, (expected, batch), strict=True))
    for key, value in losses.items():
        assert found[key] == pytest.approx(value, rel=3e-3, abs=1e-5), key
    cost = trainers[0].parts.cost
    assert cost.macs_total > make_trainer(clip_config(tmp_path, clips, name, data={"frames": 1}),
                                          tmp_path).parts.cost.macs_total


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_a_whole_run(tmp_path, clips, name):
    config = clip_config(tmp_path, clips, name, validate={"every": 6, "prompts": ["a red circle", "a green square"]})
    run = train(config).run_dir
    strips = sorted((run / "samples").glob("*.png"))
    assert len(strips) == 2 and Image.open(strips[0]).size == (64, 32)


def test_what_does_not_fit_is_refused(tmp_path, clips):
    check(clip_config(tmp_path, clips), 1)
    for changes, message in (({"frames": 4}, "data.frames=4: choose a multiple of the VAE's 4, and one more"),
                             ({"bucket_step": 16}, "data.bucket_step=16: is for images"),
                             ({"source": "image_folder"}, "data.frames=5: data.source='image_folder' has images")):
        with pytest.raises(InputError, match=message):
            check(clip_config(tmp_path, clips, data=changes), 1)
    with pytest.raises(InputError, match="data.frames=5: the backbone is of images"):
        check(clip_config(tmp_path, clips, "sd"), 1)
