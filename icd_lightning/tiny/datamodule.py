"""An endless stream of freshly drawn scenes: what the tiny family's own parts are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from icd_lightning.data.batch import Batch
from icd_lightning.data.decoding import require
from icd_lightning.data.images import to_images
from icd_lightning.data.loaders import unchanged
from icd_lightning.tiny.rendering import render
from icd_lightning.tiny.scenes import HELD_OUT_SEED, Scene, scene_at


def scene_batch(scenes: Sequence[Scene], keys: Sequence[str], size: int = 64) -> Batch:
    """Render B scenes to a Batch: images (B, 3, size, size) in [-1, 1], captions, and the scenes as metadata."""
    images = to_images([render(scene, size) for scene in scenes]).contiguous(memory_format=torch.channels_last)
    place = {"original_size": (size, size), "crop_top_left": (0, 0)}
    return Batch(images, [s.caption() for s in scenes], list(keys), [s.to_dict() | place for s in scenes])


class SceneStream(IterableDataset):
    """Batches `first`, `first + 1`, ... of a world, shared out over ranks and workers; the same at every reading.

    Together the ranks see what one rank with a batch `world_size` times as large would see. Endless, or with `stop`,
    up to that batch.
    """

    def __init__(
        self,
        seed: int,
        batch_size: int,
        *,
        first: int = 0,
        stop: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.seed, self.batch_size, self.first, self.stop = seed, batch_size, first, stop
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (self.first + worker.id, worker.num_workers) if worker else (self.first, 1)
        for step in count(first, stride) if self.stop is None else range(first, self.stop, stride):
            start = (step * self.world_size + self.rank) * self.batch_size
            indices = range(start, start + self.batch_size)
            yield scene_batch([scene_at(self.seed, i) for i in indices], [f"{self.seed}-{i}" for i in indices])


class SceneDataModule(lightning.LightningDataModule):
    """Trains on scenes never seen before, validates on `val_count` fixed ones; resumes where training stopped.

    Scenes never run out: end a training by the trainer's max_steps. A second epoch would show the first one's again.

    Args:
        batch_size: scenes in a batch of one rank.
        seed: which world to train on.
        val_count: scenes to validate on, of all ranks together.
        val_batch_size: the batch size for those.
        num_workers: processes that draw; 0 draws in the training process.
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        seed: int = 0,
        val_count: int = 512,
        val_batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if seed == HELD_OUT_SEED:
            raise ValueError(f"seed {seed} is kept for held-out scenes; train on another")
        require(batch_size=batch_size, val_count=val_count, val_batch_size=val_batch_size, at_least=1)
        self.save_hyperparameters()
        self._consumed = 0

    def train_dataloader(self) -> DataLoader:
        stream = SceneStream(self.hparams.seed, self.hparams.batch_size, first=self._consumed, **self._place())
        return DataLoader(stream, batch_size=None, num_workers=self.hparams.num_workers, collate_fn=unchanged)

    def val_dataloader(self) -> DataLoader:
        place = self._place()
        total, size, world_size = self.hparams.val_count, self.hparams.val_batch_size, place["world_size"]
        if total % (size * world_size):
            raise ValueError(
                f"val_count {total} must be a multiple of val_batch_size {size} x {world_size} ranks, so that all "
                "ranks validate on equally many batches"
            )
        stream = SceneStream(HELD_OUT_SEED, size, stop=total // (size * world_size), **place)
        # of a stream, for Lightning would divide a list over ranks once more
        # and of its own generator, for each start draws from the global one otherwise
        return DataLoader(stream, batch_size=None, collate_fn=unchanged, generator=torch.Generator())

    def _place(self) -> dict[str, int]:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return {"rank": rank, "world_size": world_size}

    def state_dict(self) -> dict[str, Any]:
        """How many batches were trained on: not one that was interrupted, nor any that a worker has prefetched."""
        return {"consumed": self.trainer.fit_loop.epoch_loop.batch_progress.total.processed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._consumed = state_dict["consumed"]
