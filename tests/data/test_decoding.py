import json
from io import BytesIO

import numpy as np
import pytest
from PIL import ExifTags, Image

from icd_lightning.data.decoding import SampleDecoder, collate
from icd_lightning.data.images import resize_and_crop, to_images, to_rgb
from icd_lightning.data.tally import RejectedError


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def sample(image: Image.Image | None = None, **files) -> dict:
    image = image or Image.new("RGB", (8, 8))
    return {"__key__": "a", "__url__": "0.tar", "png": encoded(image), "txt": b" a caption\n", **files}


def halves(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Left half black, right half white."""
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels).convert(mode)


def test_images_span_minus_one_to_one():
    pictures = [np.zeros((4, 6, 3), np.uint8), np.full((4, 6, 3), 255, np.uint8)]
    images = to_images(pictures)
    assert images.shape == (2, 3, 4, 6)
    assert images.is_contiguous()
    assert images[0].unique().tolist() == [-1]
    assert images[1].unique().tolist() == [1]


def test_the_short_side_is_resized_and_the_centre_cut_out():
    decoded = SampleDecoder(8).decode(sample(halves(32, 16)))
    assert decoded.picture.shape == (8, 8, 3)
    assert decoded.picture[:, :3].max() < 30  # the edge is in the middle still: cut, not squeezed
    assert decoded.picture[:, 5:].min() > 225
    assert decoded.metadata == {"original_size": (16, 32), "crop_top_left": (0, 4)}
    tall = SampleDecoder(8).decode(sample(Image.new("RGB", (16, 24))))
    assert tall.metadata == {"original_size": (24, 16), "crop_top_left": (2, 0)}


def test_a_picture_of_the_right_size_is_not_touched():
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(SampleDecoder(8).decode(sample(Image.fromarray(picture))).picture, picture)


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp"])
def test_formats(extension):
    data = encoded(Image.new("RGB", (8, 8), (250, 0, 0)), "JPEG" if extension == "jpg" else extension)
    raw = {"__key__": "a", "__url__": "0.tar", extension: data, "txt": b"red"}
    picture = SampleDecoder(8).decode(raw).picture
    assert picture[..., 0].min() > 240
    assert picture[..., 1:].max() < 10


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = halves(8, 8, "L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    lossy = {"format": "JPEG", "quality": 100} if mode == "CMYK" else {"format": "PNG"}
    raw = sample() | {"png": encoded(image, **lossy)}
    picture = SampleDecoder(8).decode(raw).picture
    assert picture.shape == (8, 8, 3)
    assert picture[:, :4].max() <= (6 if mode == "CMYK" else 0)
    assert picture[:, 4:].min() >= (249 if mode == "CMYK" else 255)


def test_transparency_shows_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert SampleDecoder(8).decode(sample(clear)).picture.min() == 255
    palette = Image.new("P", (8, 8))
    raw = sample() | {"png": encoded(palette, transparency=0)}
    assert SampleDecoder(8).decode(raw).picture.min() == 255


def test_exif_turns_the_picture_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    raw = sample() | {"jpg": encoded(halves(16, 8), "JPEG", exif=exif)}
    decoded = SampleDecoder(8).decode(raw)
    assert decoded.metadata["original_size"] == (16, 8)
    assert decoded.picture[:3].max() < 30
    assert decoded.picture[5:].min() > 225


def test_captions_from_text_or_json():
    raw = sample(json=json.dumps({"title": "a title", "number": 3}).encode())
    assert SampleDecoder(8).decode(raw).caption == "a caption"
    decoded = SampleDecoder(8, caption_field="title").decode(raw)
    assert decoded.caption == "a title"
    assert decoded.metadata["number"] == 3


def test_a_caption_file_serves_where_there_is_no_text():
    raw = sample(caption=b" from a .caption file\n")
    assert SampleDecoder(8).decode(raw).caption == "a caption"
    assert SampleDecoder(8).decode(raw | {"txt": b" "}).caption == "from a .caption file"
    del raw["txt"]
    assert SampleDecoder(8).decode(raw).caption == "from a .caption file"


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"png": b"not a picture"}, {}, "corrupt_image"),
        ({"png": None}, {}, "no_image"),
        ({"txt": b"  \n"}, {}, "no_caption"),
        ({"txt": None}, {}, "no_caption"),
        ({}, {"caption_field": "title"}, "no_caption"),
        ({"json": b'{"title": 3}'}, {"caption_field": "title"}, "no_caption"),
        ({"json": b"{"}, {}, "corrupt_json"),
        ({"json": b"[1]"}, {}, "corrupt_json"),
        ({}, {"resolution": 9}, "too_small"),
        ({}, {"min_size": 10}, "too_small"),
    ],
)
def test_what_is_rejected_before_any_pixel_is_decoded(change, options, reason):
    raw = {name: data for name, data in (sample() | change).items() if data is not None}
    decoder = SampleDecoder(**({"resolution": 8} | options))
    with pytest.raises(RejectedError) as error:
        decoder.admit(raw)
    assert error.value.reason == reason
    with pytest.raises(RejectedError) as error:
        decoder.decode(raw)
    assert error.value.reason == reason


def test_pixels_cut_off_are_found_when_decoding():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for extension, data in (("png", encoded(picture)), ("jpg", encoded(picture, "JPEG"))):
        raw = {"__key__": "a", "__url__": "0.tar", extension: data[: len(data) // 2], "txt": b"a"}
        SampleDecoder(8).admit(raw)
        with pytest.raises(RejectedError, match="corrupt_image"):
            SampleDecoder(8).decode(raw)


def test_small_pictures_are_enlarged_only_when_allowed():
    assert SampleDecoder(16, min_size=0).decode(sample()).picture.shape == (16, 16, 3)


def test_collate_keeps_samples_together():
    decoder = SampleDecoder(8)
    batch = collate([decoder.decode(sample(__key__=key, txt=key.encode())) for key in "xyz"])
    assert batch.images.shape == (3, 3, 8, 8)
    assert batch.keys == batch.captions == ["x", "y", "z"]
    assert len(batch.metadata) == 3


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same():
    rows, columns = np.mgrid[:1024, :1536] / 1024
    waves = [127 + 100 * np.sin(9 * rows * columns + channel) for channel in range(3)]
    image = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    raw = sample() | {"jpg": encoded(image, "JPEG", quality=95, exif=turned)}
    raw.pop("png")
    decoded = SampleDecoder(64).decode(raw)
    whole, crop_top_left = resize_and_crop(to_rgb(Image.open(BytesIO(raw["jpg"]))), 64)
    assert decoded.metadata == {"original_size": (1536, 1024), "crop_top_left": crop_top_left}
    assert np.abs(decoded.picture.astype(float) - np.asarray(whole)).mean() < 1
