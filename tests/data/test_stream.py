import time
from collections import Counter
from itertools import chain

import pytest
from shards_case import corrupt, numbered_samples, numbers, with_corrupt

from icd_lightning.data.decoding import SampleDecoder
from icd_lightning.data.index import open_indexes
from icd_lightning.data.shards import open_shards, write_shards
from icd_lightning.data.stream import TrainStream, find_places
from icd_lightning.data.tally import NothingToReadError, Tally
from icd_lightning.data.uncounted import UncountedStream


def stream_over(urls, *, min_size=None, tally=None, **options) -> TrainStream:
    defaults = {"batch_size": 5, "batches_per_epoch": 12, "shuffle_buffer": 20}
    decoder, found = SampleDecoder(8, None, min_size), tuple(shard.url for shard in open_shards(str(urls)))
    places = find_places(found, open_indexes(found, None), decoder, tally or Tally())
    return TrainStream(places, decoder, **(defaults | options))


def uncounted_over(urls, **options) -> UncountedStream:
    defaults = {"batch_size": 5, "batches_per_epoch": 4, "shuffle_buffer": 8}
    found = tuple(shard.url for shard in open_shards(urls if isinstance(urls, list) else str(urls), verify="off"))
    return UncountedStream(found, SampleDecoder(8), **(defaults | options))


def first(stream, count: int, *, start: int = 0, slots: int = 1, tally: Tally | None = None) -> list[list[int]]:
    """The numbers of `count` batches of a rank from `start` on, as a DataLoader collects them from its workers."""
    tally = tally or Tally()
    workers = [stream.batches_from(start, tally, slot=slot, slots=slots) for slot in range(slots)]
    return [numbers(next(workers[place % slots])) for place in range(count)]


