import time
from itertools import chain, islice

import pytest
from shards_case import corrupt, numbered_samples, numbers, with_corrupt

from icd_lightning.data.decoding import SampleDecoder
from icd_lightning.data.shards import open_shards, write_shards
from icd_lightning.data.stream import Piece, TrainStream
from icd_lightning.data.tally import NothingToReadError, Tally


def stream_over(urls, *, verify="count", min_size=None, **options) -> TrainStream:
    defaults = {"batch_size": 5, "batches_per_epoch": 12, "shuffle_buffer": 8}
    return TrainStream(open_shards(str(urls), verify=verify), SampleDecoder(8, None, min_size), **(defaults | options))


def seen(batches) -> list[int]:
    return list(chain.from_iterable(map(numbers, batches)))


def readers(urls, world_size: int, num_workers: int, epoch: int = 0, **options) -> list[list[int]]:
    """What each worker of each rank sees in an epoch that uses 60 samples."""
    length = 60 // (5 * world_size)
    options = {"batches_per_epoch": length} | options
    return [
        seen(
            stream_over(urls, rank=rank, world_size=world_size, **options).batches(
                epoch, Tally(), worker=worker, num_workers=num_workers
            )
        )
        for rank in range(world_size)
        for worker in range(num_workers)
    ]


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 4), (4, 2), (12, 1)])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_shows_every_sample_once_over_ranks_and_workers(shards, world_size, num_workers, epoch):
    shares = readers(shards, world_size, num_workers, epoch)
    assert sorted(chain.from_iterable(shares)) == list(range(60))


def test_ranks_get_equal_shares_and_what_is_over_changes_with_the_epoch(shards):
    options = {"batches_per_epoch": 3, "batch_size": 8}
    left_out = []
    for epoch in range(6):
        shares = readers(shards, 2, 2, epoch, **options)
        together = list(chain.from_iterable(shares))
        assert [len(a) + len(b) for a, b in zip(shares[::2], shares[1::2], strict=True)] == [24, 24]
        assert len(set(together)) == 48
        left_out.append(frozenset(range(60)) - set(together))
    assert len(set(left_out)) > 1


def test_short_epochs_walk_through_the_shards_without_repeats(shards):
    stream = stream_over(shards, batches_per_epoch=4)
    epochs = [seen(stream.batches(epoch, Tally())) for epoch in range(6)]
    assert sorted(chain(*epochs[:3])) == list(range(60))
    assert sorted(chain(*epochs[3:])) == list(range(60))
    assert epochs[0] != epochs[3]


def test_an_epoch_longer_than_the_data_reads_them_again(shards):
    shares = readers(shards, 2, 2, batches_per_epoch=18)
    assert sum(map(len, shares)) == 180
    assert sorted(set(chain(*shares))) == list(range(60))
    for one in range(4):
        assert not set(shares[one]) & set(chain(*(shares[:one] + shares[one + 1 :])))


def test_shards_that_cannot_be_counted_are_dealt_out_whole(shards):
    pipes = [f"pipe:cat {shards}/{n:05d}.tar" for n in range(6)]
    streams = [
        TrainStream(open_shards(pipes), SampleDecoder(8), 5, 4, shuffle_buffer=8, rank=rank, world_size=3)
        for rank in range(3)
    ]
    assert sorted(chain(*(seen(stream.batches(0, Tally())) for stream in streams))) == list(range(60))
    assert [piece.stop for piece in streams[0].pieces(0)] == [None, None]


