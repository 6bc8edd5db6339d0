"""Two steps of stage 2 over a stream of scenes; as a script, in two processes: ddp_case.py FAMILY FOLDER."""

import os
import signal
import sys
from pathlib import Path

import icd_lightning  # noqa: F401 (before lightning: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import lightning
import torch
from training_case import Losses, distillation, student_weights, trainer_for

from icd_lightning.callbacks.checkpoint import RunCheckpoint
from icd_lightning.callbacks.reconstruction import ReconstructionCallback
from icd_lightning.data.scenes import SceneDataModule

BATCH = 4
"""Of all processes together."""


class InterruptSecondRank(lightning.Callback):
    """Ctrl-C in the second step; when both ranks are through with it, what they have is written down."""

    def __init__(self, folder: Path, losses: Losses) -> None:
        self.folder, self.losses = folder, losses

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 2:
            found = self.losses.values, student_weights(pl_module), dict(trainer.callback_metrics)
            torch.save(found, self.folder / f"rank{trainer.global_rank}.pt")
            trainer.strategy.barrier()  # rank 0 will end the other one


def train(family: Path, folder: Path, *callbacks, devices: int = 1, **options):
    """Train and validate; losses of this rank, the students' weights, the metrics."""
    task, losses = distillation(family), next((c.losses for c in callbacks if hasattr(c, "losses")), Losses())
    trainer = trainer_for(
        folder,
        devices=devices,
        **{"max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None, **options},
        callbacks=[losses, *callbacks, ReconstructionCallback(), RunCheckpoint()],
        enable_checkpointing=True,
    )
    data = SceneDataModule(batch_size=BATCH // devices, val_count=4, val_batch_size=4 // devices)
    trainer.fit(task, datamodule=data)
    return losses.values, student_weights(task), dict(trainer.callback_metrics)


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where tests run in the background
    family, folder = map(Path, sys.argv[1:])
    train(family, folder, InterruptSecondRank(folder, Losses()), devices=2, strategy="ddp", max_steps=100)