def of_ranks(urls, world_size: int, count: int, *, make=stream_over, slots: int = 1, **options) -> list[list[int]]:
    """The numbers of all samples in `count` batches of each rank."""
    streams = [make(urls, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    return [list(chain(*first(stream, count, slots=slots))) for stream in streams]


@pytest.mark.parametrize(("world_size", "slots"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 4), (4, 3), (12, 1)])
def test_a_pass_shows_every_sample_once_over_ranks_and_workers(shards, world_size, slots):
    shares = of_ranks(shards, world_size, 24 // world_size, slots=slots)
    half = [share[: len(share) // 2] for share in shares]
    assert sorted(chain(*half)) == list(range(60))
    assert set(Counter(chain(*shares)).values()) == {2}


@pytest.mark.parametrize("batch_size", [7, 8, 64])
def test_what_fills_no_batch_in_a_pass_comes_in_the_next(shards, batch_size):
    stream = stream_over(shards, batch_size=batch_size)
    seen = list(chain(*first(stream, 60)))  # as many samples as `batch_size` passes have
    assert set(Counter(seen).values()) == {batch_size}


def test_neither_workers_nor_ranks_nor_epochs_change_the_batches(shards):
    whole = first(stream_over(shards), 36)
    assert first(stream_over(shards, batches_per_epoch=5), 36, slots=3) == whole
    pair = [first(stream_over(shards, rank=rank, world_size=2), 18) for rank in range(2)]
    assert [batch for both in zip(*pair, strict=True) for batch in both] == whole


def test_the_seed_decides_the_order(shards):
    one, again, other = (first(stream_over(shards, seed=seed), 24) for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert one[:12] != one[12:]
    assert list(chain(*one[:12])) != sorted(chain(*one[:12]))


@pytest.mark.parametrize("make", [stream_over, uncounted_over])
def test_each_pass_walks_the_shards_in_an_order_of_its_own(shards, make):
    order = [number // 10 for number in chain(*first(make(shards, shuffle_buffer=0), 48))]
    passes = [tuple(order[start : start + 60 : 10]) for start in range(0, 240, 60)]
    assert all(sorted(one) == list(range(6)) for one in passes)
    assert len(set(passes)) == 4


def test_each_shuffle_is_another(shards):
    order = list(chain(*first(stream_over(shards, shuffle_buffer=10), 24)))  # shard by shard, in two passes
    within = [tuple(number % 10 for number in order[start : start + 10]) for start in range(0, 120, 10)]
    assert all(sorted(one) == list(range(10)) for one in within)
    assert len(set(within)) == 12


def test_no_buffer_keeps_the_order_within_a_shard(shards):
    order = list(chain(*first(stream_over(shards, shuffle_buffer=0), 12)))
    assert all(order[i + 1] == order[i] + 1 for i in range(59) if (i + 1) % 10)
    assert order != list(range(60))


def test_samples_are_shuffled_among_as_many_as_the_buffer_holds(shards):
    order = list(chain(*first(stream_over(shards, shuffle_buffer=20), 12)))
    neighbours = [{number // 10 for number in order[start : start + 20]} for start in range(0, 60, 20)]
    assert [len(both) for both in neighbours] == [2, 2, 2]
    assert len({number // 10 for number in list(chain(*first(stream_over(shards, shuffle_buffer=60), 12)))[:20]}) > 2


@pytest.mark.parametrize("make", [stream_over, uncounted_over])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_a_stream_entered_anywhere_goes_on_as_if_read_from_the_start(shards, make, slots):
    whole = first(make(shards), 40, slots=slots)
    for position in (0, 1, 7, 12, 17, 31):
        assert first(make(shards), 9, start=position, slots=slots) == whole[position : position + 9]


def test_entering_a_stream_reads_no_more_than_its_batch(shards):
    tally, stream = Tally(), stream_over(shards)
    next(stream.batches_from(1000, tally))
    assert int(tally._sum("read")) == 5


def test_a_corrupt_picture_is_replaced_by_a_good_one_of_its_batch(tmp_path):
    bad = {3, 17, 18, 19, 59}
    with_corrupt(tmp_path, bad)
    stream, tally = stream_over(tmp_path), Tally()
    batches = first(stream, 12, tally=tally)
    assert [len(batch) for batch in batches] == [5] * 12
    assert set(chain(*batches)) == set(range(60)) - bad
    assert tally.counts()["corrupt_image"] >= 5
    assert [first(stream, 1, start=start)[0] for start in range(12)] == batches


def test_a_batch_of_nothing_but_corrupt_pictures_repeats_the_next_of_its_rank(tmp_path):
    ranks = [stream_over(with_corrupt(tmp_path, set()), rank=rank, world_size=2) for rank in range(2)]
    whole = [first(stream, 6) for stream in ranks]
    with_corrupt(tmp_path / "bad", set(whole[0][2]))
    ranks = [stream_over(tmp_path / "bad", rank=rank, world_size=2) for rank in range(2)]
    assert first(ranks[0], 6) == [*whole[0][:2], whole[0][3], *whole[0][3:]]
    assert first(ranks[1], 6) == whole[1]


@pytest.mark.parametrize(("make", "spoil"), [(stream_over, corrupt), (uncounted_over, lambda s: s | {"txt": b""})])
def test_the_time_before_a_stream_is_entered_is_no_silence(tmp_path, make, spoil):
    samples = [spoil(sample) if n % 10 == 0 else sample for n, sample in enumerate(numbered_samples(60))]
    write_shards(samples, tmp_path, shard_size=10, parameters={})
    tally = Tally(max_skipped=0.5, stall_timeout=0.5)
    stream = make(tmp_path, shuffle_buffer=0)
    time.sleep(0.6)  # then the first sample of all is one that cannot be used
    assert len(next(stream.batches_from(1, tally)).keys) == 5


def test_samples_are_skipped_for_a_reason_and_counted_once(tmp_path):
    samples = numbered_samples(60)
    samples[1] |= {"txt": b""}
    samples[2] |= {"png": numbered_samples(1, size=4)[0]["png"]}
    samples[3] |= {"json": b"{"}
    samples[4] |= {"png": b"?"}
    del samples[5]["png"]
    write_shards(samples, tmp_path, shard_size=10, parameters={})
    tally = Tally()
    stream = stream_over(tmp_path, tally=tally)
    assert set(Counter(chain(*first(stream, 22, tally=tally))).items()) == {(n, 2) for n in (0, *range(6, 60))}
    counts = tally.counts()
    assert [counts[r] for r in ("no_caption", "too_small", "corrupt_json", "corrupt_image", "no_image")] == [1] * 5
    assert counts["passed"] == 110


def test_a_damaged_tar_gives_what_it_still_holds(shards):
    (shards / "manifest.json").unlink()
    (shards / "00002.tar").write_bytes((shards / "00002.tar").read_bytes()[:7000])
    (shards / "00003.tar").write_bytes(b"no tar at all, only text" * 100)
    indexed = Tally()
    seen = set(chain(*first(stream_over(shards, tally=indexed), 24)))
    read = Tally()
    assert seen == set(chain(*first(uncounted_over(shards), 24, tally=read)))
    assert seen > {*range(20), *range(40, 60)}
    assert not seen & set(range(30, 40))
    assert indexed.counts()["broken_shard"] == 2
    assert read.counts()["broken_shard"] >= 2


def test_a_shard_that_goes_away_is_counted(shards):
    stream, tally = stream_over(shards), Tally()
    (shards / "00001.tar").unlink()
    assert set(chain(*first(stream, 12, tally=tally))) == set(range(60)) - set(range(10, 20))
    assert tally.counts()["broken_shard"] == 10


def test_a_shard_that_is_written_anew_is_never_read_by_an_old_index(shards):
    stream, tally = stream_over(shards, shuffle_buffer=0), Tally()
    longer = [sample | {"caption": b"x" * 600} for sample in numbered_samples(60)]
    write_shards(longer, shards, shard_size=10, parameters={"seed": 1}, overwrite=True)
    seen = set(chain(*first(stream, 12, tally=tally)))
    assert seen <= set(range(0, 60, 10))  # those at the beginning of their shard, as they were
    assert tally.counts()["broken_shard"] >= 54
    assert sorted(chain(*first(stream_over(shards), 12))) == list(range(60))


@pytest.mark.parametrize("make", [stream_over, uncounted_over])
def test_only_bad_samples_end_in_an_error(tmp_path, make):
    write_shards(map(corrupt, numbered_samples(60)), tmp_path, shard_size=10, parameters={})
    with pytest.raises(NothingToReadError, match=r"none of the samples for .*rank 0 could be used .*corrupt_image"):
        first(make(tmp_path), 1)


# --- without an index -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "slots"), [(1, 1), (3, 1), (2, 3)])
def test_shards_that_cannot_be_counted_are_dealt_out_whole_and_all_come_in_each_pass(shards, world_size, slots):
    pipes = [f"pipe:cat {shards}/{n:05d}.tar" for n in range(6)]
    shares = of_ranks(pipes, world_size, 36 // world_size, make=uncounted_over, slots=slots)
    assert sorted(chain(*(share[: len(share) // 3] for share in shares))) == list(range(60))
    assert set(Counter(chain(*shares)).values()) == {3}


def test_passes_over_uncounted_shards_go_on_from_epoch_to_epoch(shards):
    seen = list(chain(*first(uncounted_over(shards, batches_per_epoch=1, batch_size=7), 60)))
    assert set(Counter(seen).values()) == {7}


def test_skipping_decodes_nothing(shards, monkeypatch):
    decoded = []
    finish = SampleDecoder.finish
    monkeypatch.setattr(SampleDecoder, "finish", lambda self, one: decoded.append(one.key) or finish(self, one))
    next(uncounted_over(shards).batches_from(10, Tally()))
    assert len(decoded) == 5


def test_the_buffer_of_a_worker_holds_no_more_bytes_than_it_may(shards, monkeypatch):
    from icd_lightning.data import uncounted

    size = (shards / "00000.tar").stat().st_size  # of ten samples, with their headers
    monkeypatch.setattr(uncounted, "MOST_BUFFERED", size // 20)
    tally = Tally()
    next(uncounted_over(shards, shuffle_buffer=1000).batches_from(0, tally))
    assert tally._sum("read") < 20
