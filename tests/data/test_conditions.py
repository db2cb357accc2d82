"""What is taken from data that may hold labels, captions and mirror images; how many are held out by default."""

import io
import json
import tarfile

import numpy as np
import pytest
from accelerate import PartialState
from conftest import make_dit, make_vae, save_latents, save_pipeline
from helpers import png, run_config, save_greys
from test_data import half_broken, save_metadata
from test_tables import offline, rows_of  # noqa: F401

from alter import InputError
from alter.common.config import DataConfig
from alter.common.load import load_config
from alter.data.batches import MOST_HELD_OUT, split
from alter.data.encode import encode
from alter.data.images import Unreadable
from alter.data.open import CaptionedFolder, Digits, WithPrior, open_source
from alter.training.setup.plan import check


def tar_of(tmp_path, files, wanted=None, **changes):
    tmp_path.mkdir(exist_ok=True)
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    source = open_source(run_config(tmp_path, source="webdataset", **changes), wanted)
    found = []
    for i in range(len(source)):
        try:
            sample = source[0, i]
            found.append(sample.get("captions", sample.get("labels")))
        except Unreadable as error:
            found.append(str(error))
    return found


def test_tar_files_of_others(tmp_path):
    upper = [("0.PNG", png(1)), ("0.TXT", b"a"), ("1.Png", png(2)), ("1.JSON", b'{"text": "x", "Title": "t"}'),
             ("1.txt", b"\xef\xbb\xbfb")]
    assert tar_of(tmp_path / "upper", upper) == ["a", "b"]
    assert tar_of(tmp_path / "key", upper[2:], caption_column="Title", image_column="PNG") == ["t"]
    stray = [("README.md", b"x"), ("b0.png", png(3)), ("b0.cls", b"3"), ("b1.PNG", png(4)), ("b1.CLS", b"4\n")]
    unreadable, *labels = tar_of(tmp_path / "stray", stray)
    assert unreadable.startswith("no .cls file in the shard (md)") and labels == [3, 4]
    bad = [("0.png", png(1)), ("0.txt", "é".encode("cp1252")), ("1.png", png(2)), ("1.txt", b"")]
    reason, empty = tar_of(tmp_path / "bad", bad)
    assert reason.startswith(".txt: no caption") and "byte 0" in reason and empty == ""


def test_where_data_have_labels_and_captions_the_backbone_decides(tmp_path):
    files = [("0.png", png(1)), ("0.cls", b"3"), ("0.txt", b"a"),
             ("1.png", png(2)), ("1.cls", b"9" * 20), ("1.txt", b"b")]
    assert tar_of(tmp_path / "t", files, "text") == ["a", "b"]
    labels = tar_of(tmp_path / "t", files, "class")
    assert labels[0] == 3 and labels[1].startswith(".cls: expected a class number")
    folder = save_greys(tmp_path / "m", 3)
    save_metadata(folder, *({"file_name": f"{i}.png", "text": f"c{i}", "label": label, "kind": 5}
                            for i, label in enumerate((2, "7", "cat"))))
    assert open_source(run_config(folder), "text")[0, 0]["captions"] == "c0"
    assert open_source(run_config(folder))[0, 0]["captions"] == "c0"
    source = open_source(run_config(folder), "class")
    assert isinstance(source, CaptionedFolder) and source.num_classes is None
    assert [source[0, i]["labels"] for i in (0, 1)] == [2, 7]
    with pytest.raises(Unreadable, match="metadata.jsonl line 3, 'label': expected a class number, found 'cat'"):
        source[0, 2]
    assert open_source(run_config(folder, label_column="kind"), "class")[0, 2]["labels"] == 5
    with pytest.raises(InputError, match="data.label_column='none': no such column .* file_name, kind, label, text"):
        open_source(run_config(folder, label_column="none"), "class")
    with pytest.raises(InputError, match="data.caption_column='caption': no such column"):
        open_source(run_config(folder, caption_column="caption"), "text")


def test_a_class_conditional_dit_takes_the_labels_of_captioned_data(small_config, tmp_path):
    folder, pipeline = save_greys(tmp_path / "m", 24), save_pipeline(tmp_path / "p", make_dit(size=8, channels=4))
    make_vae().save_pretrained(pipeline / "vae")
    config = small_config("dit", backbone={"pretrained": str(pipeline)}, data={
        "source": "image_folder", "path": str(folder), "resolution": 16})
    save_metadata(folder, *({"file_name": f"{i}.png", "text": "a", "label": i % 10} for i in range(24)))
    check(config, 1)
    save_metadata(folder, *({"file_name": f"{i}.png", "text": "a"} for i in range(24)))
    with pytest.raises(InputError, match="the backbone is conditioned on class labels, which this data does not have"):
        check(config, 1)