def test_the_seed_decides_the_order(shards):
    first, again, other = (seen(stream_over(shards, seed=seed).batches(0, Tally())) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first != sorted(first)
    assert seen(stream_over(shards).batches(1, Tally())) != first


def test_no_buffer_keeps_the_order_within_a_shard(shards):
    order = seen(stream_over(shards, shuffle_buffer=0).batches(0, Tally()))
    assert all(order[i + 1] == order[i] + 1 for i in range(59) if (i + 1) % 10)


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("position", [0, 1, 7, 12, 17, 31])
def test_a_stream_entered_anywhere_goes_on_as_if_read_from_the_start(shards, slots, position):
    stream = stream_over(shards)

    def interleaved(start):  # as a DataLoader collects from its workers
        workers = [stream.batches_from(start, Tally(), slot=slot, slots=slots) for slot in range(slots)]
        while True:
            for worker in workers:
                yield numbers(next(worker))

    whole = list(islice(interleaved(0), 40))
    assert list(islice(interleaved(position), 40 - position)) == whole[position:]
    assert sorted(chain(*whole[:12])) == sorted(chain(*whole[12:24])) == list(range(60))


def test_a_corrupt_picture_is_replaced_by_a_good_one_of_the_same_share(tmp_path):
    bad = {3, 17, 18, 19, 59}
    with_corrupt(tmp_path, bad)
    stream, tally = stream_over(tmp_path), Tally()
    batches = list(stream.batches(0, tally))
    assert [len(batch.keys) for batch in batches] == [5] * 12
    assert set(seen(batches)) == set(range(60)) - bad
    assert tally.counts()["corrupt_image"] >= 5
    for skip in range(12):
        later = list(stream.batches(0, Tally(), skip=skip))
        assert [numbers(batch) for batch in later] == [numbers(batch) for batch in batches[skip:]]


def test_skipping_decodes_nothing(shards, monkeypatch):
    decoded = []
    finish = SampleDecoder.finish
    monkeypatch.setattr(SampleDecoder, "finish", lambda self, one: decoded.append(one.key) or finish(self, one))
    next(stream_over(shards).batches(0, Tally(), skip=10))
    assert len(decoded) == 5


def test_each_sample_is_checked_once(shards, monkeypatch):
    checked = []
    admit = SampleDecoder.admit
    monkeypatch.setattr(SampleDecoder, "admit", lambda self, raw: checked.append(raw["__key__"]) or admit(self, raw))
    assert len(seen(stream_over(shards).batches(0, Tally()))) == len(checked) == len(set(checked)) == 60


def test_the_time_before_a_stream_is_entered_is_no_silence(tmp_path):
    samples = [sample | ({"txt": b""} if n % 10 == 0 else {}) for n, sample in enumerate(numbered_samples(60))]
    write_shards(samples, tmp_path, shard_size=10, parameters={})
    tally = Tally(max_skipped=0.5, stall_timeout=1.0)
    time.sleep(1.1)  # then the first sample of all is one that cannot be used
    assert len(next(stream_over(tmp_path, shuffle_buffer=0).batches(0, tally, skip=1)).keys) == 5


def test_samples_are_skipped_for_a_reason_and_counted(tmp_path):
    samples = numbered_samples(60)
    samples[1] |= {"txt": b""}
    samples[2] |= {"png": numbered_samples(1, size=4)[0]["png"]}
    samples[3] |= {"json": b"{"}
    samples[4] |= {"png": b"?"}
    del samples[5]["png"]
    write_shards(samples, tmp_path, shard_size=10, parameters={})
    tally = Tally()
    assert set(seen(stream_over(tmp_path, batches_per_epoch=11).batches(0, tally))) <= {0, *range(6, 60)}
    counts = tally.counts()
    assert [counts[r] for r in ("no_caption", "too_small", "corrupt_json", "corrupt_image", "no_image")] == [1] * 5
    assert counts["passed"] == 55


def test_a_damaged_tar_gives_what_it_still_holds(shards):
    (shards / "manifest.json").unlink()
    (shards / "00002.tar").write_bytes((shards / "00002.tar").read_bytes()[:7000])
    (shards / "00003.tar").write_bytes(b"no tar at all, only text" * 100)
    tally = Tally()
    found = set(seen(stream_over(shards, verify="off").batches(0, tally)))
    assert found > {*range(20), *range(40, 60)}
    assert not found & set(range(30, 40))
    assert tally.counts()["broken_shard"] >= 2


def test_a_shard_that_goes_away_is_counted(shards):
    stream, tally = stream_over(shards), Tally()
    (shards / "00001.tar").unlink()
    assert set(seen(stream.batches(0, tally))) == set(range(60)) - set(range(10, 20))
    assert tally.counts()["broken_shard"] >= 1


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(lambda s: s | {"txt": b""}, "no_caption"), (corrupt, "corrupt_image"), (lambda s: s | {"png": b"?"}, "corrupt")],
)
def test_only_bad_samples_end_in_an_error(tmp_path, spoil, reason):
    write_shards(map(spoil, numbered_samples(60)), tmp_path, shard_size=10, parameters={})
    with pytest.raises(
        NothingToReadError, match=f"none of the samples for worker 0 of rank 0 could be used .*{reason}"
    ):
        next(stream_over(tmp_path).batches(0, Tally()))


def test_a_piece_reads_a_part_of_a_shard(shards):
    keys = [raw["__key__"] for raw in Piece(str(shards / "00001.tar"), 2, 5).read(Tally())]
    assert keys == ["00012", "00013", "00014"]
