"""Feeds a Trainer from WebDataset shards."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import lightning

from icd_lightning.data.decoding import Sample, SampleDecoder, bucket_step, require
from icd_lightning.data.index import open_indexes
from icd_lightning.data.loaders import Loader, ValidationSet
from icd_lightning.data.manifest import Verify
from icd_lightning.data.shards import find_shards, open_shards
from icd_lightning.data.stream import TrainStream, find_places
from icd_lightning.data.tally import RejectedError, Tally
from icd_lightning.data.tars import OtherLengthError, Raw, index_shard, is_local, read_ranges
from icd_lightning.data.uncounted import MOST_SHUFFLED, UncountedStream, read_shard

logger = logging.getLogger(__name__)

PROBED_SAMPLES, PROBED_SHARDS = 64, 8


class ShardDataModule(lightning.LightningDataModule):
    """Batches of images (B, 3, resolution, resolution) in [-1, 1], or of their latents, with captions, from shards.

    Shards are WebDataset tars, as `icd data shapes`, `icd data cache-latents` or img2dataset write them.

    Args:
        urls: Shards to train on: a folder, a list, or patterns such as `shards/{00000..00009}.tar`; also `pipe:...`,
            `http://...`, `s3://...` and whatever else fsspec has a driver for. Local shards are indexed once, by one
            process, which leaves a file beside each (see `icd data index`). Shards elsewhere that have no such file
            cannot be counted and need `batches_per_epoch` (and a shard for every worker).
        val_urls: Local shards to validate and test on, in order; none by default.
        batch_size: Samples in a batch of one rank.
        val_batch_size: The same for validation; `batch_size` if not given.
        resolution: Pixels of a side. The short side is resized to it, the centre cut out.
        buckets: Train on pictures of any form: each is brought to the nearest of several sizes of about resolution^2
            pixels, and a batch holds one size. Validation keeps to squares.
        min_size: Samples with a short side under this many pixels are skipped; if not given, those that would have to
            be enlarged.
        caption_field: Take captions from this field of the json file instead of the txt or caption file.
        num_workers: Worker processes; 0 reads in the training process.
        seed: Decides the order of samples; of shards that are not indexed, together with the number of all workers.
        shuffle_buffer: Samples among which samples are shuffled, after the shards have been shuffled; of shards that
            are not indexed, those that each worker keeps in memory, 1000 at most.
        batches_per_epoch: Batches of each rank in an epoch; as many as the shards hold if not given. With accumulated
            micro-batches it is brought to a multiple of them: an epoch is made of whole optimizer steps.
        verify: How closely shards are compared with the manifest.json beside them: see `open_shards`. With "off" they
            are not indexed either, but read from end to end as they are.
        max_skipped: The run ends when more than this share of the samples cannot be used (after the first 1000).
        stall_timeout: The run ends when no usable sample has come for so many seconds.

    Samples that cannot be used are skipped and counted by reason: `train_tally.counts()`, `val_tally.counts()`, both
    anew from each `setup`.

    Data go on where training stopped: the trainer's count of finished batches decides which batch is next, so what
    workers had prefetched is not lost. The loaders are no `DataLoader`s to Lightning, so that it leaves them as they
    are; set `use_distributed_sampler: false` in the trainer all the same, since streams are divided here.
    """

    def __init__(
        self,
        urls: str | list[str],
        *,
        val_urls: str | list[str] | None = None,
        batch_size: int = 16,
        val_batch_size: int | None = None,
        resolution: int = 64,
        buckets: bool = False,
        min_size: int | None = None,
        caption_field: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
        shuffle_buffer: int = 100_000,
        batches_per_epoch: int | None = None,
        verify: Verify = "count",
        max_skipped: float = 0.5,
        stall_timeout: float = 60.0,
    ) -> None:
        super().__init__()
        val_batch_size = batch_size if val_batch_size is None else val_batch_size
        require(batch_size=batch_size, val_batch_size=val_batch_size, resolution=resolution, at_least=1)
        require(num_workers=num_workers, shuffle_buffer=shuffle_buffer, min_size=min_size or 0, at_least=0)
        require(batches_per_epoch=1 if batches_per_epoch is None else batches_per_epoch, at_least=1)
        self.urls, self.val_urls, self.verify = urls, val_urls, verify
        self.batch_size, self.val_batch_size, self.batches_per_epoch = batch_size, val_batch_size, batches_per_epoch
        self.num_workers, self.seed, self.shuffle_buffer = num_workers, seed, shuffle_buffer
        if buckets and resolution % bucket_step(resolution):
            raise ValueError(
                f"resolution {resolution} must be a multiple of {bucket_step(resolution)} to be trained in buckets"
            )
        self.decoder = SampleDecoder(resolution, caption_field, min_size, buckets)
        self.limits = {"max_skipped": max_skipped, "stall_timeout": stall_timeout}
        Tally(**self.limits)  # complains of wrong ones
        self.train_tally: Tally | None = None
        self.val_tally: Tally | None = None
        self.stream: TrainStream | UncountedStream | None = None
        self.prepare_data_per_node = False
        self.validation_set: ValidationSet | None = None
        self.examples: list[Sample] = []  # the first of those to train and to validate on
        self._loader: Loader | None = None
        self._offset = 0

    def prepare_data(self) -> None:
        """Index the shards that are here to train on, on one rank while the others wait."""
        if self.verify == "off" or (self.trainer and self.trainer.state.fn != "fit"):
            return
        with suppress(ValueError, OSError):  # `setup` says what is wrong on every rank
            urls = [url for url in find_shards(self.urls) if is_local(url)]
            self._look_into(urls)
            open_indexes(urls, self.decoder.caption_field)

    def setup(self, stage: str | None = None) -> None:
        """Find, check and count the shards, and try whether samples can be read from them."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        self._offset, self.examples = 0, []  # Lightning loads a checkpoint after this
        # here, not when it is made: ranks that are forked would count in the same memory
        self.train_tally, self.val_tally = (Tally(self.num_workers, **self.limits) for _ in range(2))
        if stage in (None, "fit"):
            self.stream = self._open_stream(rank, world_size)
        if self.val_urls:
            self.validation_set = self._open_validation_set(rank, world_size)
        elif stage in ("validate", "test"):
            raise ValueError("val_urls is not given: name the shards to validate or test on")
        elif self.trainer and rank == 0:
            logger.warning("val_urls is not given: nothing is validated, and callbacks have no pictures to look at")

    def _open_stream(self, rank: int, world_size: int) -> TrainStream | UncountedStream:
        shards = open_shards(self.urls, verify=self.verify)
        urls = tuple(shard.url for shard in shards)
        self.examples.append(self._look_into(urls))
        indexes = None if self.verify == "off" else open_indexes(urls, self.decoder.caption_field)
        order = {"seed": self.seed, "shuffle_buffer": self.shuffle_buffer, "rank": rank, "world_size": world_size}
        if indexes is not None:
            places = find_places(urls, indexes, self.decoder, self.train_tally if rank == 0 else Tally())
            if not len(places.form):
                raise self.train_tally.nothing("none of the samples of urls can be used")
            if _gives_parts(places.of(0)):
                batches = self._count_batches(len(places.form), world_size)
                return TrainStream(places, self.decoder, self.batch_size, batches, **order)
            logger.warning("%s is indexed, but where it lies gives out whole files only: they are read so", urls[0])
        batches = self._count_batches(None, world_size, urls)
        order["shuffle_buffer"] = min(MOST_SHUFFLED, self.shuffle_buffer)
        return UncountedStream(urls, self.decoder, self.batch_size, batches, **order)

    def _look_into(self, urls: Sequence[str]) -> Sample:
        tally = Tally(**self.limits)
        raws = chain.from_iterable(read_shard(url, tally) for url in urls[:PROBED_SHARDS])
        return _probe(raws, self.decoder, "urls", tally)

    def _count_batches(self, samples: int | None, world_size: int, urls: Sequence[str] = ()) -> int:
        """Batches of each rank in an epoch, whole optimizer steps; ValueError where data and readers do not fit."""
        batches, readers = self.batches_per_epoch, world_size * max(1, self.num_workers)
        if samples is None:
            if len(urls) < readers:
                fewer = "give a lower num_workers" if len(urls) >= world_size else "take fewer devices"
                raise ValueError(
                    f"urls hold {len(urls)} uncounted shards, too few for {readers} readers ({world_size} ranks x "
                    f"{max(1, self.num_workers)} workers); {fewer}, or add shards"
                )
            if batches is None:
                raise ValueError(
                    f"how many samples {urls[0]} holds is not known in advance: give batches_per_epoch, or index the "
                    "shards by `icd data index` where they are local, and copy what it makes to where they are"
                )
        elif batches is None and (batches := samples // (self.batch_size * world_size)) == 0:
            most = samples // world_size
            lower = f"lower batch_size to at most {most}" if most else "take fewer devices"
            raise ValueError(
                f"urls hold {samples} samples, too few for one batch of {self.batch_size} on each of {world_size} "
                f"ranks; {lower}, or add samples"
            )
        accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
        if batches < accumulated:
            logger.warning(
                "an optimizer step takes %d batches of each rank, and an epoch has %d: it is made %.3g times as long, "
                "and a step sees samples more than once",
                *(accumulated, batches, accumulated / batches),
            )
        return max(1, batches // accumulated) * accumulated

    def _open_validation_set(self, rank: int, world_size: int) -> ValidationSet:
        shards = open_shards(self.val_urls, verify=self.verify)
        for shard in shards:
            if not is_local(shard.url):
                raise ValueError(f"val_urls holds {shard.url}; validation reads by index: copy it to a local file")
        if rank == 0 and self.stream is not None and (both := {*self.stream.urls} & {s.url for s in shards}):
            logger.warning("%s is trained and validated on", min(both))
        entries = [entry for shard in shards for entry in index_shard(shard.url)[0]]
        decoder = replace(self.decoder, buckets=False)
        self.examples.append(_probe((entry.read() for entry in entries), decoder, "val_urls", self.val_tally))
        return ValidationSet(entries, decoder, self.val_batch_size, rank, world_size)

    def train_dataloader(self) -> Loader:
        """Return an endless stream cut into epochs of `batches_per_epoch`."""
        assert self.stream is not None, "setup comes first"
        self.teardown()
        position = self._next_batch if self.trainer else None
        self._loader = Loader(self.stream, self.train_tally, num_workers=self.num_workers, position=position)
        return self._loader

    def val_dataloader(self) -> Loader | list:
        if self.validation_set is None:
            return []
        return Loader(self.validation_set, self.val_tally, num_workers=self.num_workers, position=lambda: 0)

    test_dataloader = val_dataloader

    def teardown(self, stage: str | None = None) -> None:
        if self._loader is not None:
            self._loader.close()

    def state_dict(self) -> dict[str, Any]:
        if self.stream is None or self.trainer is None:
            return {}
        position = self._position()
        return {"finished": position - self._offset, "position": position, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batches a checkpoint's run had finished; warn if this run orders samples otherwise."""
        if self.stream is None or not state_dict:  # the checkpoint is only evaluated
            return
        before, now = state_dict["order"], self._order()
        samples = state_dict["position"] * before["batch_size"] * before["world_size"]
        self._offset = samples // (now["batch_size"] * now["world_size"]) - state_dict["finished"]
        same = () if isinstance(self.stream, UncountedStream) else ("world_size", "num_workers")
        if different := [
            f"{name} was {before.get(name)}, is {value}"
            for name, value in now.items()
            if before.get(name) != value and name not in same
        ]:
            logger.warning(
                "data continue at the same point, but not with the same samples as without a stop: %s",
                "; ".join(different),
            )

    def _position(self) -> int:
        """The next batch of this rank, counted from the start of training, in batches of this run's size."""
        # the trainer's other counters run ahead, or start anew with an epoch or a resume
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.completed + self._offset

    def _next_batch(self) -> int:
        """Where an epoch begins: with `overfit_batches`, each with the same batches."""
        position = self._position()
        return position % self.trainer.num_training_batches if self.trainer.overfit_batches else position

    def _order(self) -> dict[str, Any]:
        stream = self.stream
        assert stream is not None
        names = ("seed", "batch_size", "world_size", "shuffle_buffer")
        order = {name: getattr(stream, name) for name in names} | {"num_workers": max(1, self.num_workers)}
        order |= {"indexed": isinstance(stream, TrainStream), "shards": _fingerprint(stream.urls)}
        return order | asdict(stream.decoder)


@lru_cache(maxsize=8)
def _fingerprint(urls: tuple[str, ...]) -> str:
    """Of the names, sizes and first bytes of shards, or the urls of remote ones; a copy elsewhere has the same."""
    digest = hashlib.sha256()
    for path, url in ((Path(url), url) for url in urls):
        if not path.is_file():
            digest.update(url.encode())
            continue
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(4096))
    return digest.hexdigest()[:12]


def _gives_parts(place: tuple[str, int, int]) -> bool:
    """Whether the store of a shard gives out parts of files; OSError if it gives nothing, as an outage does."""
    (part,) = read_ranges([place])
    if not isinstance(part, bytes | OtherLengthError):
        raise OSError(f"{place[0]} cannot be read ({part}), though its index can: try again later")
    return isinstance(part, bytes)


def _probe(raws: Iterable[Raw], decoder: SampleDecoder, name: str, tally: Tally) -> Sample:
    """The first sample; ValueError if not one of the first can be used."""
    rejected: list[RejectedError] = []
    for raw in islice(raws, PROBED_SAMPLES):
        try:
            return decoder.decode(raw)
        except RejectedError as error:
            rejected.append(error)
    if not rejected:
        raise tally.nothing(f"the shards of {name} hold no samples")
    first, count = rejected[0], len(rejected)
    raise ValueError(f"none of the first {count} samples of {name} can be used ({first}); {first.remedy}")
