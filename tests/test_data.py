import numpy as np
import pytest
import torch
from conftest import save_latents
from PIL import Image

from alter import InputError
from alter.config import DataConfig
from alter.data import Digits, GlobalBatches, ImageFolder, Latents, split


@pytest.mark.parametrize("processes, micro", [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_the_global_batch_is_the_same_for_any_split(processes, micro):
    indices = np.arange(10)
    whole = list(GlobalBatches(indices, 8, 1, 0, 1, seed=5, first_step=0, last_step=4))
    parts = [iter(GlobalBatches(indices, 8, micro, rank, processes, 5, 0, 4)) for rank in range(processes)]
    for batch in whole:
        assert [key for part in parts for _ in range(micro) for key in next(part)] == batch


def test_every_epoch_is_a_permutation_and_resuming_continues_it():
    batches = list(GlobalBatches(np.arange(10), 4, 1, 0, 1, 0, 0, 5))
    keys = [key for batch in batches for key in batch]
    assert sorted(keys) == [(epoch, i) for epoch in (0, 1) for i in range(10)]
    assert [i for e, i in keys if e == 0] != [i for e, i in keys if e == 1]
    assert list(GlobalBatches(np.arange(10), 4, 1, 0, 1, 0, 3, 5)) == batches[3:]


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


def test_a_broken_image_is_named(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "bad.png").write_bytes(b"")
    with pytest.raises(InputError, match="bad.png cannot be read"):
        ImageFolder(DataConfig(path=str(tmp_path)), 0)[0, 0]


def test_latents_with_labels_and_with_text(tmp_path):
    classes = Latents(DataConfig(path=str(save_latents(tmp_path / "c", (4, 2, 2), 12))), 0)
    assert classes.num_classes == 10 and classes[0, 11]["labels"] == 1
    stored = np.load(tmp_path / "c" / "train_features" / "11.npy")
    assert np.array_equal(classes[0, 11]["latents"].numpy(), stored[0])
    texts = Latents(DataConfig(path=str(save_latents(tmp_path / "t", (4, 2, 2), 3, text=(7, 12)))), 0)
    assert texts[0, 0]["encoder_hidden_states"].shape == (7, 12) and texts.empty_text.shape == (7, 12)


def test_pickled_arrays_are_never_loaded(tmp_path):
    folder = save_latents(tmp_path / "c", (4, 2, 2), 2)
    np.save(folder / "train_features" / "0.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="0.npy cannot be read"):
        Latents(DataConfig(path=str(folder)), 0)[0, 0]
