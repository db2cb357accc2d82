import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from alter import InputError
from alter.common.config import BackboneConfig, Config, DataConfig
from alter.data.batches import GlobalBatches, Order, WithSubstitutes, make_loader
from alter.data.images import Unreadable
from alter.data.open import StreamedTable, TarShards, open_source
from alter.data.shards import left_out
from alter.training.run import train
from alter.training.setup.parts import build


def config_of(path, source="webdataset", **changes):
    data = DataConfig(source=source, path=str(path), resolution=4, **changes)
    return Config(backbone=BackboneConfig(pretrained="x"), data=data)


def png(value) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def shade(sample) -> int:
    return round(float((sample["images"][0, 0, 0] + 1) * 127.5))


def write_tar(file, samples):
    """samples: name → {kind: content}."""
    with tarfile.open(file, "w") as archive:
        for name, kinds in samples.items():
            for kind, content in kinds.items():
                member = tarfile.TarInfo(f"{name}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_shards(folder, count=4, size=5, stats=False):
    """Sample i of all has the shade i and the caption "caption i"."""
    folder.mkdir()
    for shard in range(count):
        samples = {f"{shard:05d}{k:04d}": {
            "png": png(shard * size + k), "txt": f"caption {shard * size + k}".encode(),
            "json": json.dumps({"caption": [f"json {shard * size + k}"] * 2, "width": 4}).encode(),
        } for k in range(size)}
        write_tar(folder / f"{shard:05d}.tar", samples)
        if stats:
            (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 9, "successes": size}))
    return folder


def contents(source, count):
    found = []
    for index in range(count):
        try:
            found.append(shade(source[0, index]))
        except Unreadable:
            found.append(None)
    return found


@pytest.mark.parametrize("stats", [False, True])
def test_samples_of_tar_files(tmp_path, stats):
    source = open_source(config_of(write_shards(tmp_path / "s", stats=stats)))
    assert isinstance(source, TarShards) and len(source) == 20 and source.shards == [5] * 4
    assert source.num_classes == 0 and not source.encoded
    assert contents(source, 20) == list(range(20))
    assert [source[0, i]["captions"] for i in (0, 7)] == ["caption 0", "caption 7"]
    assert source.describe(7).endswith("00001.tar sample 2")
    other = open_source(config_of(tmp_path / "s", caption_column="caption"))
    assert other[0, 3]["captions"] == "json 3" and other.captions(3) == ["json 3"] * 2
    with pytest.raises(Unreadable, match=".json: no caption .KeyError: 'title'"):
        open_source(config_of(tmp_path / "s", caption_column="title"))[0, 0]
    with pytest.raises(Unreadable, match=".json: expected a caption .* found 4"):
        open_source(config_of(tmp_path / "s", caption_column="width"))[0, 0]


def test_classes_of_tar_files(tmp_path):
    write_tar(tmp_path / "a.tar", {"x/0": {"cls": b"7", "jpg": png(5)}, "x/1": {"cls": b"seven", "jpg": png(6)},
                                   "x/2": {"cls": b"1"}, "y/0": {"cls": b" 3\n", "jpg": png(8)}})
    source = open_source(config_of(tmp_path))
    assert source.num_classes is None and len(source) == 4
    assert source[0, 0]["labels"] == 7 and source[0, 3]["labels"] == 3
    for index, reason in ((1, ".cls: expected a class number"), (2, "no .image file")):
        with pytest.raises(Unreadable, match=reason):
            source[0, index]


@pytest.mark.parametrize("harm, expected", [
    ("cut in a sample", [*range(7), None, *range(10, 20)]),
    ("cut at a header", [*range(7), None, *range(10, 20)]),
    ("broken header", [*range(7), None, *range(10, 20)]),
    ("cut, with stats", [*range(7), None, None, None, *range(10, 20)]),
    ("zero bytes", [*range(5), *[None] * 5, *range(10, 20)]),
    ("no tar", [*range(5), *[None] * 5, *range(10, 20)]),
    ("missing", [*range(5), *[None] * 5, *range(10, 20)]),
    ("missing, with stats", [*range(5), *[None] * 5, *range(10, 20)]),
])
def test_damaged_and_missing_shards_keep_the_place_of_their_samples(tmp_path, harm, expected):
    folder = write_shards(tmp_path / "s", stats="stats" in harm)
    file = folder / "00001.tar"
    with tarfile.open(file) as archive:
        third = archive.getmembers()[6]  # its image
    if harm == "cut at a header":
        file.write_bytes(file.read_bytes()[: third.offset])
    elif harm == "broken header":
        content = bytearray(file.read_bytes())
        content[third.offset : third.offset + 512] = b"x" * 512
        file.write_bytes(content)
    elif harm.startswith("cut"):
        file.write_bytes(file.read_bytes()[: third.offset_data + 20])
    elif harm == "zero bytes":
        file.write_bytes(b"")
    elif harm == "no tar":
        file.write_bytes(b"nothing of the kind" * 100)
    else:
        file.unlink()
    source = open_source(config_of(folder))
    assert contents(source, len(source)) == expected
    tolerant = WithSubstitutes(source, np.arange(len(source)), 0)
    lost = expected.index(None)
    assert shade(tolerant[0, lost]) in expected
    assert "00001.tar sample" in tolerant[0, lost]["skipped"][0]


