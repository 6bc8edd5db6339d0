"""A stream of shards that have no index: commands, and stores whose shards nobody has indexed.

Whole shards are dealt to the readers, each of which reads its own from end to end, through a buffer that shuffles.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, cycle, islice

from icd_lightning.data.batch import Batch
from icd_lightning.data.decoding import MIXED, Sample, SampleDecoder, collate
from icd_lightning.data.tally import NothingToReadError, Tally
from icd_lightning.data.tars import PAUSES, Raw, is_local, open_url, read_samples

MOST_SHUFFLED = 1000  # samples in a worker's buffer
MOST_BUFFERED = 1 << 30  # and their bytes


def read_shard(url: str, tally: Tally) -> Iterator[Raw]:
    """Yield raw samples; a shard that cannot be read (on) is counted once and left.

    One that is elsewhere is tried again, from the sample where it broke off, so that batches stay as they are.
    """
    tally.add("shards")
    problem, given = None, 0
    for pause in (0.0,) if is_local(url) or url.startswith("pipe:") else PAUSES:
        time.sleep(pause)
        try:
            with open_url(url, patience=tally.stall_timeout) as file:
                for raw in islice(read_samples(file, url), given, None):
                    tally.add("read")
                    given += 1
                    yield raw
        except Exception as error:  # whatever the scheme's opener raises
            cause = error.__cause__ or error  # fsspec calls whatever fails on http a FileNotFoundError
            problem = f"{url} cannot be read to its end ({type(cause).__name__}: {cause})"
        else:
            problem = None
            break
    if problem:
        tally.broke(problem)


@dataclass(frozen=True)
class UncountedStream:
    """What one rank trains on, of shards without indexes. An epoch is `batches_per_epoch` batches of each rank.

    In a pass every reader (each worker of each rank) reads every so many-th of the shuffled shards, and shuffles what
    it reads through a buffer of `shuffle_buffer` samples. Passes follow each other without regard to epochs, so that
    each sample comes once in each. A batch is a function of the seed and its number, and of how many readers there are;
    to go on from one, a reader reads again all those before it, without decoding pictures.
    """

    urls: tuple[str, ...]
    decoder: SampleDecoder
    batch_size: int
    batches_per_epoch: int
    seed: int = 0
    shuffle_buffer: int = MOST_SHUFFLED
    rank: int = 0
    world_size: int = 1

    def batches_from(self, position: int, tally: Tally, *, slot: int = 0, slots: int = 1) -> Iterator[Batch]:
        """As of `TrainStream`; to skip batches needs no decoding, since none depends on those before it."""
        skip, worker = divmod(position + slot, slots)
        reader = _Reader(self, tally, self.rank * slots + worker, self.world_size * slots)
        groups = _grouped(reader.admitted(), self.batch_size)
        tally.awaited()
        for _ in range(skip):
            tally.add("passed", len(next(groups)))
        ahead: deque[list[Sample]] = deque()
        while True:
            tally.awaited()
            while not (good := next(filter(None, ahead), None)):
                ahead.append(reader.finished(next(groups)))
            ahead.popleft()
            yield collate(list(islice(cycle(good), self.batch_size)))


class _Reader:
    """Reads its share of the shards over and over, each time another one in another order."""

    def __init__(self, stream: UncountedStream, tally: Tally, number: int, readers: int) -> None:
        self.stream, self.tally, self.number, self.readers = stream, tally, number, readers
        self.corrupt_in_a_row = 0
        self.kinds: set[tuple[bool, bool]] = set()

    def admitted(self) -> Iterator[Sample]:
        barren = 0  # shards that gave nothing, one after another
        for one_pass in count():
            order = list(self.stream.urls)
            random.Random(f"{self.stream.seed} {one_pass}").shuffle(order)
            share = order[self.number :: self.readers]
            raws = chain.from_iterable(read_shard(url, self.tally) for url in share)
            rng = random.Random(f"{self.stream.seed} {one_pass} {self.number}/{self.readers}")
            usable = 0
            for sample in _shuffled(self._checked(raws), self.stream.shuffle_buffer, rng):
                usable += 1
                yield sample
            barren = 0 if usable > self.corrupt_in_a_row else barren + len(share)
            if barren >= 4 * len(order):  # by chance it may get the same few several times
                reader = f"worker {self.tally.worker} of rank {self.stream.rank}"
                raise self.tally.nothing(f"none of the samples for {reader} could be used")

    def finished(self, samples: list[Sample]) -> list[Sample]:
        good = list(self.tally.usable(self.stream.decoder.finish, samples))
        self.tally.add("passed", len(good))
        self.corrupt_in_a_row = 0 if good else self.corrupt_in_a_row + len(samples)
        return good

    def _checked(self, raws: Iterable[Raw]) -> Iterator[tuple[Sample, int]]:
        admit = self.stream.decoder.admit
        for sample, size in self.tally.usable(lambda raw: (admit(raw), sum(map(len, raw.values()))), raws):
            self.kinds.add((sample.moments is None, sample.text is None))
            if len(self.kinds) > 1:
                raise NothingToReadError(MIXED)
            yield sample, size


def _grouped(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Yield groups of `size` samples of one form, each as soon as it is whole."""
    groups: defaultdict[tuple[int, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.size].append(sample)
        if len(groups[sample.size]) == size:
            yield groups.pop(sample.size)


def _shuffled(samples: Iterable[tuple[Sample, int]], size: int, rng: random.Random) -> Iterator[Sample]:
    """Yield from a buffer of `size` samples, or as many as MOST_BUFFERED bytes hold, at random."""
    buffer: list[tuple[Sample, int]] = []
    held = 0
    for sample in samples:
        buffer.append(sample)
        held += sample[1]
        while len(buffer) > size or held > MOST_BUFFERED:
            place = rng.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            chosen, its_size = buffer.pop()
            held -= its_size
            yield chosen
    rng.shuffle(buffer)
    yield from (sample for sample, _ in buffer)
