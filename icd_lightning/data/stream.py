"""An endless shuffled stream of batches to train on.

Every batch is a pure function of the seed and its place: (epoch, rank, worker, index). So two readers never see the
same sample in an epoch, and a run can go on from any batch without having decoded those before.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, cycle, islice
from typing import NamedTuple, TypeVar

from icd_lightning.data.batch import Batch
from icd_lightning.data.decoding import MIXED, Sample, SampleDecoder, collate
from icd_lightning.data.shards import Shard
from icd_lightning.data.tally import NothingToReadError, Tally
from icd_lightning.data.tars import Raw, is_local, open_url, read_samples

T = TypeVar("T")

PAUSES = (0.0, 0.5, 2.0)
"""Seconds before each attempt to read a shard that is elsewhere."""


class Piece(NamedTuple):
    """Samples `start` to `stop` (None: all) of one shard."""

    url: str
    start: int = 0
    stop: int | None = None

    def read(self, tally: Tally) -> Iterator[Raw]:
        """Yield raw samples; a shard that cannot be read (on), or holds too few, is counted once and left.

        One that is elsewhere is tried again, from the sample where it broke off, so that batches stay as they are.
        """
        tally.add("shards")
        problem, given = None, 0
        for pause in (0.0,) if is_local(self.url) or self.url.startswith("pipe:") else PAUSES:
            time.sleep(pause)
            try:
                with open_url(self.url, patience=tally.stall_timeout) as file:
                    for raw in islice(read_samples(file, self.url), self.start + given, self.stop):
                        tally.add("read")
                        given += 1
                        yield raw
            except Exception as error:  # whatever the scheme's opener raises
                cause = error.__cause__ or error  # fsspec calls whatever fails on http a FileNotFoundError
                problem = f"{self.url} cannot be read to its end ({type(cause).__name__}: {cause})"
            else:
                problem = None
                break
        missing = None if self.stop is None else self.stop - self.start - given
        if problem or missing:
            tally.broke(problem or f"{self.url} holds {missing} samples fewer than were counted", missing)


@dataclass(frozen=True)
class TrainStream:
    """What one rank trains on.

    An epoch is `batches_per_epoch` batches on each rank. The shards are shuffled, the samples in that order are divided
    over ranks and workers without overlap, and each worker shuffles its share through a buffer of `shuffle_buffer`
    samples. If the shards hold several epochs, these follow each other through one order before the next is drawn. A
    share that runs out, because samples were skipped or the epoch is longer than the data, is read again.

    With the decoder's `buckets` a batch holds pictures of one size; those whose size is too rare to fill a batch of a
    worker in an epoch are not seen in it.
    """

    shards: tuple[Shard, ...]
    decoder: SampleDecoder
    batch_size: int
    batches_per_epoch: int
    seed: int = 0
    shuffle_buffer: int = 1000
    rank: int = 0
    world_size: int = 1

    def pieces(self, epoch: int, *, worker: int = 0, num_workers: int = 1) -> list[Piece]:
        """The share of a worker in an epoch."""
        if any(shard.samples is None for shard in self.shards):  # deal whole shards
            reader, readers = self.rank * num_workers + worker, self.world_size * num_workers
            return [Piece(shard.url) for shard in self._order(epoch)[reader::readers]]
        rank_size, total = self.batch_size * self.batches_per_epoch, sum(shard.samples or 0 for shard in self.shards)
        epochs_per_pass = max(1, total // (rank_size * self.world_size))
        full_pass, part = divmod(epoch, epochs_per_pass)
        # in units of batches, so that each worker gets exactly what its batches need
        bounds = [0, *accumulate(len(range(w, self.batches_per_epoch, num_workers)) for w in range(num_workers))]
        first = (part * self.world_size + self.rank) * self.batches_per_epoch
        begin, end = ((first + bounds[w]) * self.batch_size for w in (worker, worker + 1))
        if total < rank_size * self.world_size:
            begin, end = (place * total // (rank_size * self.world_size) for place in (begin, end))
        pieces, offset = [], 0
        for shard in self._order(full_pass):  # laid end to end
            start, stop = max(begin - offset, 0), min(end - offset, shard.samples)
            if start < stop:
                pieces.append(Piece(shard.url, start, stop))
            offset += shard.samples
        return pieces

    def batches(
        self, epoch: int, tally: Tally, *, worker: int = 0, num_workers: int = 1, skip: int = 0
    ) -> Iterator[Batch]:
        """Yield the batches of a worker in an epoch, all samples of one size, but for the first `skip` batches.

        A picture that proves corrupt when decoded is replaced by another of its batch, which is then there twice: so a
        batch does not depend on those before it, and skipping needs no decoding. A batch of nothing but corrupt ones
        repeats the next.
        """
        reader = _Reader(self, tally, self.pieces(epoch, worker=worker, num_workers=num_workers))
        seed = f"{self.seed} {epoch} {self.rank}/{self.world_size} {worker}/{num_workers}"
        groups = _grouped(reader.admitted(random.Random(seed)), self.batch_size)
        tally.awaited()
        for _ in range(skip):
            tally.add("passed", len(next(groups)))
        ahead: deque[list[Sample]] = deque()
        for _ in range(skip, len(range(worker, self.batches_per_epoch, num_workers))):
            tally.awaited()
            while not (good := next(filter(None, ahead), None)):
                ahead.append(reader.finished(next(groups)))
            ahead.popleft()
            yield collate(list(islice(cycle(good), self.batch_size)))

    def batches_from(self, position: int, tally: Tally, *, slot: int = 0, slots: int = 1) -> Iterator[Batch]:
        """Yield every `slots`-th batch from `position` + `slot` on, without end; `position` counts from epoch 0."""
        position += slot
        while True:
            epoch, index = divmod(position, self.batches_per_epoch)
            for batch in self.batches(epoch, tally, worker=index % slots, num_workers=slots, skip=index // slots):
                yield batch
                position += slots

    def _order(self, full_pass: int) -> list[Shard]:
        order = list(self.shards)
        random.Random(f"{self.seed} {full_pass}").shuffle(order)
        return order


class _Reader:
    """Reads the share of one worker over and over, each time in another order."""

    def __init__(self, stream: TrainStream, tally: Tally, pieces: list[Piece]) -> None:
        self.stream, self.tally, self.pieces = stream, tally, pieces
        self.corrupt_in_a_row = 0
        self.kinds: set[tuple[bool, bool]] = set()

    def admitted(self, rng: random.Random) -> Iterator[Sample]:
        while True:
            count = 0
            for sample in _shuffled(self._checked(), self.stream.shuffle_buffer, rng):
                count += 1
                yield sample
            if count == 0 or self.corrupt_in_a_row >= count:
                reader = f"worker {self.tally.worker} of rank {self.stream.rank}"
                raise self.tally.nothing(f"none of the samples for {reader} could be used")
            rng.shuffle(self.pieces)

    def finished(self, samples: list[Sample]) -> list[Sample]:
        """Finish, all of them, those that can be."""
        good = list(self.tally.usable(self.stream.decoder.finish, samples))
        self.tally.add("passed", len(good))
        self.corrupt_in_a_row = 0 if good else self.corrupt_in_a_row + len(samples)
        return good

    def _checked(self) -> Iterator[Sample]:
        raws = chain.from_iterable(piece.read(self.tally) for piece in self.pieces)
        for sample in self.tally.usable(self.stream.decoder.admit, raws):
            self.kinds.add((sample.moments is None, sample.text is None))
            if len(self.kinds) > 1:
                raise NothingToReadError(MIXED)
            yield sample


def _grouped(samples: Iterable[Sample], count: int) -> Iterator[list[Sample]]:
    """Yield groups of `count` samples of one size, each as soon as it is whole."""
    groups: defaultdict[tuple[int, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.size].append(sample)
        if len(groups[sample.size]) == count:
            yield groups.pop(sample.size)


def _shuffled(samples: Iterable[T], size: int, rng: random.Random) -> Iterator[T]:
    """Yield from a buffer of `size` samples at random."""
    buffer: list[T] = []
    for sample in samples:
        if len(buffer) < size:
            buffer.append(sample)
            continue
        if size:
            place = rng.randrange(size)
            sample, buffer[place] = buffer[place], sample
        yield sample
    rng.shuffle(buffer)
    yield from buffer
