"""Letters of matplotlib's fonts: real glyphs with the right labels, the same for the same seed."""

import torch
from PIL import ImageFont

from alter.common.config import DataConfig
from alter.data.glyphs import CLASSES, SIZE, draw_glyphs, fonts, write_glyphs
from alter.data.latents import FastDiT
from alter.evaluation.classifier import accuracy, train_classifier


def test_fonts_of_symbols_are_left_out():
    names = {font.name for font in fonts()}
    assert {"DejaVuSans.ttf", "STIXGeneral.ttf", "cmr10.ttf"} <= names and len(names) >= 20
    assert not names & {"cmex10.ttf", "LastResortHE-Regular.ttf", "STIXSizOneSymReg.ttf"}
    for font in fonts():
        shapes = {bytes(ImageFont.truetype(str(font), 40).getmask(letter)) for letter in CLASSES}
        assert len(shapes) == len(CLASSES), f"{font.name} draws two letters alike"


def test_a_seed_draws_the_same_letters_of_all_classes():
    (images, labels), (again, same), (others, _) = draw_glyphs(400, 3), draw_glyphs(400, 3), draw_glyphs(400, 4)
    assert torch.equal(images, again) and torch.equal(labels, same)
    assert images.shape == (400, 1, SIZE, SIZE) and images.dtype == torch.float32
    assert -1 <= images.min() and images.max() <= 1
    assert set(labels.tolist()) == set(range(len(CLASSES)))
    assert len({image.numpy().tobytes() for image in (*images, *others)}) == 800
    assert (images.flatten(1).amax(1) > 0).all(), "a letter can be seen in every image"


def test_no_letter_is_cut_off_at_the_border():
    images, _ = draw_glyphs(400, 0)
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], dim=-1)
    assert (border > 0).float().mean() < 0.01


def test_a_classifier_learns_the_labels():
    classifier = train_classifier(*draw_glyphs(1000, 0), seed=0, steps=100)
    assert accuracy(classifier, *draw_glyphs(300, 1)) > 0.5  # by chance 0.1


def test_written_letters_are_latents_with_classes(tmp_path):
    write_glyphs(tmp_path / "glyphs", 30, 5)
    source = FastDiT(DataConfig(path=str(tmp_path / "glyphs")), 0)
    images, labels = draw_glyphs(30, 5)
    assert len(source) == 30
    for i in range(30):
        assert torch.equal(source[0, i]["latents"], images[i]) and source[0, i]["labels"] == labels[i]
    assert [path.name for path in tmp_path.iterdir()] == ["glyphs"]
