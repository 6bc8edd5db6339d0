"""Compiled networks."""

from __future__ import annotations

import lightning

from icd_lightning.models.diffusion_model import compile_networks
from icd_lightning.tasks.sharding import ShardedStrategy


class CompileNetworks(lightning.Callback):
    """Run the networks through torch.compile; where it does not work, say why and train without.

    The first steps take minutes. Put it before callbacks that use the networks.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Compile before DDP wraps the task; refuse networks that are spread over devices."""
        if isinstance(trainer.strategy, ShardedStrategy):
            raise ValueError("CompileNetworks and ShardedStrategy do not go together: leave one out")
        if stage == "fit":
            networks = [model.network for model in pl_module.diffusion_models()]
            compile_networks(networks, trainer.strategy.root_device, self.backend)
