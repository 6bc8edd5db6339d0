"""What was skipped is logged, for what reason, over all ranks."""

import logging

import icd_lightning  # noqa: F401 (before lightning: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import lightning
import pytest
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_case import scenes_data, trainer_for, write_scenes

from icd_lightning.callbacks.data import DataReport
from icd_lightning.data.shards import open_shards, write_shards
from icd_lightning.data.tars import index_shard
from icd_lightning.tiny.datamodule import SceneDataModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return (batch.images.mean() - self.weight).square()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """24 pictures, of which one has no caption and two cannot be decoded."""
    folder = tmp_path_factory.mktemp("shards")
    write_scenes(folder / "good")
    entries = [entry for shard in open_shards(str(folder / "good")) for entry in index_shard(shard.url)[0]]
    samples = [{k: v for k, v in entry.read().items() if k != "__url__"} for entry in entries]
    samples[1]["txt"] = b""
    for number in (5, 17):
        samples[number]["png"] = samples[number]["png"][:60]
    write_shards(samples, folder / "bad", shard_size=8, parameters={})
    return folder / "bad"


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows under data/: (step, value) by name."""
    events = EventAccumulator(str(folder))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("data/")]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tensorboard_shows_every_reason(shards, tmp_path, caplog, num_workers):
    data = scenes_data(shards, val_urls=str(shards), val_batch_size=8, num_workers=num_workers)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    caplog.set_level(logging.WARNING)
    options = {"callbacks": [DataReport()], "log_every_n_steps": 2, "max_epochs": 1, "accumulate_grad_batches": 2}
    trainer_for(tmp_path, logger=logger, **options).fit(Module(), datamodule=data)
    shown = scalars(tmp_path)
    assert [step for step, _ in shown["data/train/passed"]] == [2, 4]
    counts = data.train_tally.counts()
    assert {"data/train/no_caption", "data/train/corrupt_image"} <= set(shown)
    assert 1 <= shown["data/train/corrupt_image"][-1][1] <= counts["corrupt_image"]
    assert not {"data/train/too_small", "data/val/passed"} & set(shown)  # nothing of these, until validation
    assert f"train data: {counts['passed']} samples passed, left out: no_caption {counts['no_caption']}" in caplog.text
    assert "val data: 21 samples passed, left out: no_caption 1, corrupt_image 2" in caplog.text


class Kept(Logger):
    """Remembers the last numbers under data/."""

    last: dict = {}  # noqa: RUF012  the ranks are processes
    name = version = "kept"

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        if any(name.startswith("data/") for name in metrics):
            self.last = dict(metrics)

    def log_hyperparams(self, *args):
        pass


class CheckSum(lightning.Callback):
    """In the ranks' own processes: what was logged is the sum over ranks."""

    def on_train_end(self, trainer, pl_module):
        gathered = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, trainer.datamodule.train_tally.counts())
        if trainer.is_global_zero:
            assert 18 <= sum(counts["passed"] for counts in gathered) <= 20
            assert sum(counts["no_caption"] for counts in gathered) == 1  # the index's words, by one rank for all
            for name in ("passed", "no_caption", "corrupt_image"):
                assert trainer.logger.last.get(f"data/train/{name}", 0) == sum(counts[name] for counts in gathered)


def test_ranks_are_summed(shards, tmp_path):
    options = {"callbacks": [DataReport(), CheckSum()], "log_every_n_steps": 1, "max_epochs": 1}
    trainer_for(tmp_path, logger=Kept(), devices=2, strategy="ddp_fork", **options).fit(
        Module(), datamodule=scenes_data(shards)
    )


def test_data_that_are_not_counted_are_let_be(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    options = {"callbacks": [DataReport()], "log_every_n_steps": 1, "max_steps": 2, "limit_val_batches": 0}
    trainer_for(tmp_path, logger=logger, **options).fit(Module(), datamodule=SceneDataModule(batch_size=2))
    assert scalars(tmp_path) == {}


@pytest.mark.parametrize(
    ("limit", "told"), [(5, "an epoch has 5 batches: its last optimizer step takes 1 of the 4"), (8, None)]
)
def test_a_short_last_optimizer_step_is_told_of(shards, tmp_path, caplog, limit, told):
    options = {"callbacks": [DataReport()], "accumulate_grad_batches": 4, "limit_train_batches": limit, "max_epochs": 1}
    trainer_for(tmp_path, **options).fit(Module(), datamodule=scenes_data(shards))
    assert ("optimizer step" in caplog.text) == (told is not None)
    assert (told or "") in caplog.text
