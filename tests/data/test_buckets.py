import math
from collections import Counter
from io import BytesIO
from itertools import chain, islice

import numpy as np
import pytest
from PIL import Image

from icd_lightning.data.datamodule import ShardDataModule
from icd_lightning.data.decoding import SampleDecoder, bucket_sizes, bucket_step, nearest_bucket
from icd_lightning.data.index import open_indexes
from icd_lightning.data.shards import encode_sample, open_shards, write_shards
from icd_lightning.data.stream import TrainStream, find_places
from icd_lightning.data.tally import RejectedError, Tally


@pytest.mark.parametrize("resolution", [64, 128, 256, 512, 768, 1024])
def test_buckets_hold_about_as_many_pixels_as_the_square_in_all_forms(resolution):
    sizes, step = bucket_sizes(resolution), bucket_step(resolution)
    assert step == min(64, resolution // 8) or resolution == 768
    assert len(set(sizes)) == len(sizes)
    assert (resolution, resolution) in sizes
    assert {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert 0.8 * resolution**2 <= height * width <= resolution**2
        assert 1 / 4 <= height / width <= 4
    assert {(2048, 512), (1216, 832), (896, 1152)} <= set(bucket_sizes(1024))  # three that SDXL was trained in


def test_the_nearest_bucket_has_the_form_of_the_picture():
    for size in bucket_sizes(512):
        assert nearest_bucket(*(3 * side for side in size), 512) == size
    assert nearest_bucket(100, 10_000, 512) == (256, 1024)
    assert nearest_bucket(3000, 4000, 1024) == (896, 1152)
    ratios = np.geomspace(0.25, 4, 101)
    gaps = [
        abs(math.log(ratio / (h / w)))
        for ratio in ratios
        for h, w in [nearest_bucket(round(1e4 * ratio), 10_000, 1024)]
    ]
    assert max(gaps) < math.log(1.2)  # at most a sixth of a picture is cut off


def raw(width: int, height: int, format: str = "PNG", **options) -> dict:
    """Left half black, right half white."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, width // 2 :] = 255
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, format, **options)
    return {"__key__": "a", "__url__": "0.tar", "jpg" if format == "JPEG" else "png": stream.getvalue(), "txt": b"a"}


def test_a_picture_is_brought_to_its_bucket_and_the_crop_is_kept():
    decoder = SampleDecoder(64, buckets=True)
    wide = raw(300, 190)  # 1.58; 80 x 48 is 1.67
    decoded = decoder.decode(wide)
    assert decoder.admit(wide).size == decoded.picture.shape[:2] == (48, 80)
    assert decoded.metadata == {"original_size": (190, 300), "crop_top_left": (1, 0)}
    assert decoded.picture[:, :39].max() < 40
    assert decoded.picture[:, 41:].min() > 215
    assert decoder.admit(raw(190, 300)).size == (80, 48)
    assert decoder.admit(raw(64, 64)).size == (64, 64)
    assert SampleDecoder(64).admit(wide).size == (64, 64)


def test_a_turned_picture_goes_to_the_bucket_of_its_upright_form():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = raw(320, 192, "JPEG", exif=exif)
    decoder = SampleDecoder(64, buckets=True)
    assert decoder.admit(turned).size == decoder.decode(turned).picture.shape[:2] == (80, 48)
    assert decoder.decode(turned).metadata["original_size"] == (320, 192)


@pytest.mark.parametrize(
    ("size", "options", "fits"),
    [
        ((128, 32), {}, True),
        ((127, 32), {}, False),
        ((60, 60), {}, False),
        ((60, 60), {"min_size": 60}, True),
        ((128, 32), {"min_size": 33}, False),
        ((9, 9), {"min_size": 0}, True),
    ],
)
def test_what_would_have_to_be_enlarged_is_left_out_unless_allowed(size, options, fits):
    decoder = SampleDecoder(64, buckets=True, **options)
    if fits:
        assert decoder.admit(raw(*size)).size == decoder.decode(raw(*size)).picture.shape[:2]
    else:
        with pytest.raises(RejectedError, match=r"too_small: a of 0\.tar is"):
            decoder.admit(raw(*size))


FORMS = ((64, 64), (96, 40), (40, 96), (80, 48))


@pytest.fixture
def mixed(tmp_path):
    """160 pictures of four forms, of which one is corrupt."""
    samples = [
        encode_sample(f"{n:05d}", np.full((*FORMS[n % 7 % 4], 3), n, dtype=np.uint8), f"picture {n}", {"number": n})
        for n in range(160)
    ]
    samples[3]["png"] = samples[3]["png"][:60]
    write_shards(samples, tmp_path / "shards", shard_size=20, parameters={})
    return tmp_path / "shards"


def stream_over(urls, *, tally=None, **options) -> TrainStream:
    defaults = {"batch_size": 4, "batches_per_epoch": 30, "shuffle_buffer": 16}
    decoder, found = SampleDecoder(64, buckets=True), tuple(shard.url for shard in open_shards(str(urls)))
    places = find_places(found, open_indexes(found, None), decoder, tally or Tally())
    return TrainStream(places, decoder, **(defaults | options))


def test_a_batch_holds_one_size_and_all_sizes_come_in_proportion(mixed):
    batches = list(islice(stream_over(mixed).batches_from(0, Tally()), 40 * 4))
    sizes = Counter(tuple(batch.images.shape) for batch in batches)
    assert set(sizes) == {(4, 3, *form) for form in FORMS}
    for batch in batches:
        for image, metadata in zip(batch.images, batch.metadata, strict=True):
            assert metadata["original_size"] == tuple(image.shape[1:])
            assert ((image + 1) * 127.5).round().unique().tolist() == [metadata["number"]]
    wanted = Counter(FORMS[n % 7 % 4] for n in range(160))  # in four passes each form fills as many batches
    assert all(abs(sizes[(4, 3, *form)] - count) <= 1 for form, count in wanted.items())
    seen = Counter(chain(*(batch.keys for batch in batches)))
    assert "00003" not in seen
    assert len(seen) == 159


@pytest.mark.parametrize("world_size", [1, 4])
def test_forms_too_rare_for_a_batch_in_a_pass_come_as_often_as_all_others(tmp_path, world_size):
    """Of 100 pictures three are tall and one is wide."""
    forms = {5: FORMS[1], 50: FORMS[1], 95: FORMS[1], 70: FORMS[2]}
    samples = [
        encode_sample(f"{n:05d}", np.zeros((*forms.get(n, FORMS[0]), 3), dtype=np.uint8), "one", {}) for n in range(100)
    ]
    write_shards(samples, tmp_path, shard_size=10, parameters={})
    streams = [stream_over(tmp_path, batch_size=8, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [islice(stream.batches_from(0, Tally()), 200 // world_size) for stream in streams]
    seen = Counter(chain(*(batch.keys for batch in chain(*batches))))
    assert len(seen) == 100
    assert set(seen.values()) == {16}


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("position", [0, 1, 17, 30, 41])
def test_a_bucketed_stream_entered_anywhere_goes_on_as_if_read_from_the_start(mixed, slots, position):
    def keys(start, count):
        workers = [stream_over(mixed).batches_from(start, Tally(), slot=slot, slots=slots) for slot in range(slots)]
        return [next(workers[place % slots]).keys for place in range(count)]

    assert keys(position, 12) == keys(0, position + 12)[position:]


def test_training_in_buckets_validates_on_squares(mixed):
    data = ShardDataModule(
        str(mixed), val_urls=str(mixed), batch_size=4, resolution=64, min_size=0, buckets=True, shuffle_buffer=8
    )
    data.setup("fit")
    assert len({batch.images.shape for batch in islice(data.train_dataloader(), 20)}) > 1
    assert {batch.images.shape[2:] for batch in data.val_dataloader()} == {(64, 64)}
    with pytest.raises(ValueError, match="resolution 100 must be a multiple of 8 to be trained in buckets"):
        ShardDataModule(str(mixed), resolution=100, buckets=True)
