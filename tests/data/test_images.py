import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from alter.data.images import Unreadable, load_pixels

CENTRE = (0.5, 0.5)


def encode(image, kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(np.iinfo(dtype).max, size=shape, dtype=dtype, endpoint=True)


def eight_bits(tensor) -> np.ndarray:
    """[height, width, 3] in 0..255, as float."""
    return (tensor.permute(1, 2, 0).numpy() + 1) * 127.5


def load(content, side, crop=CENTRE, mirror=False) -> np.ndarray:
    return eight_bits(load_pixels(content, [(side, side)], crop, mirror)["images"])


def on_white(colour, alpha) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize("crop, left", [((0.0, 0.5), 0), (CENTRE, 6), ((0.25, 0.9), 3), ((1.0, 0.0), 12)])
@pytest.mark.parametrize("mirror", [False, True])
def test_the_square_at_the_position_is_shown(crop, left, mirror):
    pixels = noise(8, 20, 3)
    square = pixels[:, left : left + 8]
    shown = load_pixels(encode(Image.fromarray(pixels)), [(8, 8)], crop, mirror)["images"]
    assert shown.dtype == torch.float32 and shown.shape == (3, 8, 8)
    assert np.array_equal(np.rint(eight_bits(shown)), square[:, ::-1] if mirror else square)
    high = load_pixels(encode(Image.fromarray(pixels.transpose(1, 0, 2))), [(8, 8)], crop[::-1], mirror)["images"]
    turned = square.transpose(1, 0, 2)
    assert np.array_equal(np.rint(eight_bits(high)), turned[:, ::-1] if mirror else turned)


def test_a_large_image_is_averaged_down_without_distortion(tmp_path):
    rows, columns = np.mgrid[:120, :240]
    picture = np.stack([np.full_like(rows, 40), rows, columns], -1).astype(np.uint8)
    file = tmp_path / "a.bmp"
    Image.fromarray(picture).save(file)
    shown = load(file, 4)
    middle = 15 + 30 * np.arange(4) - 0.5  # of each 30x30 block of the centre square
    assert np.allclose(shown[..., 0], 40, atol=1)
    assert np.allclose(shown[1:3, :, 1], middle[1:3, None], atol=2)
    assert np.allclose(shown[..., 2], 60 + middle, atol=1)


@pytest.mark.parametrize("shape", [(30000, 1), (1, 30000)])
def test_one_pixel_wide(shape):
    shown = load(encode(Image.new("RGB", shape, (10, 200, 30))), 4)
    assert np.array_equal(np.rint(shown), np.broadcast_to([10, 200, 30], (4, 4, 3)))


def test_grey_and_one_bit():
    grey = noise(5, 5)
    assert np.array_equal(np.rint(load(encode(Image.fromarray(grey)), 5)), np.repeat(grey[..., None], 3, -1))
    bits = grey > 127
    assert np.array_equal(load(encode(Image.fromarray(bits)), 5), np.repeat(255.0 * bits[..., None], 3, -1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled(kind):
    grey = noise(6, 6, dtype=np.uint16)
    grey[0, :4] = 0, 255, 256, 65535
    shown = load(encode(Image.fromarray(grey), kind), 6)
    assert np.abs(shown - grey[..., None] / 65535 * 255).max() <= 0.5 + 1e-4


def test_cmyk():
    ink = noise(6, 6, 4)
    shown = load(encode(Image.fromarray(ink, mode="CMYK"), "TIFF"), 6)
    light = 255 - ink.astype(float)
    assert np.abs(shown - light[..., :3] * light[..., 3:] / 255).max() <= 1


def test_transparency_becomes_white():
    alpha = noise(6, 6)
    alpha[0, :2] = 0, 255
    colour, grey = noise(6, 6, 3), noise(6, 6)
    rgba, la = np.dstack([colour, alpha]), np.dstack([grey, alpha])
    assert np.abs(load(encode(Image.fromarray(rgba)), 6) - on_white(colour, alpha)).max() <= 1
    la_file = encode(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]))
    assert Image.open(io.BytesIO(la_file)).mode == "LA"
    assert np.abs(load(la_file, 6) - on_white(la[..., :1].repeat(3, -1), alpha)).max() <= 1


def test_palettes_and_transparent_colours():
    palette, index = noise(4, 3), noise(6, 6) % 4
    image = Image.fromarray(index, mode="P")
    image.putpalette(palette.reshape(-1).tolist())
    assert np.array_equal(np.rint(load(encode(image), 6)), palette[index])
    alpha = np.array([0, 255, 128, 255])
    shown = load(encode(image, transparency=bytes(alpha.tolist())), 6)
    assert np.abs(shown - on_white(palette[index], alpha[index])).max() <= 1
    rgb = palette[index]
    shown = load(encode(Image.fromarray(rgb), transparency=tuple(palette[2].tolist())), 6)
    assert np.array_equal(np.rint(shown), np.where(index[..., None] == 2, 255, rgb))


@pytest.mark.parametrize("orientation, upright", [
    (1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: np.rot90(a, 2)), (4, lambda a: a[::-1]),
    (5, lambda a: a.transpose(1, 0, 2)), (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)), (8, lambda a: np.rot90(a)),
])
def test_exif_orientation(orientation, upright):
    pixels = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = upright(pixels)[:4, :4]
    assert np.array_equal(np.rint(load(encode(Image.fromarray(pixels), exif=exif), 4, (0.0, 0.0))), expected)