def test_names_that_a_series_leaves_out():
    assert left_out(["00000.tar", "00003.tar", "a/1.tar", "a/2.tar"]) == ["00001.tar", "00002.tar"]
    assert left_out(["a-00001-of-00003.parquet"]) == ["a-00000-of-00003.parquet", "a-00002-of-00003.parquet"]
    assert left_out(["photos.tar", "2019.tar", "2024.tar", "777777.tar"]) == []


def test_a_folder_without_shards(tmp_path):
    with pytest.raises(InputError, match="no .tar files"):
        open_source(config_of(tmp_path))
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(InputError, match="no images"):
        open_source(config_of(tmp_path))


def test_the_order_mixes_a_few_shards_at_a_time():
    sizes = [5, 0, 7, 3, 6, 4]
    shard_of = np.repeat(np.arange(6), sizes)
    held_out = [3, 11]
    order = Order(np.setdiff1d(np.arange(25), held_out), 3, sizes, mixed=2)
    first, second = order(0), order(1)
    assert sorted(first) == sorted(second) == sorted(set(range(25)) - set(held_out))
    assert list(first) != list(second) and list(order(0)) == list(first)
    for epoch in (first, second):
        open_at = [set(shard_of[epoch[k:]]) & set(shard_of[: 25][epoch[: k + 1]]) for k in range(len(epoch))]
        assert max(map(len, open_at)) <= 2  # shards begun and not finished
        runs = shard_of[epoch]
        assert (np.diff(runs) != 0).sum() > 6  # they are mixed
    assert list(Order(np.arange(25), 4, sizes, 2)(0)) != list(Order(np.arange(25), 3, sizes, 2)(0))


def test_batches_of_shards_are_the_same_for_any_split_workers_and_start(tmp_path):
    source = open_source(config_of(write_shards(tmp_path / "s"), shuffle_shards=2))
    order = Order(np.arange(20), 0, source.shards, 2)

    def shades(rank=0, processes=1, micro=1, first=0, workers=0):
        batches = GlobalBatches(order, 4, micro, rank, processes, first, 8)
        return [[shade({"images": image}) for image in batch["images"]]
                for batch in make_loader(WithSubstitutes(source, np.arange(20), 0), batches, workers)]

    whole = shades()
    assert sorted(sum(whole[:5], [])) == list(range(20))
    assert shades(workers=2) == whole
    assert shades(first=3) == whole[3:]
    assert [a + b for a, b in zip(shades(0, 2), shades(1, 2), strict=True)] == whole
    assert sum(shades(micro=2), []) == sum(whole, [])


def test_a_run_on_shards_counts_and_bounds_what_is_damaged(small_config, tmp_path):
    folder = write_shards(tmp_path / "s", count=6, size=8)
    (folder / "00002.tar").unlink()
    data = {"source": "webdataset", "path": str(folder), "max_unreadable": 0.3, "resolution": 32}
    run = train(small_config("sd", data=data)).run_dir
    skipped = json.loads((run / "summary.json").read_text())["skipped_samples"]
    lines = [json.loads(line) for line in (run / "unreadable.jsonl").read_text().splitlines()]
    assert len(lines) == skipped > 0
    assert all("00002.tar" in line["sample"] and "the shard is missing" in line["sample"] for line in lines)
    with pytest.raises(InputError, match="data.max_unreadable=0.01: .* could not be read"):
        train(small_config("sd", data={**data, "max_unreadable": 0.01}, output_dir=str(tmp_path / "bounded")))


def test_classes_that_the_backbone_does_not_know_are_replaced(small_config, tmp_path):
    write_tar(tmp_path / "a.tar", {str(k): {"cls": str(k).encode(), "png": png(k)} for k in range(12)})
    from conftest import make_dit, make_vae, save_pipeline

    folder = save_pipeline(tmp_path / "p", make_dit(channels=4))
    make_vae().save_pretrained(folder / "vae")
    parts = build(small_config("dit", backbone={"pretrained": str(folder)}, data={
        "source": "webdataset", "path": str(tmp_path), "resolution": 16, "holdout": 0}))
    tolerant = WithSubstitutes(parts.source, np.arange(12), 0, parts.fit)
    assert tolerant[0, 9]["labels"] == 9 and tolerant[0, 9]["skipped"] == []
    assert tolerant[0, 10]["labels"] < 10 and "class 10: the backbone knows 10" in tolerant[0, 10]["skipped"][0]


def write_parquet(folder, shards=3, rows=6, name="train-{:05d}-of-{:05d}.parquet"):
    import datasets

    folder.mkdir()
    for shard in range(shards):
        first = shard * rows
        table = datasets.Dataset.from_dict({
            "image": [{"bytes": png(first + k), "path": None} for k in range(rows)],
            "text": [[f"a {first + k}", f"b {first + k}"] for k in range(rows)],
        }).cast_column("image", datasets.Image())
        table.to_parquet(folder / name.format(shard, shards), batch_size=4)  # two row groups
    return folder


