"""What a Trainer iterates over: batches of a stream or of a fixed set, made by worker processes or without.

To Lightning these are plain iterables, not `DataLoader`s: so it neither wraps their samplers nor warns about them.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from icd_lightning.data.batch import Batch
from icd_lightning.data.decoding import SampleDecoder, collate
from icd_lightning.data.stream import TrainStream
from icd_lightning.data.tally import NothingToReadError, Tally
from icd_lightning.data.tars import Entry, Raw
from icd_lightning.data.uncounted import UncountedStream


@dataclass(frozen=True)
class ValidationSet:
    """The batches, at most B samples of one size, that one rank validates on.

    Every sample belongs to one rank; the shares differ by one sample at most and come in equally many batches (else
    ranks that wait for each other would hang), which differ by one sample at most too. A sample that cannot be used is
    counted and left out of its batch.
    """

    entries: list[Entry]
    decoder: SampleDecoder
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        count = len(self.entries)
        if count // self.world_size < self.batches_per_epoch:
            remedy = f"val_batch_size {self.batch_size + 1}" if count >= self.world_size else "fewer ranks"
            raise ValueError(
                f"{count} validation samples give no equal number of batches of {self.batch_size} on "
                f"{self.world_size} ranks; use {remedy} or more samples"
            )

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.entries) // (self.world_size * self.batch_size))

    def indices(self, batch: int) -> range:
        own = range(self.rank, len(self.entries), self.world_size)
        first, last = (place * len(own) // self.batches_per_epoch for place in (batch, batch + 1))
        return own[first:last]

    def batches_from(self, position: int, tally: Tally, *, slot: int = 0, slots: int = 1) -> Iterator[Batch]:
        """Yield every `slots`-th batch from `position` + `slot` on."""
        for batch in range(position + slot, self.batches_per_epoch, slots):
            tally.awaited()
            samples = list(tally.usable(self.decoder.decode, self._read(batch, tally)))
            if not samples:
                raise tally.nothing(f"no sample of validation batch {batch} could be used")
            tally.add("passed", len(samples))
            yield collate(samples)

    def _read(self, batch: int, tally: Tally) -> Iterator[Raw]:
        for index in self.indices(batch):
            tally.add("read")
            yield self.entries[index].read()


class Loader:
    """Yields epochs of batches; keeps its workers from one to the next, and starts them anew at `position()`.

    Without `position` it goes on where it was left. Workers are waited for as long as they find samples.
    """

    def __init__(
        self,
        source: TrainStream | UncountedStream | ValidationSet,
        tally: Tally,
        *,
        num_workers: int = 0,
        position: Callable[[], int] | None = None,
    ) -> None:
        self.source, self.tally, self.num_workers, self.position = source, tally, num_workers, position
        self._reached = 0
        # Lightning looks for this name to stop the workers when a run ends. Left to the garbage collector, which takes
        # the queues first, each worker would be waited for in vain for five seconds.
        self._iterator: Iterator[Batch | Exception] | None = None

    def __len__(self) -> int:
        return self.source.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        # As a generator this runs at the first batch: Lightning calls iter() before it has restored its counters.
        position = self._reached if self.position is None else self.position()
        if self._iterator is None or position != self._reached:
            patience = self.tally.stall_timeout
            loader = DataLoader(
                _Batches(self.source, position, self.tally),
                batch_size=None,  # the source makes the batches
                num_workers=self.num_workers,
                collate_fn=unchanged,
                worker_init_fn=partial(_start_worker, self.tally),
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # else every start of the workers draws from the global generator
                timeout=patience if self.num_workers and math.isfinite(patience) else 0,
            )
            self._iterator, self._reached = iter(loader), position
        for _ in range(len(self)):
            self._reached += 1
            batch = self._next()
            if isinstance(self.source, ValidationSet) and self._reached == len(self):
                self._iterator = None  # nobody asks for more than there is: let the workers go now
            yield batch

    def close(self) -> None:
        """Stop the workers, whoever else still holds the iterator (a traceback, for one)."""
        if isinstance(self._iterator, _MultiProcessingDataLoaderIter):
            self._iterator._shutdown_workers()
        self._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """Empty, as is loading it: the data module keeps the state. Tells Lightning that the data can be resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def _next(self) -> Batch:
        """The next batch, however long it takes while workers find samples; an error if they find none any more."""
        while True:
            try:
                item = next(self._iterator)
            except RuntimeError as error:
                if "timed out" not in str(error):  # a DataLoader's timeout has no class of its own
                    raise
                patience = self.tally.stall_timeout
                if self.tally.silence() >= patience:
                    what = f"no worker found a sample that can be used for {patience:g} s; is the storage slow or gone?"
                    raise self.tally.nothing(what) from None
            else:
                if isinstance(item, Exception):
                    raise item
                return item


class _Batches(IterableDataset):
    """A worker's batches from `position` on.

    An error comes as the last item: raised in a worker, it would reach the user wrapped in the worker's traceback.
    """

    def __init__(self, source: TrainStream | UncountedStream | ValidationSet, position: int, tally: Tally) -> None:
        self.source, self.position, self.tally = source, position, tally

    def __iter__(self) -> Iterator[Batch | NothingToReadError]:
        info = get_worker_info()
        slot, slots = (info.id, info.num_workers) if info else (0, 1)
        try:
            yield from self.source.batches_from(self.position, self.tally, slot=slot, slots=slots)
        except NothingToReadError as error:
            yield error


def _start_worker(tally: Tally, worker: int) -> None:
    """Let a worker count in its own row, and live on when a scheduler ends the training.

    That sends SIGTERM to all processes, and the training's last step still needs the workers' batches. So they do not
    heed the first; the next, by which DataLoader ends workers that do not go by themselves, is heard.
    """
    tally.worker = worker
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def unchanged(item: Any) -> Any:
    """For a DataLoader of whole batches, which would else turn them into lists of tensors."""
    return item
