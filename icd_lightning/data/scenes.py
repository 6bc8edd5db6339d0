"""An endless stream of freshly drawn scenes: what the tiny family's own parts are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from icd_lightning.data.batch import Batch
from icd_lightning.data.shapes import Scene, random_scene, render

HELD_OUT_SEED = 1_000_003
"""Scenes of this seed are for validation; no training seed may equal it."""


def scene_at(seed: int, index: int) -> Scene:
    """The scene number `index` of the world `seed`; the same on every machine."""
    return random_scene(np.random.default_rng((seed, index)))


def scene_batch(scenes: Sequence[Scene], keys: Sequence[str], size: int = 64) -> Batch:
    """Render scenes to a Batch: images (B, 3, size, size) in [-1, 1], captions, and the scenes as metadata."""
    pictures = np.stack([render(scene, size) for scene in scenes])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Batch(images, [s.caption() for s in scenes], list(keys), [s.to_dict() for s in scenes])


class SceneStream(IterableDataset):
    """Batches `first`, `first + 1`, ... of a world, shared out over ranks and workers; a pure function of its arguments."""

    def __init__(self, seed: int, batch_size: int, *, first: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.seed, self.batch_size, self.first = seed, batch_size, first
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        step, stride = (self.first + worker.id, worker.num_workers) if worker else (self.first, 1)
        while True:
            start = (step * self.world_size + self.rank) * self.batch_size
            indices = range(start, start + self.batch_size)
            yield scene_batch([scene_at(self.seed, i) for i in indices], [f"{self.seed}-{i}" for i in indices])
            step += stride


class SceneDataModule(lightning.LightningDataModule):
    """Trains on scenes never seen before, validates on `val_count` fixed ones; resumes where training stopped."""

    def __init__(
        self, *, batch_size: int = 32, seed: int = 0, val_count: int = 512, val_batch_size: int = 64, num_workers: int = 0
    ) -> None:
        super().__init__()
        if seed == HELD_OUT_SEED:
            raise ValueError(f"seed {seed} is kept for held-out scenes; train on another")
        if val_count % val_batch_size:
            raise ValueError(f"val_count {val_count} must be a multiple of val_batch_size {val_batch_size}")
        self.save_hyperparameters()
        self._consumed = 0

    def train_dataloader(self) -> DataLoader:
        rank, world_size = self._place()
        stream = SceneStream(
            self.hparams.seed, self.hparams.batch_size, first=self._consumed, rank=rank, world_size=world_size
        )
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self.hparams.num_workers,
            persistent_workers=self.hparams.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader:
        rank, world_size = self._place()
        count, size = self.hparams.val_count, self.hparams.val_batch_size
        batches = [
            scene_batch([scene_at(HELD_OUT_SEED, i) for i in part], [f"held-out-{i}" for i in part])
            for part in (range(start, start + size) for start in range(rank * size, count, world_size * size))
        ]
        return DataLoader(batches, batch_size=None)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def state_dict(self) -> dict:
        """How many batches the trainer has used; what a worker has prefetched does not count."""
        return {"consumed": self.trainer.fit_loop.epoch_loop.total_batch_idx + 1}

    def load_state_dict(self, state_dict: dict) -> None:
        self._consumed = state_dict["consumed"]
