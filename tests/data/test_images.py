from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from icd_lightning.data.images import quantize, read_picture, save_png, to_images, to_pictures, to_rgb, upright_size


def noise(height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_there_and_back_every_value_survives():
    picture = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    np.testing.assert_array_equal(to_pictures(to_images([picture, 255 - picture])), [picture, 255 - picture])


def test_what_is_out_of_range_is_clamped():
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    assert quantize(values).tolist() == [0, 0, 128, 255, 255]
    assert quantize(values.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.gif", "a.webp", "a.avif", "a.jp2", "no_extension"])
def test_any_format_by_its_content(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(noise()).save(path, format="PNG" if "." not in name else None)
    read = read_picture(path)
    assert (read.mode, read.size) == ("RGB", (16, 12))


def test_a_picture_read_is_upright_and_on_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    Image.fromarray(noise()).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (12, 16)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_picture(tmp_path / "clear.png")).min() == 255


def write_text(path: Path) -> None:
    path.write_text("no picture")


def write_half(path: Path) -> None:
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def write_line(path: Path) -> None:
    Image.new("RGB", (510, 10)).save(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "there is no picture at"),
        (Path.mkdir, "is a folder, not a picture"),
        (Path.touch, "cannot be read as a picture"),
        (write_text, "cannot be read as a picture"),
        (write_half, "cannot be read as a picture"),
        (write_line, "510 x 10 pixels, is too narrow"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(tmp_path, write, message):
    path = tmp_path / "a.png"
    write(path)
    with pytest.raises(ValueError, match=rf"a\.png.*{message}|{message}.*a\.png"):
        read_picture(path)


def test_a_decompression_bomb_is_refused_and_a_large_picture_is_not(tmp_path, monkeypatch, recwarn):
    Image.fromarray(noise(40, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1001)
    assert read_picture(tmp_path / "a.png").size == (50, 40)
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 999)
    with pytest.raises(ValueError, match=r"a\.png has more than .* million pixels"):
        read_picture(tmp_path / "a.png")


def test_more_pixels_than_are_wanted_are_not_decoded(tmp_path, monkeypatch):
    Image.fromarray(noise(40, 50)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", max_pixels=2000).size == (50, 40)
    monkeypatch.setattr(PngImageFile, "load", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"a\.png has more than 0 million pixels"):
        read_picture(tmp_path / "a.png", max_pixels=1999)


def test_a_png_keeps_its_pixels_and_says_how_it_was_made(tmp_path):
    picture = noise()
    about = {"prompt": "a «red» circle, 紅い円", "Software": "icd", "seed": 3, "empty": ""}
    save_png(picture, tmp_path / "new" / "a.png", about=about)
    with Image.open(tmp_path / "new" / "a.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), picture)
        assert saved.text == {key: str(value) for key, value in about.items()}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damage", [lambda data: b"Exif\0\0garbage", lambda data: data[:8], lambda data: data[:-3]])
def test_damaged_exif_costs_no_pixel(tmp_path, kind, damage):
    """A picture is read as without it, and what was read can be taken for a picture again."""
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    image, path = Image.fromarray(noise()), tmp_path / "x"
    image.save(path, kind)
    expected = read_picture(path)
    image.save(path, kind, exif=damage(exif.tobytes()))
    with Image.open(path) as opened:
        assert upright_size(opened) == (12, 16)
    read = read_picture(path)
    np.testing.assert_array_equal(np.asarray(read), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(to_rgb(read)), np.asarray(expected))
