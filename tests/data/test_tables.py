"""Data sets of the Hugging Face kind, on disk and as table files."""

import socket

import pytest
from helpers import png, run_config, save_greys, shade

from alter import InputError
from alter.data.images import Unreadable
from alter.data.open import OpenedTable, open_source


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """`datasets` with a cache of its own, and without a network."""
    import datasets

    def refuse(*arguments):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    datasets.disable_progress_bars()
    return datasets


def rows_of(datasets, shades, **columns):
    columns = columns or {"text": [f"caption {value}" for value in shades]}
    images = [{"bytes": png(value), "path": None} for value in shades]
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())


def write_arrow(datasets, rows, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(path=str(file), features=rows.features) as writer:
        for row in rows.cast_column("image", datasets.Image(decode=False)):
            writer.write(row)
        writer.finalize()


def shades_of(path, **changes):
    source = open_source(run_config(path, source="datasets", **changes))
    return [shade(source[0, i]) for i in range(len(source))]


def test_a_data_set_on_disk(offline, tmp_path):
    rows = rows_of(offline, [5, 6], text=[["one"], ["two"]], extra=[1, 2]).with_format("numpy")
    rows.save_to_disk(tmp_path / "d")
    source = open_source(run_config(tmp_path / "d", source="datasets", split="anything"))
    assert isinstance(source, OpenedTable) and source.num_classes == 0 and not source.encoded and len(source) == 2
    assert shade(source[0, 1]) == 6 and source[0, 1]["captions"] == "two"
    assert source.describe(1) == f"{tmp_path / 'd'} row 1"


def test_a_split_of_a_data_set_on_disk(offline, tmp_path):
    parts = {"train": rows_of(offline, [1, 2]), "test": rows_of(offline, [3])}
    offline.DatasetDict(parts).save_to_disk(tmp_path / "d")
    assert shades_of(tmp_path / "d") == [1, 2]
    assert shades_of(tmp_path / "d", split="test") == [3]
    assert shades_of(tmp_path / "d", split=None) == [1, 2, 3]
    with pytest.raises(InputError, match="data.split='val': .* train, test"):
        shades_of(tmp_path / "d", split="val")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_table_files(offline, tmp_path, kind):
    folder = tmp_path / "pictures"
    (folder / "data" / ".hidden").mkdir(parents=True)
    for name, shades in {"train-0-of-2": [1, 2], "train-1-of-2": [3], "test-0-of-1": [4], ".hidden/train": [5]}.items():
        file = folder / "data" / f"{name}.{kind}"
        rows = rows_of(offline, shades)
        if kind == "parquet":
            rows.to_parquet(file)
        else:
            write_arrow(offline, rows, file)
    (folder / "pictures.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    assert shades_of(folder) == [1, 2, 3]
    assert shades_of(folder, split="test") == [4]
    assert shades_of(folder, split=None) == [4, 1, 2, 3]
    with pytest.raises(InputError, match=f"data.split='val': .*data/test-0-of-1.{kind}, data/train-0-of-2.{kind}"):
        shades_of(folder, split="val")
    assert not (tmp_path / "executed").exists()


def test_tables_in_folders_named_after_the_split(offline, tmp_path):
    for part, value in (("train", 1), ("test", 2)):
        (tmp_path / "d" / part).mkdir(parents=True)
        rows_of(offline, [value]).to_parquet(tmp_path / "d" / part / "0000.parquet")
    assert shades_of(tmp_path / "d") == [1] and shades_of(tmp_path / "d", split="test") == [2]


def test_captions_of_a_table(offline, tmp_path):
    rows_of(offline, [1, 2, 3], text=[["x", "y"], [], None]).to_parquet(tmp_path / "train.parquet")
    source = open_source(run_config(tmp_path, source="datasets"))
    assert {source[epoch, 0]["captions"] for epoch in range(20)} == {"x", "y"}
    for index in (1, 2):
        with pytest.raises(Unreadable, match="column 'text': expected a caption"):
            source[0, index]


def test_images_of_a_table(offline, tmp_path):
    save_greys(tmp_path / "d" / "pictures", 2, first=50)
    images = [{"bytes": None, "path": "pictures/1.png"}, {"bytes": None, "path": str(tmp_path / "d/pictures/0.png")},
              {"bytes": b"broken", "path": "pictures/0.png"}, {"bytes": None, "path": "https://example.org/a.png"},
              None]
    rows = offline.Dataset.from_dict({"image": images, "text": list("abcde")})
    rows.to_parquet(tmp_path / "d" / "train.parquet")
    source = open_source(run_config(tmp_path / "d", source="datasets"))
    assert [shade(source[0, i]) for i in (0, 1)] == [51, 50]
    for index, reason in ((2, "not an image"), (3, "no such file"), (4, "column 'image': no image")):
        with pytest.raises(Unreadable, match=reason):
            source[0, index]


@pytest.mark.parametrize("feature", ["class", "int"])
def test_labels_of_a_table(offline, tmp_path, feature):
    rows = rows_of(offline, [1, 2, 3], label=[0, 2, -1] if feature == "class" else [0, 2, None])
    if feature == "class":
        rows = rows.cast_column("label", offline.ClassLabel(num_classes=5))
    rows.to_parquet(tmp_path / "train.parquet")
    source = open_source(run_config(tmp_path, source="datasets"))
    assert source.num_classes == (5 if feature == "class" else 3)
    assert [source[0, i]["labels"] for i in (0, 1)] == [0, 2] and "captions" not in source[0, 0]
    with pytest.raises(Unreadable, match="column 'label': expected a class number"):
        source[0, 2]


def test_mistakes_of_a_data_set(offline, tmp_path):
    rows = rows_of(offline, [1], caption=["a"], label=["b"], number=[1.5])
    rows.to_parquet(tmp_path / "good" / "train.parquet")
    with pytest.raises(InputError, match="data.caption_column='text': .* image, caption, label, number"):
        shades_of(tmp_path / "good")
    with pytest.raises(InputError, match="data.image_column='picture': .* image, caption, label, number"):
        shades_of(tmp_path / "good", image_column="picture")
    with pytest.raises(InputError, match="data.image_column='number': holds no images"):
        shades_of(tmp_path / "good", image_column="number", caption_column="caption")
    for name in ("train.parquet", "train.arrow"):
        bad = tmp_path / f"bad {name}"
        bad.mkdir()
        (bad / name).write_bytes(b"PAR1 not a table at all")
        with pytest.raises(InputError, match="data.path=.*bad .*: cannot be read as a data set") as error:
            shades_of(bad)
        assert "\n" not in str(error.value)
    (tmp_path / "good" / "train.arrow").write_bytes(b"")
    with pytest.raises(InputError, match="both .parquet and .arrow"):
        shades_of(tmp_path / "good")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="data.path=.*none.*: no .parquet or .arrow files"):
        shades_of(tmp_path / "none")
    with pytest.raises(InputError, match="data.path=.*gone.*: no such folder"):
        shades_of(tmp_path / "gone")