@pytest.mark.parametrize("size, crop, mirror, corner", [
    ((20, 20), CENTRE, False, [0, 5]), ((20, 20), (1.0, 0.0), False, [0, 10]), ((20, 20), (1.0, 0.0), True, [0, 0]),
    ((20, 20), (0.2, 0.0), True, [0, 8]), ((10, 30), (0.5, 1.0), False, [10, 0]), ((20, 30), CENTRE, True, [0, 0]),
])
def test_the_part_that_is_shown_lies_in_the_resized_image_where_sizes_say(size, crop, mirror, corner):
    image = Image.fromarray(np.kron(noise(4, 6, 3), np.ones((10, 10, 1), np.uint8)))
    shown = load_pixels(encode(image), [size], crop, mirror)
    assert shown["sizes"].tolist() == [40, 60, *corner]
    scale = max(size[0] / 40, size[1] / 60)
    whole = np.array(image.resize((round(60 * scale), round(40 * scale)), Image.Resampling.BICUBIC)).astype(float)
    top, left = corner
    part = (whole[:, ::-1] if mirror else whole)[top : top + size[0], left : left + size[1]]
    assert part.shape == (*size, 3)
    assert np.abs(eight_bits(shown["images"]) - part).mean() < 3


def test_the_nearest_of_several_shapes_is_taken():
    shapes = [(16, 16), (8, 32), (32, 8)]
    for (width, height), expected in {(50, 40): 0, (90, 30): 1, (30, 100): 2}.items():
        shown = load_pixels(encode(Image.new("RGB", (width, height))), shapes, CENTRE, False)["images"]
        assert tuple(shown.shape) == (3, *shapes[expected])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **(
        {"lossless": True} if kind == "WEBP" else {}))
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert np.array_equal(np.rint(load(content, 6)), np.broadcast_to([255, 0, 0], (6, 6, 3)))


def png_header(width, height) -> bytes:
    """A PNG that claims this size, and ends where its pixels would begin."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 10) + b"IDAT"


PICTURE = Image.fromarray(noise(32, 32, 3))


@pytest.mark.parametrize("content, reason", [
    (b"", "not an image"),
    (b"<html>404 Not Found</html>", "not an image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not an image"),
    (encode(PICTURE)[:200], "truncated"),
    (encode(PICTURE)[:12], "not an image"),
    (encode(PICTURE, "JPEG")[:700], "truncated"),
    (encode(PICTURE, "GIF")[:400], "."),
    (encode(PICTURE, "WEBP")[:100], "."),
    (encode(PICTURE, "TIFF")[:40], "."),
    (encode(PICTURE).replace(b"IDAT", b"IDAX"), "."),
    (png_header(60000, 60000), "3600000000 pixels"),
    (png_header(10000, 10000), "100000000 pixels, more than the limit of 89478485"),
    (png_header(0, 5), "."),
    (encode(Image.fromarray(np.float32([[0.5]])), "TIFF"), "floating-point"),
    (encode(Image.fromarray(np.int32([[70000]])), "TIFF"), "more than 16 bits"),
])
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_used_is_unreadable(content, reason, tmp_path, capfd):
    (tmp_path / "a.png").write_bytes(content)
    for given in (content, tmp_path / "a.png"):
        with pytest.raises(Unreadable, match=reason) as caught:
            load_pixels(given, [(8, 8)], CENTRE, False)
        assert "\n" not in str(caught.value) and len(str(caught.value)) <= 200
    assert capfd.readouterr() == ("", "")


def test_whatever_bytes_are_damaged_nothing_else_is_raised():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = encode(PICTURE, kind)
        for _ in range(60):
            content = bytearray(whole)
            for place in rng.integers(min(len(content), 200), size=4):
                content[place] = rng.integers(256)
            try:
                assert load_pixels(bytes(content), [(8, 8)], CENTRE, False)["images"].isfinite().all()
            except Unreadable as error:
                assert str(error)


def test_a_missing_file_and_a_pipe(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.png")
    for name in ("none.png", "pipe.png", "."):
        with pytest.raises(Unreadable, match="no such file"):
            load_pixels(tmp_path / name, [(8, 8)], CENTRE, False)
