"""An endless shuffled stream of batches to train on, each read from its samples' places in the shards.

A batch is a pure function of the seed and its number: so two ranks never see the same sample in a pass, the number of
workers changes nothing, and a run goes on from any batch without reading those before it.
"""

from __future__ import annotations

import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from icd_lightning.data.batch import Batch
from icd_lightning.data.decoding import MIXED, Sample, SampleDecoder, collate
from icd_lightning.data.index import ShardIndex
from icd_lightning.data.plan import Plan
from icd_lightning.data.tally import REASONS, NothingToReadError, RejectedError, Tally
from icd_lightning.data.tars import MOST_BYTES, Raw, is_local, parse_sample, read_ranges

MOST_AT_ONCE = 1 << 26  # bytes that one process asks stores for


class Places(NamedTuple):
    """Where the N samples that can be used lie, shard for shard, and what form each has in a batch (see ShardIndex)."""

    urls: tuple[str, ...]
    bounds: NDArray[np.int64]  # (S + 1,), where the samples of each shard begin and the last ends
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    check: NDArray[np.uint32]
    form: NDArray[np.int32]
    sizes: tuple[tuple[int, int], ...]  # (height, width) of each form

    def of(self, sample: int) -> tuple[str, int, int]:
        """(url, offset, length) of a sample."""
        url = self.urls[int(np.searchsorted(self.bounds, sample, side="right")) - 1]
        return url, int(self.offset[sample]), int(self.length[sample])


def find_places(urls: Sequence[str], indexes: Sequence[ShardIndex], decoder: SampleDecoder, tally: Tally) -> Places:
    """Which samples a decoder can use, by the indexes alone; those that it cannot are counted with their reasons."""
    if len({index.kind for index in indexes if (index.reason < 0).any()}) > 1:
        raise NothingToReadError(MIXED)
    forms: dict[tuple[int, int], int] = {}
    parts: list[tuple[NDArray, ...]] = []
    rejected: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for shard, index in enumerate(indexes):
        form = _forms(index, decoder, forms)
        for code in np.unique(form[form < 0]).tolist():
            rows = np.flatnonzero(form == code)
            rejected[~code].append((shard, int(rows[0]), len(rows)))
        usable = form >= 0
        parts.append((index.offset[usable], index.length[usable], index.check[usable], form[usable]))
    _count(urls, indexes, rejected, decoder, tally)
    bounds = np.concatenate([[0], np.cumsum([len(part[0]) for part in parts])])
    return Places(tuple(urls), bounds, *map(np.concatenate, zip(*parts, strict=True)), sizes=tuple(forms))


def _forms(index: ShardIndex, decoder: SampleDecoder, forms: dict[tuple[int, int], int]) -> NDArray[np.int32]:
    """For each sample the number in `forms` of its size in a batch, or ~ the place in REASONS of why it has none."""
    found = ~index.reason.astype(np.int32)
    sizes, which = np.unique(index.size[:, 0].astype(np.int64) << 32 | index.size[:, 1], return_inverse=True)
    of_size = np.zeros(len(sizes), np.int32)
    for number, size in enumerate(sizes.tolist()):
        if size:
            try:
                own = size >> 32, size & 0xFFFFFFFF
                in_batch = decoder.size_in_batch(*own) if index.kind == "pictures" else own
                of_size[number] = forms.setdefault(in_batch, len(forms))
            except RejectedError as error:
                of_size[number] = ~REASONS.index(error.reason)
    return np.where(index.reason < 0, of_size[which], found)


def _count(
    urls: Sequence[str],
    indexes: Sequence[ShardIndex],
    rejected: dict[int, list[tuple[int, int, int]]],
    decoder: SampleDecoder,
    tally: Tally,
) -> None:
    """Count what cannot be used of shards: for each place in REASONS, of which shards, the first row and how many."""
    tally.awaited()
    tally.add("shards", len(urls))
    tally.add("read", sum(len(index.reason) for index in indexes))
    for code, found in rejected.items():
        shard, row, _ = found[0]
        place = (urls[shard], int(indexes[shard].offset[row]), int(indexes[shard].length[row]))
        tally.skipped(REASONS[code], _reason(place, decoder), sum(count for _, _, count in found))
    for url, index in zip(urls, indexes, strict=True):
        if index.damage:
            tally.broke(f"{url}: {index.damage}")


