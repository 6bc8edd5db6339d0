from itertools import chain

import pytest
from recorder_case import data_for
from shards_case import numbers, with_corrupt

from icd_lightning.data.decoding import SampleDecoder
from icd_lightning.data.loaders import ValidationSet
from icd_lightning.data.shards import open_shards
from icd_lightning.data.tally import COLUMNS, NothingToReadError, Tally
from icd_lightning.data.tars import index_shard


def seen(batches) -> list[int]:
    return list(chain.from_iterable(map(numbers, batches)))


def validation_sets(folder, batch_size: int, world_size: int) -> list[ValidationSet]:
    entries = [entry for shard in open_shards(str(folder)) for entry in index_shard(shard.url)[0]]
    return [ValidationSet(entries, SampleDecoder(8), batch_size, rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize(
    ("batch_size", "world_size"), [(60, 1), (7, 1), (1, 1), (7, 2), (8, 7), (2, 7), (5, 60), (1, 4)]
)
def test_validation_shows_every_sample_once_in_equally_many_batches(shards, batch_size, world_size):
    sets = validation_sets(shards, batch_size, world_size)
    assert len({one.batches_per_epoch for one in sets}) == 1
    sizes = [len(one.indices(batch)) for one in sets for batch in range(one.batches_per_epoch)]
    assert 1 <= min(sizes) <= max(sizes) <= batch_size
    assert sorted(chain(*(seen(one.batches_from(0, Tally())) for one in sets))) == list(range(60))


def test_validation_of_one_rank_goes_in_order(shards):
    (one,) = validation_sets(shards, 7, 1)
    assert seen(one.batches_from(0, Tally())) == list(range(60))


def test_validation_that_cannot_be_shared_out_is_refused(shards):
    with pytest.raises(ValueError, match="60 validation samples give no equal number of batches of 1 on 7 ranks"):
        validation_sets(shards, 1, 7)
    with pytest.raises(ValueError, match="use fewer ranks or more samples"):
        validation_sets(shards, 8, 61)


def test_validation_leaves_out_bad_samples_and_never_gives_an_empty_batch(tmp_path):
    (one,) = validation_sets(with_corrupt(tmp_path, {3, 30, 31, 32}), 3, 1)
    tally = Tally()
    assert numbers(next(one.batches_from(1, tally))) == [4, 5]
    assert tally.counts()["corrupt_image"] == 1
    with pytest.raises(NothingToReadError, match="no sample of validation batch 10"):
        next(one.batches_from(10, tally))


def test_each_worker_counts_as_itself(shards):
    """Shards that are not indexed are dealt out whole: three to each of two workers, ten samples each."""
    data = data_for(shards, verify="off", batches_per_epoch=12, num_workers=2)
    data.setup("fit")
    assert len(list(data.train_dataloader())) == 12
    data.teardown()
    read = data.train_tally._counts[:, COLUMNS.index("read")].tolist()
    assert len(read) == 2
    assert min(read) >= 30


def test_half_of_the_shards_may_be_bad_where_that_is_allowed(tmp_path):
    """A worker whose share of a pass gives nothing waits for the next."""
    with_corrupt(tmp_path, {*range(10), *range(20, 30)}, count=40)
    data = data_for(tmp_path, verify="off", batches_per_epoch=40, num_workers=2, max_skipped=0.9)
    data.setup("fit")
    assert {key for batch in data.train_dataloader() for key in batch.keys} == {
        f"{n:05d}" for n in range(40) if n // 10 % 2
    }
    data.teardown()
