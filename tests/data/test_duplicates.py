import numpy as np
import pytest
from curation_case import jpeg, photograph
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from icd_lightning.data.curation.duplicates import (
    DUPLICATE,
    KEPT,
    LEAKED,
    NEAR,
    Duplicates,
    Prints,
    near_pairs,
    perceptual_hash,
)


def prints(*images: Image.Image, quality: int = 90) -> Prints:
    return Prints.join(Prints.of(jpeg(image, quality), image) for image in images)


def changed(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(ImageOps.crop(image, 1).resize(image.size)).enhance(1.05)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10), st.integers(0, 2**32), st.integers(1, 120))
def test_the_index_finds_all_near_pairs_and_no_others(radius, seed, number):
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, 1 + number // 8, dtype=np.uint64)
    hashes = centres[rng.integers(0, len(centres), number)]
    for _ in range(rng.integers(9)):  # flips up to 8 bits of each
        hashes = hashes ^ (np.uint64(1) << rng.integers(0, 64, number, dtype=np.uint64))
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = np.argwhere(np.triu(distances <= radius, 1))
    np.testing.assert_array_equal(near_pairs(hashes, radius), expected)


def test_a_large_set_is_not_compared_pair_by_pair():
    hashes = np.random.default_rng(0).integers(0, 2**64, 50_000, dtype=np.uint64)  # 1.2 billion pairs
    hashes[7] = hashes[40_000] ^ np.uint64(0b1011)
    assert near_pairs(hashes, 3).tolist() == [[7, 40_000]]


def test_a_hash_does_not_depend_on_size_brightness_or_compression():
    image = photograph(1, 256)
    others = (image.resize((128, 128)), ImageEnhance.Brightness(image).enhance(1.1), changed(image))
    for other in others:
        assert np.bitwise_count(perceptual_hash(image) ^ perceptual_hash(other)) <= 6
    assert np.bitwise_count(perceptual_hash(image) ^ perceptual_hash(photograph(2, 256))) > 16


def test_flat_pictures_have_one_hash_and_are_told_apart_by_their_colour():
    flat = [Image.new("RGB", (64, 64), colour) for colour in ("red", "red", "blue", "white")]
    found = Prints.join(Prints.of(str(n).encode(), image) for n, image in enumerate(flat))
    assert len(set(found.hash.tolist())) == 1
    assert Duplicates().verdicts(found, 0).tolist() == [KEPT, NEAR, KEPT, KEPT]


def test_the_first_is_kept_and_a_benchmark_keeps_its_own():
    one, two, three = (photograph(number, 128) for number in (1, 2, 3))
    found = prints(one, two, changed(one), two, three, changed(three))  # the first two are a benchmark's
    assert Duplicates().verdicts(found, 2).tolist() == [KEPT, KEPT, LEAKED, LEAKED, KEPT, NEAR]
    assert Duplicates().verdicts(found, 0).tolist() == [KEPT, KEPT, NEAR, DUPLICATE, KEPT, NEAR]
    assert Duplicates(among=False).verdicts(found, 2).tolist() == [KEPT, KEPT, LEAKED, LEAKED, KEPT, KEPT]


def test_only_what_is_kept_drops_others():
    """b is near a, and c near b but not near a: without b, c is no duplicate."""
    look = np.full((3, 192), 100, np.uint8)
    hashes = np.array([0, 0b111, 0b111111], np.uint64)
    found = Prints(np.arange(3, dtype=np.uint64), hashes, look)
    assert Duplicates(radius=3).verdicts(found, 0).tolist() == [KEPT, NEAR, KEPT]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"radius": -1}, "radius -1"), ({"radius": 17}, "radius 17"), ({"difference": float("nan")}, "difference nan")],
)
def test_wrong_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Duplicates(**options)
