"""The smallest task, for callbacks that do not ask what is trained."""

from pathlib import Path

import torch
from torch.utils.data import DataLoader

from icd_lightning.data.batch import Batch
from icd_lightning.tasks.base import OptimizerSettings, Task


class Toy(Task):
    """Learns one number from drawn ones; the frozen ones and the buffers beside it are of any type."""

    def __init__(self) -> None:
        super().__init__(OptimizerSettings(lr=0.1))
        self.number = torch.nn.Parameter(torch.zeros(1))
        self.frozen = torch.nn.Parameter(torch.randn(1000).to(torch.bfloat16), requires_grad=False)
        self.register_buffer("table", torch.rand(1000))
        self.register_buffer("index", torch.arange(1000))

    def training_step(self, batch, batch_idx):
        loss = (1 + self.draws().uniform(1) - self.number).square().sum()  # of a resumed run, those of an unbroken one
        self.log_losses(loss, {"part": loss})
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/number", self.number)

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "number.txt").write_text(repr(self.number.item()))


def toy_loader(count: int = 32) -> DataLoader:
    """Batches of 2 captions, for the count of batches alone."""
    return DataLoader([str(index) for index in range(count)], batch_size=2, collate_fn=_batch)


def _batch(captions: list[str]) -> Batch:
    return Batch(torch.zeros(len(captions), 3, 1, 1), captions, captions, [{}] * len(captions))
