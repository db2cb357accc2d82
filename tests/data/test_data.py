"""The order of the samples, the sources on disk, and the loader over them."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from helpers import folder_config, grey, run_config, save_greys, shade
from PIL import Image

from alter import InputError
from alter.common.config import Config, DataConfig
from alter.data.batches import GlobalBatches, Order, WithSubstitutes, collate, make_loader, split
from alter.data.images import Unreadable
from alter.data.open import CaptionedFolder, Digits, ImageFolder, WithPrior, open_source


@pytest.mark.parametrize("processes, micro", [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_the_global_batch_is_the_same_for_any_split(processes, micro):
    indices = np.arange(10)
    whole = list(GlobalBatches(Order(indices, 5), 8, 1, 0, 1, first_step=0, last_step=4))
    parts = [iter(GlobalBatches(Order(indices, 5), 8, micro, rank, processes, 0, 4)) for rank in range(processes)]
    for batch in whole:
        assert [key for part in parts for _ in range(micro) for key in next(part)] == batch


def test_every_epoch_is_a_permutation_and_resuming_continues_it():
    batches = list(GlobalBatches(Order(np.arange(10), 0), 4, 1, 0, 1, 0, 5))
    keys = [key for batch in batches for key in batch]
    assert sorted(keys) == [(epoch, i) for epoch in (0, 1) for i in range(10)]
    assert [i for e, i in keys if e == 0] != [i for e, i in keys if e == 1]
    assert list(GlobalBatches(Order(np.arange(10), 0), 4, 1, 0, 1, 3, 5)) == batches[3:]


def test_digits():
    digits = Digits()
    sample = digits[0, 3]
    assert len(digits) == 1797 and sample["latents"].shape == (1, 8, 8)
    assert digits.images.min() == -1 and digits.images.max() == 1


def test_held_out_samples_are_disjoint():
    train, held = split(Digits(), 200, 0)
    assert len(held) == 200 and len(np.intersect1d(train, held)) == 0 and len(train) == 1597
    with pytest.raises(InputError, match="data.holdout=1797"):
        split(Digits(), 1797, 0)


def test_image_folder_crops_the_centre_and_mirrors(tmp_path):
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16, 0] = np.linspace(0, 255, 8).astype(np.uint8)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    source = ImageFolder(DataConfig(path=str(tmp_path), resolution=8), seed=0)
    sample = source[0, 1]
    assert sample["labels"] == 1 and source.num_classes == 2
    expected = torch.from_numpy(pixels[:, 8:16]).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(sample["images"], expected)
    mirrored = ImageFolder(DataConfig(path=str(tmp_path), resolution=8, flip=True), seed=0)
    flips = [torch.equal(mirrored[epoch, 1]["images"], expected.flip(-1)) for epoch in range(40)]
    assert 8 < sum(flips) < 32
    assert flips == [torch.equal(mirrored[epoch, 1]["images"], expected.flip(-1)) for epoch in range(40)]


def test_a_broken_image_is_unreadable(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "bad.png").write_bytes(b"")
    source = ImageFolder(DataConfig(path=str(tmp_path)), 0)
    assert source.describe(0) == str(tmp_path / "cat" / "bad.png")
    with pytest.raises(Unreadable, match="not an image"):
        source[0, 0]


def test_class_folders_ignore_what_is_hidden_or_no_image(tmp_path):
    for name in ("b/x.png", "a/deep/y.jpg", ".cache/z.png", "b/.z.png", "b/notes.txt", "loose.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    source = ImageFolder(DataConfig(path=str(tmp_path)), 0)
    assert source.num_classes == 2
    assert [source.describe(i) for i in (0, 1)] == [str(tmp_path / "a/deep/y.jpg"), str(tmp_path / "b/x.png")]


def save_metadata(folder, *lines):
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")


def test_random_crops_are_a_function_of_seed_epoch_and_index(tmp_path):
    strip = np.arange(40, dtype=np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
    for name in ("a/0.png", "a/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(strip).save(tmp_path / name)

    def lefts(seed, index=0):
        source = ImageFolder(folder_config(tmp_path, crop="random"), seed)
        return [round((source[epoch, index]["images"][0, 0, 0].item() + 1) * 127.5) for epoch in range(60)]

    drawn = lefts(0)
    assert drawn == lefts(0) and drawn != lefts(1) and drawn != lefts(0, index=1)
    assert min(drawn) < 6 and max(drawn) > 30 and max(drawn) <= 36
    centred = ImageFolder(folder_config(tmp_path, crop="center"), 0)
    assert torch.equal(centred[0, 0]["images"], centred[5, 1]["images"])


def test_captions_of_metadata(tmp_path):
    save_greys(tmp_path, 1)
    save_greys(tmp_path / "sub", 1, first=7)
    save_metadata(tmp_path, {"file_name": "sub/0.png", "text": "é\u2028seven"}, "",
                  {"file_name": "./0.png", "text": ["x", "y", "z"], "other": 1})
    source = open_source(run_config(tmp_path))
    assert isinstance(source, CaptionedFolder) and source.num_classes == 0 and not source.encoded
    assert len(source) == 2 and source.describe(0) == str(tmp_path / "sub/0.png")
    assert shade(source[0, 0]) == 7 and source[0, 0]["captions"] == "é\u2028seven"
    assert shade(source[0, 1]) == 0
    drawn = [source[epoch, 1]["captions"] for epoch in range(60)]
    assert {drawn.count(name) > 8 for name in "xyz"} == {True}
    again = CaptionedFolder(folder_config(tmp_path), seed=Config.seed)
    assert drawn == [again[epoch, 1]["captions"] for epoch in range(60)]
    other = CaptionedFolder(folder_config(tmp_path), seed=Config.seed + 1)
    assert drawn != [other[epoch, 1]["captions"] for epoch in range(60)]


@pytest.mark.parametrize("line, message", [
    ('{"file_name": "0.png", "text": ', "line 3: not JSON"),
    ('["0.png", "a"]', "line 3: no file_name"),
    ('{"text": "a"}', "line 3: no file_name"),
    ('{"file_name": 5, "text": "a"}', "line 3: no file_name"),
    ('{"file_name": "gone.png", "text": "a"}', "line 3: file_name='gone.png': no such file"),
    ('{"file_name": "", "text": "a"}', "line 3: file_name='': no such file"),
    ('{"file_name": "../outside.png", "text": "a"}', "line 3: file_name='../outside.png' leaves the folder"),
    ('{"file_name": "sub/../../outside.png", "text": "a"}', "line 3: file_name=.* leaves the folder"),
    ('{"file_name": "/etc/passwd", "text": "a"}', "line 3: file_name='/etc/passwd' leaves the folder"),
    ('{"file_name": "\xff"}', "line 3: byte 52 .0xff. is no UTF-8 text"),
    ("[" * 100000, "line 3: not JSON"),
])
def test_a_bad_line_of_metadata_is_named(tmp_path, line, message):
    folder = save_greys(tmp_path / "data", 1)
    grey(0).save(tmp_path / "outside.png")
    good = b'{"file_name": "0.png", "text": "a"}\n'
    (folder / "metadata.jsonl").write_bytes(good + b"\n" + line.encode("latin-1") + b"\n" + good)
    with pytest.raises(InputError, match=message) as error:
        open_source(run_config(folder))
    assert str(folder / "metadata.jsonl") in str(error.value) and "\n" not in str(error.value)


def test_a_caption_column_that_no_line_has(tmp_path):
    save_greys(tmp_path, 1)
    save_metadata(tmp_path, {"file_name": "0.png", "caption": "a"}, {"file_name": "0.png", "tags": "a"})
    with pytest.raises(InputError, match=r"data.caption_column='text': no such column .* caption, file_name, tags"):
        open_source(run_config(tmp_path))
    assert open_source(run_config(tmp_path, caption_column="tags"))[0, 1]["captions"] == "a"
    save_metadata(tmp_path, "")
    with pytest.raises(InputError, match="data.path=.*: no images"):
        open_source(run_config(tmp_path))


@pytest.mark.parametrize("entry", [
    {}, {"text": None}, {"text": 5}, {"text": []}, {"text": ["a", 5]}, {"text": {"a": "b"}}, {"text": "\ud800"},
])
def test_a_line_without_a_usable_caption_is_unreadable(tmp_path, entry):
    save_greys(tmp_path, 1)
    save_metadata(tmp_path, {"file_name": "0.png", "text": "a"}, {"file_name": "0.png", **entry})
    source = open_source(run_config(tmp_path))
    assert source[0, 0]["captions"] == "a"
    with pytest.raises(Unreadable, match="metadata.jsonl line 2, 'text'"):
        source[0, 1]


def test_a_prompt_is_the_caption_of_every_image_below(tmp_path):
    save_greys(tmp_path / "b", 1, first=3)
    save_greys(tmp_path / "a" / "deep", 1, first=4)
    save_greys(tmp_path / ".hidden", 1)
    (tmp_path / "metadata.jsonl").write_text("not JSON")
    (tmp_path / "loop").symlink_to(tmp_path)
    source = open_source(run_config(tmp_path, prompt="a photo of sks dog"))
    assert [shade(source[0, i]) for i in range(len(source))] == [4, 3]
    assert source[0, 0]["captions"] == "a photo of sks dog"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="data.path=.*empty.*: no images"):
        open_source(run_config(tmp_path / "empty", prompt="a"))


def test_a_linked_folder_is_read(tmp_path):
    save_greys(tmp_path / "elsewhere", 1, first=9)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    save_metadata(tmp_path / "data", {"file_name": "linked/0.png", "text": "a"})
    assert shade(open_source(run_config(tmp_path / "data"))[0, 0]) == 9


def test_half_of_every_epoch_is_the_prior(tmp_path):
    save_greys(tmp_path / "dog", 3)
    save_greys(tmp_path / "prior", 7, first=100)
    config = run_config(tmp_path / "dog", prompt="sks dog", prior_path=str(tmp_path / "prior"), prior_prompt="dog")
    source = open_source(config)
    assert isinstance(source, WithPrior) and len(source) == 14 and source.num_classes == 0
    samples = [source[2, i] for i in range(14)]
    assert [sample["captions"] for sample in samples] == ["sks dog", "dog"] * 7
    assert [shade(sample) for sample in samples[1::2]] == list(range(100, 107))
    assert [shade(sample) for sample in samples[::2]] == [0, 1, 2, 0, 1, 2, 0]
    assert source.describe(8) == str(tmp_path / "dog" / "1.png")
    assert source.describe(13) == str(tmp_path / "prior" / "6.png")
    for held_out in (0, 4):
        for part in split(source, held_out, seed=0):
            assert sum(index % 2 for index in part) * 2 == len(part)
    with pytest.raises(InputError, match="data.holdout=3: .* even"):
        split(source, 3, seed=0)


def test_repeated_instances_are_cropped_anew():
    class Keys(Digits):
        def __getitem__(self, key):
            return {"key": key}

        def __init__(self, count):
            self.labels = range(count)

    source = WithPrior(Keys(3), Keys(7))
    keys = [source[epoch, index]["key"] for epoch in range(4) for index in range(0, 14, 2)]
    assert len(set(keys)) == len(keys) == 28
    assert [source[3, index]["key"] for index in range(1, 14, 2)] == [(3, i) for i in range(7)]


def test_mistakes_of_a_prior(tmp_path):
    save_greys(tmp_path / "x" / "dog", 2)
    prior = {"prior_path": str(save_greys(tmp_path / "prior", 1)), "prior_prompt": "dog"}
    with pytest.raises(InputError, match="set data.prior_prompt"):
        open_source(run_config(tmp_path / "x", prompt="a", prior_path=prior["prior_path"]))
    with pytest.raises(InputError, match="data.prior_path=.* captions"):
        open_source(run_config(tmp_path / "x", **prior))
    with pytest.raises(InputError, match="data.prior_path=.*: no such folder"):
        open_source(run_config(tmp_path / "x", prompt="a", **prior | {"prior_path": str(tmp_path / "gone")}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="data.prior_path=.*: no images"):
        open_source(run_config(tmp_path / "x", prompt="a", **prior | {"prior_path": str(tmp_path / "empty")}))
    with pytest.raises(InputError, match="data.prompt='a' is for"):
        open_source(run_config(tmp_path / "x", prompt="a", source="digits"))


def half_broken(tmp_path, count=12):
    """Images 0, 2, 4, ... cannot be read."""
    folder = save_greys(tmp_path / "images", count)
    for i in range(0, count, 2):
        (folder / f"{i}.png").write_bytes(b"")
    save_metadata(folder, *({"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(count)))
    return CaptionedFolder(folder_config(folder), seed=3)


def test_an_unreadable_sample_is_replaced(tmp_path):
    source = half_broken(tmp_path)
    indices = np.array([0, 2, 3, 4, 7])
    tolerant = WithSubstitutes(source, indices, seed=3)
    assert tolerant[0, 3]["skipped"] == [] and shade(tolerant[0, 3]) == 3
    samples = [tolerant[epoch, 2] for epoch in range(30)]
    assert {shade(sample) for sample in samples} == {3, 7}
    for sample in samples:
        assert sample["captions"] == f"caption {shade(sample)}"
        names = [line.split("images/")[1] for line in sample["skipped"]]
        assert names[0] == "2.png: not an image" and len(set(names)) == len(names)
        assert set(names) <= {f"{i}.png: not an image" for i in (0, 2, 4)}
    assert {len(sample["skipped"]) for sample in samples} == {1, 2, 3}
    again = [WithSubstitutes(source, indices, seed=3)[epoch, 2] for epoch in range(30)]
    assert [(shade(a), a["skipped"]) for a in again] == [(shade(b), b["skipped"]) for b in samples]
    others = [WithSubstitutes(source, indices, seed=4)[epoch, 2] for epoch in range(30)]
    assert [shade(b) for b in others] != [shade(a) for a in again]
    with pytest.raises(InputError, match="data.path: none of 2 samples can be used.*2.png: not an image"):
        WithSubstitutes(source, np.array([0, 2]), seed=3)[0, 2]


def test_sources_that_are_always_readable_are_tolerated_too():
    sample = WithSubstitutes(Digits(), np.arange(10), 0)[0, 3]
    assert sample["skipped"] == [] and torch.equal(sample["latents"], Digits()[0, 3]["latents"])


def test_collate():
    samples = [{"images": torch.full((3, 2, 2), float(i)), "captions": f"c{i}", "skipped": ["x", "y"][:i]}
               for i in range(3)]
    batch = collate(samples)
    assert batch["images"].shape == (3, 3, 2, 2) and batch["images"][2].unique().tolist() == [2]
    assert batch["captions"] == ["c0", "c1", "c2"] and batch["skipped"] == ["x", "x", "y"]
    labels = collate([Digits()[0, i] for i in range(4)])
    assert labels["labels"].tolist() == [0, 1, 2, 3] and labels["labels"].dtype == torch.int64
    assert labels["latents"].shape == (4, 1, 8, 8) and set(labels) == {"latents", "labels"}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_samples_of_the_batches(tmp_path, workers):
    tolerant = WithSubstitutes(half_broken(tmp_path), np.arange(12), seed=3)
    batches = list(GlobalBatches(Order(np.arange(12), 3), 4, 1, 0, 1, first_step=0, last_step=6))
    loaded = list(make_loader(tolerant, batches, workers))
    assert len(loaded) == 6 and any(batch["skipped"] for batch in loaded)
    for keys, batch in zip(batches, loaded, strict=True):
        expected = [tolerant[key] for key in keys]
        assert torch.equal(batch["images"], torch.stack([sample["images"] for sample in expected]))
        assert batch["captions"] == [sample["captions"] for sample in expected]
        assert batch["skipped"] == [line for sample in expected for line in sample["skipped"]]


def test_a_signal_to_every_process_of_a_task_leaves_the_loaders_at_work():
    batches = list(GlobalBatches(Order(np.arange(40), 0), 2, 1, 0, 1, 0, 20))
    loaded = iter(make_loader(Digits(), batches, workers=1))
    next(loaded)
    for signum in (signal.SIGUSR1, signal.SIGINT):
        os.kill(loaded._workers[0].pid, signum)
    assert len(list(loaded)) == 19