def test_held_out_by_default(tmp_path):
    class Many(Digits):
        def __init__(self, count):
            self.labels = range(count)

    counts = {count: len(split(Many(count), None, 0)[1]) for count in (1, 19, 20, 1797, 5119, 5120, 10**6)}
    assert counts == {1: 0, 19: 0, 20: 1, 1797: 89, 5119: 255, 5120: MOST_HELD_OUT, 10**6: 256}
    assert np.array_equal(split(Many(6000), None, 3)[1], split(Many(6000), 256, 3)[1])
    pairs = split(WithPrior(Many(35), Many(30)), None, 0)[1]
    assert len(pairs) == 2 and pairs[1] == pairs[0] + 1
    assert len(split(half_broken(tmp_path), None, 0)[1]) == 0
    assert DataConfig().holdout is None
    for name in ("demo_dit", "demo_sd", "ablation_dit", "ablation_sd", "ablation_glyphs"):  # their published numbers
        assert load_config(name).data.holdout == 256


@pytest.mark.parametrize("stream", [False, True])
def test_the_label_column_of_a_table(offline, tmp_path, stream):  # noqa: F811
    rows = rows_of(offline, [1, 2, 3], fine_label=[0, 2, 1], number=[5, 6, 7], name=list("xyz"), tags=[["a"]] * 3,
                   share=[0.5] * 3).cast_column("fine_label", offline.ClassLabel(names=["a", "b", "c"]))
    rows.to_parquet(tmp_path / "train.parquet")

    def first(wanted=None, **changes):
        source = open_source(run_config(tmp_path, source="datasets", stream=stream, **changes), wanted)
        sample = source[0, 1]
        return sample.get("captions", sample.get("labels")), source.num_classes, source.classes

    names = {"a": 0, "b": 1, "c": 2}
    assert first(label_column="fine_label") == (2, 3, names)
    assert first(label_column="fine_label", caption_column="name", wanted="class") == (2, 3, names)
    assert first(label_column="fine_label", caption_column="name", wanted="text") == ("y", 0, {})
    assert first(caption_column="tags") == ("a", 0, {}) and first(caption_column="tags", wanted="class")[1] == 0
    assert first(label_column="number") == (6, None if stream else 8, {})
    for changes, reason in (
            ({}, "data.caption_column='text': no such column: .* fine_label, .*set data.label_column"),
            ({"caption_column": "fine_label"}, "data.caption_column='fine_label': holds no text but int64"),
            ({"label_column": "share"}, "data.label_column='share': holds no whole numbers but (double|float64)"),
            ({"label_column": "gone", "caption_column": "name"}, "data.label_column='gone': no such column"),
            ({"label_column": "fine_label", "wanted": "text"}, "data.caption_column='text': no such column")):
        with pytest.raises(InputError, match=reason) as error:
            first(**changes)
        assert "\n" not in str(error.value)


def test_latents_without_mirror_images_are_not_mirrored(tmp_path):
    save_latents(tmp_path / "fast", (4, 2, 2), 3)
    (tmp_path / "repa").mkdir()
    np.save(tmp_path / "repa" / "a.npy", np.zeros((8, 2, 2), dtype=np.float32))
    (tmp_path / "repa" / "dataset.json").write_text(json.dumps({"labels": [["a.npy", 0]]}))
    for name in ("fast", "repa"):
        open_source(run_config(tmp_path / name, source="latents"))
        with pytest.raises(InputError, match=f"data.flip=true: data.path='.*{name}' holds no mirror images: set false"):
            open_source(run_config(tmp_path / name, source="latents", flip=True))
    with pytest.raises(InputError, match="data.flip=true: the digits have no mirror images: set false"):
        open_source(run_config(tmp_path, source="digits", flip=True))
    feature = tmp_path / "fast/train_features"
    for i in (0, 1):
        np.save(feature / f"{i}.npy", np.repeat(np.load(feature / f"{i}.npy"), 2, 0) * [[[[1]]], [[[-1]]]])
    source = open_source(run_config(tmp_path / "fast", source="latents", flip=True))
    assert {source[epoch, 1]["latents"][0, 0, 0].sign().item() for epoch in range(20)} == {-1, 1}
    with pytest.raises(Unreadable, match="no mirror image, which data.flip=true needs"):
        source[0, 2]


def test_encoded_data_keep_their_classes_and_refuse_to_be_mirrored(small_config, tmp_path):
    pipeline = save_pipeline(tmp_path / "p", make_dit(size=8, channels=4))
    make_vae().save_pretrained(pipeline / "vae")
    for name, value in (("2", 0), ("10", 1)):
        save_greys(tmp_path / "images" / name, 12, first=value)
    config = small_config("dit", backbone={"pretrained": str(pipeline)}, data={
        "source": "image_folder", "path": str(tmp_path / "images"), "resolution": 16})
    encode(config, tmp_path / "out", 10, 4, PartialState())
    source = open_source(run_config(tmp_path / "out", source="latents"))
    assert source.classes == {"2": 2, "10": 10} and {source[0, i]["labels"] for i in range(24)} == {2, 10}
    with pytest.raises(InputError, match="data.flip=true: .* holds no mirror images: encode again with data.flip=true"):
        open_source(run_config(tmp_path / "out", source="latents", flip=True))
    small = {"backbone": {"pretrained": str(pipeline)}, "data": {
        "source": "latents", "path": str(tmp_path / "out"), "resolution": 16}}
    with pytest.raises(InputError, match="labels up to 10, but the backbone knows 0 to 9"):
        check(small_config("dit", **small), 1)
