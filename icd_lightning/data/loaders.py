"""What a Trainer iterates over: batches of a TrainStream or of a fixed set, made by worker processes or without.

To Lightning these are plain iterables, not `DataLoader`s: so it neither wraps their samplers nor warns about them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from icd_lightning.data.batch import Batch
from icd_lightning.data.decoding import SampleDecoder, collate
from icd_lightning.data.stream import TrainStream
from icd_lightning.data.tally import NothingToReadError, Tally
from icd_lightning.data.tars import Entry


class TrainDataset(IterableDataset):
    """The batches of a TrainStream from `position` on, for a DataLoader with batch_size=None.

    An error comes as the last item: raised in a worker, it would reach the user wrapped in the worker's traceback.
    """

    def __init__(self, stream: TrainStream, position: int, tally: Tally) -> None:
        self.stream, self.position, self.tally = stream, position, tally

    def __iter__(self) -> Iterator[Batch | NothingToReadError]:
        info = get_worker_info()
        slot, slots = (info.id, info.num_workers) if info else (0, 1)
        try:
            yield from self.stream.batches_from(self.position, self.tally, slot=slot, slots=slots)
        except NothingToReadError as error:
            yield error


class _Loader:
    """Starts a DataLoader on a dataset that makes the batches, and waits for them as long as samples are found."""

    def __init__(self, tally: Tally, num_workers: int) -> None:
        self.tally, self.num_workers = tally, num_workers
        # Lightning looks for this name to stop the workers when a run ends. Left to the garbage collector, which takes
        # the queues first, each worker would be waited for in vain for five seconds.
        self._iterator: Iterator[Batch | Exception] | None = None

    def close(self) -> None:
        """Stop the workers, whoever else still holds the iterator (a traceback, for one)."""
        if isinstance(self._iterator, _MultiProcessingDataLoaderIter):
            self._iterator._shutdown_workers()
        self._iterator = None

    def _start(self, dataset: Dataset) -> None:
        patience = self.tally.limits.stall_timeout
        loader = DataLoader(
            dataset,
            batch_size=None,  # the dataset makes the batches
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            worker_init_fn=self.tally.count_as,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every start of the workers draws from the global generator
            timeout=patience if self.num_workers and math.isfinite(patience) else 0,
        )
        self._iterator = iter(loader)

    def _next(self) -> Batch:
        """The next batch, however long it takes while workers find samples; an error if they find none any more."""
        while True:
            try:
                item = next(self._iterator)
            except RuntimeError as error:
                if "timed out" not in str(error):  # a DataLoader's timeout has no class of its own
                    raise
                patience = self.tally.limits.stall_timeout
                if self.tally.silence() >= patience:
                    what = f"no worker found a sample that can be used for {patience:g} s; is the storage slow or gone?"
                    raise self.tally.nothing(what) from None
            else:
                if isinstance(item, Exception):
                    raise item
                return item


class TrainLoader(_Loader):
    """Yields epochs of a TrainStream, keeping its workers from one to the next; starts them anew at `position()`.

    Without `position` it goes on where it was left.
    """

    def __init__(
        self, stream: TrainStream, tally: Tally, *, num_workers: int = 0, position: Callable[[], int] | None = None
    ) -> None:
        super().__init__(tally, num_workers)
        self.stream, self.position = stream, position
        self._reached = 0

    def __len__(self) -> int:
        return self.stream.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        # As a generator this runs at the first batch: Lightning calls iter() before it has restored its counters.
        position = self._reached if self.position is None else self.position()
        if self._iterator is None or position != self._reached:
            self._start(TrainDataset(self.stream, position, self.tally))
            self._reached = position
        for _ in range(len(self)):
            self._reached += 1
            yield self._next()

    def state_dict(self) -> dict[str, Any]:
        """Empty, as is loading it: the data module keeps the state. Tells Lightning that the data can be resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class ValidationSet(Dataset):
    """The batches, at most B samples of one size, that one rank validates on.

    Every sample belongs to one rank; the shares differ by one sample at most and come in equally many batches (else
    ranks that wait for each other would hang), which differ by one sample at most too. A sample that cannot be used is
    counted and left out of its batch.
    """

    def __init__(
        self, entries: list[Entry], decoder: SampleDecoder, batch_size: int, *, rank: int, world_size: int, tally: Tally
    ) -> None:
        self.entries, self.decoder, self.tally = entries, decoder, tally
        self.own = range(rank, len(entries), world_size)
        self.batches = -(-len(entries) // (world_size * batch_size))
        if len(entries) // world_size < self.batches:
            remedy = f"val_batch_size {batch_size + 1}" if len(entries) >= world_size else "fewer ranks"
            raise ValueError(
                f"{len(entries)} validation samples give no equal number of batches of {batch_size} on {world_size} "
                f"ranks; use {remedy} or more samples"
            )

    def __len__(self) -> int:
        return self.batches

    def indices(self, batch: int) -> range:
        """Which entries a batch is made of."""
        first, last = (place * len(self.own) // self.batches for place in (batch, batch + 1))
        return self.own[first:last]

    def __getitem__(self, batch: int) -> Batch | NothingToReadError:
        self.tally.awaited()
        samples = []
        try:
            for index in self.indices(batch):
                self.tally.add("read")
                sample = self.tally.attempt(self.decoder.decode, self.entries[index].read())
                samples += [] if sample is None else [sample]
        except NothingToReadError as error:
            return error
        if not samples:
            return self.tally.nothing(f"no sample of validation batch {batch} could be used")
        self.tally.add("passed", len(samples))
        return collate(samples)


class ValidationLoader(_Loader):
    """Yields the batches of a ValidationSet in order."""

    def __init__(self, validation_set: ValidationSet, num_workers: int = 0) -> None:
        super().__init__(validation_set.tally, num_workers)
        self.validation_set = validation_set

    def __len__(self) -> int:
        return len(self.validation_set)

    def __iter__(self) -> Iterator[Batch]:
        self._start(self.validation_set)
        for index in range(len(self)):
            batch = self._next()
            if index == len(self) - 1:
                self._iterator = None  # nobody asks for more than there is: let the workers go now
            yield batch


def _unchanged(item: Any) -> Any:
    return item
