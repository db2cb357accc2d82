"""Data that would be read wrongly without a word: labels of folders, lists of files, broken EXIF."""

import io
import json
import os
import struct

import numpy as np
import pytest
from conftest import save_latents
from helpers import grey, run_config, save_greys
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from alter import InputError
from alter.common.config import DataConfig
from alter.data.base import list_images
from alter.data.batches import Fit, WithSubstitutes
from alter.data.images import Unreadable, decode
from alter.data.open import ImageFolder, open_source
from alter.evaluation.image_sets import ImageSet
from alter.training.setup.plan import check


def class_folders(folder, *names):
    for name in names:
        save_greys(folder / name, 1)
    return ImageFolder(DataConfig(path=str(folder), resolution=4), 0)


@pytest.mark.parametrize("names, labels", [
    (["0", "1", "2", "10"], [0, 1, 2, 10]),  # sorted as text, 10 would be class 2
    (["007", "1", "0012"], [7, 1, 12]),
    (["b", "a", "10"], [2, 1, 0]),
    (["n02", "n01"], [1, 0]),
])
def test_numbers_are_the_labels_of_their_folders(tmp_path, names, labels):
    source = class_folders(tmp_path, *names)
    assert source.classes == dict(zip(names, labels, strict=True)) and source.num_classes == 1 + max(labels)
    for i in range(len(source)):
        assert source[0, i]["labels"] == source.classes[source.describe(i).split("/")[-2]]


def test_folders_without_images_are_no_classes(tmp_path):
    save_greys(tmp_path / "b" / ".hidden", 1)
    for name in ("__MACOSX/a", "a/@eaDir", "a/lost+found", ".git"):
        save_greys(tmp_path / name, 1)
    (tmp_path / "aa").mkdir()
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "notes.txt").write_text("x")
    assert class_folders(tmp_path, "b", "c").classes == {"b": 0, "c": 1}


@pytest.mark.parametrize("names, reason", [
    (["1", "01"], "the class folders 01 and 1 are both label 1: rename one"),
    (["-1", "0"], "the class folder -1 is no label: number them from 0"),
    (["train", "Val"], "its sub-folders are parts of a data set, no classes: set it to .*/(train|Val)$"),
    (["0", "20240101123000"], "the class folder 20240101123000 is no label"),
])
def test_numbers_that_are_no_labels(tmp_path, names, reason):
    with pytest.raises(InputError, match=f"data.path='{tmp_path}': {reason}"):
        class_folders(tmp_path, *names)


def test_labels_that_the_backbone_does_not_know(small_config, tmp_path):
    save_latents(tmp_path / "l", (1, 8, 8), 12)
    source = open_source(run_config(tmp_path / "l", source="latents"))
    for label, reason in ((10, "class 10: the backbone knows 10"), (-1, "expected a class number, found -1"),
                          (0.5, "expected a class number, found 0.5"), (1e30, "expected a class number, found 1e.30")):
        for i in range(12):
            np.save(tmp_path / "l" / "train_labels" / f"{i}.npy", np.array([label]))
        with pytest.raises(InputError, match=f"data.path: none of 12 samples can be used: .*{reason}") as error:
            WithSubstitutes(source, np.arange(12), 0, Fit((1, 8, 8), 10))[0, 0]
        assert "\n" not in str(error.value)
    (tmp_path / "r").mkdir()
    for labels in ([["a.npy", 10]], [["a.npy", -1]], [["a.npy", 1.5]], [["a.npy", None]]):
        np.save(tmp_path / "r" / "a.npy", np.zeros((2, 8, 8), dtype=np.float32))
        (tmp_path / "r" / "dataset.json").write_text(json.dumps({"labels": labels}))
        with pytest.raises(InputError, match="data.path.*: (expected \"labels\"|labels up to 10, but .* 0 to 9)"):
            check(small_config("dit", data={"source": "latents", "path": str(tmp_path / "r"), "holdout": 0}), 1)


def test_training_and_evaluation_list_the_same_images(tmp_path):
    save_greys(tmp_path / "elsewhere", 3)
    save_greys(tmp_path / "set" / "plain", 12)
    save_greys(tmp_path / "set" / "__MACOSX", 1)
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    grey(0).save(tmp_path / "set" / ".hidden.png")
    images = ImageSet(tmp_path / "set")
    assert set(images.names) == set(list_images(tmp_path / "set")) and len(images) == 15
    assert images.names[3:6] == ["plain/0.png", "plain/1.png", "plain/2.png"]
    (tmp_path / "set" / "gone.png").symlink_to("nowhere")
    with pytest.raises(InputError, match="gone.png: cannot be read .*take it out"):
        _ = ImageSet(tmp_path / "set").digest
    for name, reason in (("gone", "no such folder"), ("set/plain/0.png", "is a file, not a folder")):
        with pytest.raises(InputError, match=f"{name}: {reason}: name a folder of images or an .npz file"):
            ImageSet(tmp_path / name)


def test_a_folder_that_cannot_be_listed_is_not_skipped(tmp_path, monkeypatch):
    for name in ("a", "b", ".cache"):
        save_greys(tmp_path / name, 1)
    scan = os.scandir

    def refuse(path):
        if str(path).endswith(("b", ".cache")):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="data.path: .*/b cannot be listed .Permission denied"):
        open_source(run_config(tmp_path))
    with pytest.raises(InputError, match=f"^{tmp_path}: .*/b cannot be listed"):
        ImageSet(tmp_path)


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (3, 4, 3), dtype=np.uint8)).resize((32, 24), 0)


def broken_exif(kind, *entries):
    content = io.BytesIO()
    if kind == "PNG":
        info = PngInfo()
        info.add_text("Raw profile type exif", entries[0])
        PICTURE.save(content, "PNG", pnginfo=info)
    else:
        body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
        PICTURE.save(content, "JPEG", quality=100,
                     exif=b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4))
    return content.getvalue()


TURNED = (0x112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize("content, turned", [
    (broken_exif("PNG", "\nexif\n      10\nzzzz"), False),
    (broken_exif("PNG", "\nexif\n  8\n457869"), False),
    (broken_exif("JPEG", (0x100, 8, 1, struct.pack("<hh", -1, 0)), TURNED), True),
    (broken_exif("JPEG", (0x101, 9, 1, struct.pack("<i", -1)), TURNED), True),
    (broken_exif("JPEG", (0x112, 2, 4, b"abc\0")), False),
], ids=["profile cut", "no TIFF", "width -1", "height -1", "orientation abc"])
def test_whole_pixels_with_a_broken_exif(content, turned):
    image, _ = decode(content)
    expected = np.asarray(PICTURE.rotate(-90, expand=True) if turned else PICTURE, dtype=float)
    assert image.size == ((24, 32) if turned else (32, 24))
    assert np.abs(np.asarray(image, dtype=float) - expected).mean() < 10  # JPEG's loss


def test_an_image_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    save_greys(tmp_path, 1)
    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(Unreadable, match="Permission denied"):
        decode(tmp_path / "0.png")
