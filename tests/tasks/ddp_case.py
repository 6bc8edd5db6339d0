"""Two steps of stage 2 over a stream of scenes; as a script, in two processes: ddp_case.py FAMILY FOLDER."""

import sys
from pathlib import Path

from training_case import Losses, distillation, student_weights, trainer_for

from icd_lightning.callbacks.reconstruction import ReconstructionCallback
from icd_lightning.data.scenes import SceneDataModule

BATCH = 4
"""Of all processes together."""


def train(family: Path, folder: Path, *, devices: int = 1):
    """Train and validate; return the losses of this rank, the students' weights, and the metrics."""
    task, losses = distillation(family), Losses()
    trainer = trainer_for(
        folder,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=2,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        callbacks=[losses, ReconstructionCallback()],
    )
    data = SceneDataModule(batch_size=BATCH // devices, val_count=4, val_batch_size=4 // devices)
    trainer.fit(task, datamodule=data)
    return losses.values, student_weights(task), dict(trainer.callback_metrics), trainer.global_rank


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    family, folder = map(Path, sys.argv[1:])
    result = train(family, folder, devices=2)
    torch.save(result[:3], folder / f"rank{result[3]}.pt")
