"""A training that remembers which samples it was shown, over shards of `shards_case.numbered_samples`."""

import lightning
import torch
from shards_case import numbers

from icd_lightning.data.datamodule import ShardDataModule


class Recorder(lightning.LightningModule):
    """Learns one number from the pictures and remembers which it was shown."""

    def __init__(self, stop_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.stop_at = stop_at
        self.trained: list[list[int]] = []
        self.validated: list[int] = []

    def training_step(self, batch, batch_idx):
        if len(self.trained) == self.stop_at:
            raise RuntimeError("killed")
        self.trained.append(numbers(batch))
        return (batch.images.mean() - self.weight).square()

    def validation_step(self, batch, batch_idx):
        self.validated += numbers(batch)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_for(tmp_path, **options) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {"accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path, "use_distributed_sampler": False}
    defaults |= {"enable_checkpointing": "callbacks" in options, "max_epochs": 2, "num_sanity_val_steps": 0}
    return lightning.Trainer(**(quiet | defaults | options))


def data_for(urls, **options) -> ShardDataModule:
    urls = urls if isinstance(urls, list) else str(urls)
    return ShardDataModule(urls, **({"batch_size": 5, "resolution": 8, "shuffle_buffer": 8} | options))


def trained(urls, tmp_path, *, epochs: int = 1, **options) -> list[int]:
    """What a training over some epochs was shown, sorted."""
    module = Recorder()
    trainer_for(tmp_path, max_epochs=epochs).fit(module, datamodule=data_for(urls, **options))
    return sorted(number for batch in module.trained for number in batch)
