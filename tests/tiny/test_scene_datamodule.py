"""The stream of fresh scenes: which rank, worker or run reads it never changes what it holds."""

from collections.abc import Iterable
from itertools import chain, islice
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from icd_lightning.data.batch import Batch
from icd_lightning.data.images import to_pictures
from icd_lightning.tiny.datamodule import SceneDataModule, SceneStream, scene_batch
from icd_lightning.tiny.rendering import render
from icd_lightning.tiny.scenes import HELD_OUT_SEED, Scene, scene_at


def keys(batches: Iterable[Batch]) -> list[list[str]]:
    return [batch.keys for batch in batches]


def numbered(seed: int, indices: Iterable[int]) -> list[str]:
    return [f"{seed}-{index}" for index in indices]


def same(left: Batch, right: Batch) -> bool:
    return torch.equal(left.images, right.images) and left[1:] == right[1:]


def test_a_batch_holds_the_scenes_as_pictures_captions_and_metadata():
    scenes = [scene_at(3, index) for index in range(5)]
    batch = scene_batch(scenes, list("abcde"), size=32)
    assert batch.images.shape == (5, 3, 32, 32)
    assert batch.images.dtype == torch.float32
    assert np.array_equal(to_pictures(batch.images), [render(scene, 32) for scene in scenes])
    assert batch.captions == [scene.caption() for scene in scenes]
    assert batch.keys == list("abcde")
    assert [Scene.from_dict(values) for values in batch.metadata] == scenes
    assert all(m["original_size"] == (32, 32) and m["crop_top_left"] == (0, 0) for m in batch.metadata)


def test_a_batch_keeps_the_numbers_and_the_memory_it_has_always_had():
    """Convolutions sum in another order in another memory format: a training would go another way."""
    scenes = [scene_at(3, index) for index in range(3)]
    images = scene_batch(scenes, list("abc")).images
    drawn = torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(images, drawn)
    assert images.stride() == drawn.stride()
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_scene_depends_on_seed_and_number_alone():
    assert [scene_at(1, i) for i in (5, 2)] == [scene_at(1, i) for i in range(6)][5::-3]
    assert len({repr(scene_at(seed, i)) for seed in (1, 2, HELD_OUT_SEED) for i in range(50)}) == 150


def test_the_stream_is_the_same_at_every_reading():
    stream = SceneStream(7, 3)
    first, again = ([*islice(stream, 4)] for _ in range(2))
    assert all(map(same, first, again))
    assert [key for batch in first for key in batch.keys] == numbered(7, range(12))
    assert all(scene_at(7, i).caption() == c for i, c in enumerate(chain(*(batch.captions for batch in first))))


def test_the_stream_can_be_entered_anywhere_and_left():
    whole = keys(islice(SceneStream(7, 3), 9))
    assert keys(islice(SceneStream(7, 3, first=5), 4)) == whole[5:]
    assert keys(SceneStream(7, 3, first=5, stop=8)) == whole[5:8]
    assert keys(SceneStream(7, 3, first=8, stop=8)) == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_the_joined_batch(world_size):
    joined = islice(SceneStream(7, 2 * world_size), 4)
    ranks = (islice(SceneStream(7, 2, rank=rank, world_size=world_size), 4) for rank in range(world_size))
    for whole, *parts in zip(joined, *ranks, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert whole.keys == [key for part in parts for key in part.keys]


@pytest.mark.parametrize("first", [0, 5])
def test_workers_give_what_one_process_gives(first):
    for rank in range(2):
        stream = SceneStream(7, 2, first=first, stop=first + 7, rank=rank, world_size=2)
        loader = DataLoader(stream, batch_size=None, num_workers=2, collate_fn=lambda batch: batch)
        assert all(same(*pair) for pair in zip(loader, stream, strict=True))


# --- the data module --------------------------------------------------------------------------------------------------


class Recorder(lightning.LightningModule):
    """Trains on nothing much, and remembers the keys it was shown."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.interrupt_at = interrupt_at
        self.trained: list[list[str]] = []
        self.validated: list[str] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        if len(self.trained) == self.interrupt_at:
            raise KeyboardInterrupt
        self.trained.append(batch.keys)
        return (batch.images.mean() - self.weight).square()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += batch.keys

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: Recorder, folder, *, max_steps: int, resume: bool = False, **data) -> None:
    save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=4, save_on_exception=True)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(
        max_steps=max_steps, callbacks=[save], default_root_dir=folder, num_sanity_val_steps=0, **quiet
    )
    scenes = SceneDataModule(batch_size=2, seed=7, val_count=4, val_batch_size=2, **data)
    trainer.fit(module, datamodule=scenes, ckpt_path=folder / "last.ckpt" if resume else None)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(("interrupt_at", "num_workers"), [(4, 0), (6, 0), (6, 2)])
def test_an_interrupted_run_goes_on_with_the_batch_it_was_stopped_in(tmp_path, interrupt_at, num_workers):
    stopped, resumed = Recorder(interrupt_at), Recorder()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(stopped, tmp_path, max_steps=9, num_workers=num_workers)
    fit(resumed, tmp_path, max_steps=9, num_workers=num_workers, resume=True)
    assert [key for batch in stopped.trained + resumed.trained for key in batch] == numbered(7, range(18))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_can_be_prolonged(tmp_path):
    short, longer = Recorder(), Recorder()
    fit(short, tmp_path, max_steps=4)
    fit(longer, tmp_path, max_steps=6, resume=True)
    assert [key for batch in short.trained + longer.trained for key in batch] == numbered(7, range(12))


def on_rank(rank: int, world_size: int, **options) -> SceneDataModule:
    module = SceneDataModule(**{"batch_size": 2, "seed": 7, "val_count": 12, "val_batch_size": 2} | options)
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return module


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_shows_every_held_out_scene_once_and_ranks_equally_many(world_size):
    shares = [keys(on_rank(rank, world_size).val_dataloader()) for rank in range(world_size)]
    assert [len(share) for share in shares] == [6 // world_size] * world_size
    together = sorted(chain(*chain(*shares)), key=lambda key: int(key.split("-")[1]))
    assert together == numbered(HELD_OUT_SEED, range(12))


def test_ranks_train_on_different_scenes():
    shares = [keys(islice(on_rank(rank, 2).train_dataloader(), 3)) for rank in range(2)]
    assert [key for a, b in zip(*shares, strict=True) for key in a + b] == numbered(7, range(12))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SceneDataModule(seed=HELD_OUT_SEED), "seed 1000003 is kept for held-out scenes; train on another"),
        (lambda: SceneDataModule(batch_size=0), "batch_size 0 must be at least 1"),
        (lambda: SceneDataModule(val_count=0), "val_count 0 must be at least 1"),
        (lambda: SceneDataModule(val_batch_size=-1), "val_batch_size -1 must be at least 1"),
        (lambda: on_rank(0, 1, val_count=5).val_dataloader(), "val_count 5 must be a multiple of val_batch_size 2 x 1"),
        (lambda: on_rank(0, 4).val_dataloader(), "val_count 12 must be a multiple of val_batch_size 2 x 4 ranks"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