def _reason(place: tuple[str, int, int], decoder: SampleDecoder) -> str:
    url, offset, length = place
    (part,) = read_ranges([place]) if length <= MOST_BYTES else (OSError(),)
    try:
        if isinstance(part, bytes):
            decoder.admit(parse_sample(part, url))
    except (RejectedError, tarfile.TarError) as error:
        return getattr(error, "detail", str(error))
    return f"{url}, {length:,} bytes from {offset} on"


@dataclass(frozen=True)
class TrainStream:
    """What one rank trains on; an epoch is `batches_per_epoch` batches of each rank.

    Batches go through pass after pass over the samples, whatever an epoch is, dealt to the ranks in turn (see `Plan`).
    With the decoder's `buckets` a batch holds pictures of one size, and all sizes come in proportion.
    """

    places: Places
    decoder: SampleDecoder
    batch_size: int
    batches_per_epoch: int
    seed: int = 0
    shuffle_buffer: int = 100_000
    rank: int = 0
    world_size: int = 1

    @property
    def urls(self) -> tuple[str, ...]:
        return self.places.urls

    @cached_property
    def plan(self) -> Plan:
        options = {"batch_size": self.batch_size, "seed": self.seed, "window": self.shuffle_buffer}
        return Plan(self.places.form, self.places.bounds, **options)

    def batches_from(self, position: int, tally: Tally, *, slot: int = 0, slots: int = 1) -> Iterator[Batch]:
        """Yield every `slots`-th batch of this rank from `position` + `slot` on, all samples of one size, without end.

        A sample that proves corrupt is replaced by another of its batch, which is then there twice: so a batch does not
        depend on those before it. A batch of nothing but corrupt ones repeats the next of this rank.
        """
        position += slot
        failing: set[str] = set()
        while True:
            tally.awaited()
            number, tried = position * self.world_size + self.rank, 0
            while not (good := self._good(number, tally, failing)):
                number, tried = number + self.world_size, tried + self.batch_size
                if tried >= self.plan.samples:
                    raise tally.nothing(f"none of the samples for rank {self.rank} could be used")
            tally.add("passed", len(good))
            yield collate(list(islice(cycle(good), self.batch_size)))
            position += slots

    def _good(self, number: int, tally: Tally, failing: set[str]) -> list[Sample]:
        """The samples of a batch that can be used, all of its form."""
        chosen = self.plan.batch(number)
        size = self.places.sizes[self.places.form[chosen[0]]]

        def decode(raw: Raw) -> Sample:
            sample = self.decoder.decode(raw)
            if sample.size != size:
                raise RejectedError("broken_shard", f"{sample.name} is of another size than its index says")
            return sample

        return list(tally.usable(decode, self._read(chosen, tally, failing)))

    def _read(self, samples: NDArray[np.int64], tally: Tally, failing: set[str]) -> Iterator[Raw]:
        """Read samples by their places, and count what cannot be read; the shards that it is of are `failing` then."""
        checks = iter(self.places.check[samples].tolist())
        for group in _groups([self.places.of(int(sample)) for sample in samples]):
            parts = read_ranges(group, patience=tally.stall_timeout, given_up=failing)
            for (url, offset, length), part in zip(group, parts, strict=True):
                tally.add("read")
                check = next(checks)
                if isinstance(part, Exception):
                    failing.add(url)  # from now on it is not waited for
                    tally.skipped("broken_shard", f"{url} cannot be read ({part})")
                    continue
                failing.discard(url)
                try:
                    yield parse_sample(part, url, check)
                except tarfile.TarError as error:
                    what = f"bytes {offset} to {offset + length} are not the sample of its index ({error})"
                    tally.skipped("broken_shard", f"{url}: {what}: was it written anew? begin the training again")


def _groups(places: list[tuple[str, int, int]]) -> Iterator[list[tuple[str, int, int]]]:
    """Places to read at once: one on this machine, or of stores as many as have MOST_AT_ONCE bytes."""
    group: list[tuple[str, int, int]] = []
    for place in places:
        if group and (is_local(place[0]) or sum(length for _, _, length in group) + place[2] > MOST_AT_ONCE):
            yield group
            group = []
        group.append(place)
    yield group
