"""Stage 2 over a stream of scenes, in one process or as one of two ranks."""

import os
import signal
from pathlib import Path

import icd_lightning  # noqa: F401 (before lightning: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import lightning
import torch
from torch.distributed.tensor import DTensor
from training_case import Losses, distillation, student_weights, trainer_for

from icd_lightning.callbacks.averaging import ExponentialAverage
from icd_lightning.callbacks.checkpoint import RunCheckpoint
from icd_lightning.callbacks.export import ExportWeights
from icd_lightning.callbacks.generation import GenerationCallback
from icd_lightning.callbacks.reconstruction import GuidanceSweep, ReconstructionCallback
from icd_lightning.callbacks.segments import SegmentLosses
from icd_lightning.tasks.sharding import ShardedStrategy
from icd_lightning.tiny.datamodule import SceneDataModule

BATCH = 4
"""Of all processes together."""


class InterruptSecondRank(lightning.Callback):
    """Ctrl-C in the first step; when both ranks are through with the second, what they have is written down."""

    def __init__(self, folder: Path, losses: Losses) -> None:
        self.folder, self.losses = folder, losses

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 0:
            os.kill(os.getpid(), signal.SIGINT)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 2:
            weights = {d: {n: whole(w) for n, w in named.items()} for d, named in student_weights(pl_module).items()}
            found = self.losses.values, weights, dict(trainer.callback_metrics), share(pl_module), sent(trainer.model)
            torch.save(found, self.folder / f"rank{trainer.global_rank}.pt")
            trainer.strategy.barrier()  # rank 0 will end the other one


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(task: lightning.LightningModule) -> float:
    """Which part of the frozen base lies in this process."""
    base = [parameter for parameter in task.students.network.parameters() if not parameter.requires_grad]
    here = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in base)
    return here / sum(p.numel() for p in base)


def sent(model: torch.nn.Module) -> list[str]:
    """What DDP sends from the first process to the others beside what is trained; nothing where there is no DDP."""
    named = [*model.named_parameters(), *model.named_buffers()]
    left_out = {f"module.{name}" for name in getattr(model, "parameters_to_ignore", ())}
    is_ddp = isinstance(model, torch.nn.parallel.DistributedDataParallel)
    return [name for name, value in named if is_ddp and not value.requires_grad and name not in left_out]


def train(family: Path, folder: Path, *callbacks, devices: int = 1, ckpt_path: str | None = None, **options):
    """Train and validate, averaging; losses of this rank, the metrics. Checkpoints and exports go to the folder."""
    task, losses = distillation(family), next((c.losses for c in callbacks if hasattr(c, "losses")), Losses())
    generation = GenerationCallback(["tiny-fd", "tiny-agreement"])
    looking = [ReconstructionCallback(), GuidanceSweep([1.0, 3.0]), generation, SegmentLosses()]
    watching = [losses, *callbacks, *looking, ExponentialAverage(0.5)]
    trainer = trainer_for(
        folder,
        devices=devices,
        **{"max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None, **options},
        callbacks=[*watching, ExportWeights(), RunCheckpoint()],
        enable_checkpointing=True,
    )
    data = SceneDataModule(batch_size=BATCH // devices, val_count=4, val_batch_size=4 // devices)
    trainer.fit(task, datamodule=data, ckpt_path=ckpt_path)
    return losses.values, dict(trainer.callback_metrics)


def worker(rank: int, family: Path, folder: Path, strategy: str, last_step: int | None = None) -> None:
    """Train as a rank: until the second one is interrupted, or go on to the last step."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where tests run in the background
    options = {"devices": 2, "strategy": "ddp" if strategy == "ddp" else ShardedStrategy()}
    if last_step is None:
        train(family, folder, InterruptSecondRank(folder, Losses()), max_steps=100, **options)
    else:
        train(family, folder, max_steps=last_step, ckpt_path="last", **options)
