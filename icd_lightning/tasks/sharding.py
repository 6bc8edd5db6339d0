"""FSDP2 for the tasks here: weights, gradients and optimizer states spread over the devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor
from torch.optim import Optimizer

from icd_lightning.models.sharding import assign, gather_weights, gathered, part_like


class ShardedStrategy(ModelParallelStrategy):
    """Data parallel training in which each device keeps its share of every UNet, of gradients and optimizer states.

    `Task.configure_model` spreads the weights. Checkpoints are those of a single process, of what is trained alone, and
    go on with any number of devices, spread or not. When a training has ended each process has whole weights again, so
    that exports need not know of all this.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # left to "auto", Lightning divides by nodes
        super().setup_environment()

    def setup(self, trainer: lightning.Trainer) -> None:
        # weights gathered in inference mode could not be trained on afterwards
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
            loop.inference_mode = False
        super().setup(trainer)

    # Lightning's own would gather the frozen weights too, and load without asking the task whether keys fit.

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """What is trained, whole, on the first process; all must call it."""
        assert self.lightning_module is not None
        return gathered(self.lightning_module.trained_parameters())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As of a single process, on the first one; all must call it."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return {**state, "state": {index: gathered(values) for index, values in state["state"].items()}}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Map the file into memory, once for all processes of a machine."""
        path = self.broadcast(checkpoint_path)
        return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        for name, parameter in self.lightning_module.trained_parameters().items():
            assign(parameter, checkpoint["state_dict"][name])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            saved, ours = (
                [p for g in groups for p in g["params"]] for groups in (state["param_groups"], optimizer.param_groups)
            )
            parameters = dict(zip(saved, ours, strict=True))
            spread = {
                index: {
                    k: part_like(v, parameters[index]) if v.shape == parameters[index].shape else v
                    for k, v in values.items()
                }
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": spread})

    def teardown(self) -> None:
        """Gather whole weights after a training, but not if it broke off: other processes may not come here."""
        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        if (
            trainer is not None
            and trainer.state.fn == TrainerFn.FITTING
            and trainer.state.status == TrainerStatus.RUNNING
        ):
            gather_weights(self.lightning_module)
        super().teardown()