def streamed(path, **changes):
    return config_of(path, "datasets", stream=True, **changes)


def test_a_streamed_table_gives_what_the_opened_one_gives(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_parquet(tmp_path / "p")
    stream, opened = open_source(streamed(folder)), open_source(config_of(folder, "datasets"))
    assert isinstance(stream, StreamedTable) and stream.shards == [4, 2] * 3 and len(opened) == len(stream) == 18
    for key in [(0, 0), (0, 5), (3, 5), (1, 17)]:
        a, b = stream[key], opened[key]
        assert shade(a) == shade(b) == key[1] and a["captions"] == b["captions"]
    assert stream.captions(4) == opened.captions(4) == ["a 4", "b 4"]
    assert stream.describe(5).endswith("train-00000-of-00003.parquet row group 1 row 1")


def test_a_streamed_table_may_lie_behind_an_address(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    for file in write_parquet(tmp_path / "p").iterdir():
        system.pipe(f"/owner/name/{file.name}", file.read_bytes())
    source = open_source(streamed("memory://owner/name"))
    assert contents(source, 18) == list(range(18))
    with pytest.raises(InputError, match="data.path='memory://owner/nothing'"):
        open_source(streamed("memory://owner/nothing"))
    with pytest.raises(InputError, match="data.path='nonsense://x': cannot be listed"):
        open_source(streamed("nonsense://x"))


@pytest.mark.parametrize("harm", ["missing", "footer", "row group"])
def test_damage_of_a_streamed_table(tmp_path, harm):
    folder = write_parquet(tmp_path / "p")
    file = folder / "train-00001-of-00003.parquet"
    content = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    elif harm == "footer":
        file.write_bytes(content[:-30])
    else:
        content[4:200] = bytes(196)
        file.write_bytes(content)
    source = open_source(streamed(folder))
    found = contents(source, len(source))
    assert len(source) == 18 and None in found
    assert [value for value in found if value not in (None, *range(6, 12))] == [*range(6), *range(12, 18)]
    lost = found.index(None)
    with pytest.raises(Unreadable):
        source[0, lost]
    assert "train-00001-of-00003" in source.describe(lost)


def test_a_row_group_without_a_column_is_unreadable_and_an_error_is_not_remembered(tmp_path):
    import datasets

    folder = write_parquet(tmp_path / "p", 2)
    rows = datasets.Dataset.from_dict({"image": [{"bytes": png(1), "path": None}] * 6}).cast_column(
        "image", datasets.Image())
    content = (folder / "train-00001-of-00002.parquet").read_bytes()
    rows.to_parquet(folder / "train-00001-of-00002.parquet")
    source = open_source(streamed(folder))
    with pytest.raises(Unreadable, match="columns image, text: the file lacks one"):
        source[0, 6]
    (folder / "train-00001-of-00002.parquet").write_bytes(content)
    assert shade(source[0, 6]) == 6


def test_an_opened_table_lacks_no_part(tmp_path):
    folder = write_parquet(tmp_path / "p")
    (folder / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(InputError, match="train-00001-of-00003.parquet is missing: fetch it, or set data.stream=true"):
        open_source(config_of(folder, "datasets"))


def test_statistics_of_something_else_are_no_shard(tmp_path):
    folder = write_shards(tmp_path / "s")
    (folder / "dataset_stats.json").write_text(json.dumps({"mean": 1}))
    (folder / "00001_stats.json").write_text(json.dumps({"successes": -3}))
    assert open_source(config_of(folder)).shards == [5] * 4
    assert left_out(["a-1-of-999999999999.tar"]) == []


def test_a_run_resumes_with_the_same_shards_alone(small_config, tmp_path):
    folder = write_shards(tmp_path / "s", count=6, size=8)
    data = {"source": "webdataset", "path": str(folder), "max_unreadable": 1.0, "resolution": 32}
    run = train(small_config("sd", data=data, checkpoint={"every": 3})).run_dir
    (folder / "00002.tar").write_bytes((folder / "00002.tar").read_bytes()[:3000])
    with pytest.raises(InputError, match="resume: .* other shards, in data.path: bring the data back"):
        train(small_config("sd", data=data, resume=str(run / "checkpoints/step-000003")))


def test_mistakes_of_streaming(tmp_path):
    folder = write_parquet(tmp_path / "p", 1)
    for changes, message in (({"image_column": "picture"}, "data.image_column='picture'"),
                             ({"caption_column": "words"}, "data.caption_column='words'"),
                             ({"image_column": "text"}, "data.image_column='text': holds no images"),
                             ({"split": "test"}, "data.split='test'")):
        with pytest.raises(InputError, match=message):
            open_source(streamed(folder, **changes))
    (folder / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="none of its 1 parquet files can be read"):
        open_source(streamed(folder))
    with pytest.raises(InputError, match="data.stream=true"):
        open_source(config_of(folder, "webdataset", stream=True))
