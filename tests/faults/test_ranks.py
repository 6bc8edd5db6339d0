"""What goes wrong in one process of a spread training ends all of them, with one cause."""

from pathlib import Path

import icd_lightning  # noqa: F401 (before lightning: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import lightning
import pytest
import torch
from ranks_case import WORLD, run_ranks
from torch.distributed.tensor import DTensor
from training_case import FEW, distillation, scenes_data, trainer_for

from icd_lightning.callbacks.checkpoint import RunCheckpoint
from icd_lightning.tasks.sharding import ShardedStrategy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch"),
]


class Spoil(lightning.Callback):
    """Lets a number of the second process's share of a weight be none, after the second step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            weights = (p for p in pl_module.trained_parameters().values() if isinstance(p, DTensor))
            next(p.to_local() for p in weights if p.to_local().numel()).detach().view(-1)[0] = torch.nan


def train(rank: int, family: Path, scenes: Path, folder: Path) -> None:
    callbacks = [Spoil(), RunCheckpoint(every_n_train_steps=1)]
    strategy = {"devices": WORLD, "strategy": ShardedStrategy()}
    trainer = trainer_for(folder, max_steps=4, callbacks=callbacks, enable_checkpointing=True, **strategy)
    try:
        trainer.fit(distillation(family, students=FEW), datamodule=scenes_data(scenes))
    except ValueError as error:
        (folder / f"rank{rank}.txt").write_text(str(error))


def test_a_weight_that_is_not_finite_in_one_process_ends_both_with_its_name(random_family, scenes, tmp_path, measured):
    run_ranks(train, random_family, scenes, tmp_path)
    said = [file.read_text() for file in sorted(tmp_path.glob("rank*.txt"))]
    assert len(said) == WORLD
    assert said[0] == said[1]
    assert "is not finite after step 2, so nothing is saved" in said[0]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
    measured("a weight that is not finite in one of two processes that share all weights", "both ended with its name")
