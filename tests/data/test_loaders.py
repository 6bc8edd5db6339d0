import random
from itertools import chain

import pytest
from recorder_case import data_for
from shards_case import numbers, with_corrupt

from icd_lightning.data.decoding import SampleDecoder
from icd_lightning.data.loaders import ValidationSet
from icd_lightning.data.shards import open_shards
from icd_lightning.data.tally import NothingToReadError, Tally
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


def test_each_worker_counts_as_itself(tmp_path):
    """Of two shards, which cannot be counted and so are dealt out whole, the second worker's is corrupt."""
    with_corrupt(tmp_path, set(range(10, 20)), count=20)
    for seed in range(9):
        data = data_for(tmp_path, verify="off", batches_per_epoch=4, num_workers=2, seed=seed)
        data.setup("fit")
        order = list(data.stream.urls)
        random.Random(f"{seed} 0").shuffle(order)  # as the stream deals them
        if order[1].endswith("00001.tar"):
            break
    with pytest.raises(NothingToReadError, match="none of the samples for worker 1 of rank 0 could be used"):
        list(data.train_dataloader())
    data.teardown()
