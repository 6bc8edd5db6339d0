"""A training that draws from the global random streams, as one with dropout or with NumPy's would."""

import random

import numpy as np
import torch
from training_case import FEW, distillation, scenes_data, student_weights, trainer_for

from icd_lightning.tasks.invertible_consistency import InvertibleConsistencyDistillation


class Drawing(InvertibleConsistencyDistillation):
    """Keeps what it drew in each step from every stream, and how the students stood."""

    def training_step(self, batch, batch_idx):
        self.drawn.append((torch.rand(1).item(), float(np.random.rand()), random.random()))
        trainable = [parameter.requires_grad for parameter in self.parameters()]
        self.stood.append((self.students.active, trainable, [module.training for module in self.modules()]))
        return super().training_step(batch, batch_idx)


def train(family, scenes, held_out, folder, *callbacks, **options):
    """Three steps; what was drawn and how the students stood in each, and the weights."""
    task = distillation(family, students=FEW)
    task.__class__, task.drawn, task.stood = Drawing, [], []
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(7)
    data = scenes_data(scenes, val_urls=str(held_out), val_batch_size=3)
    settings = {"max_steps": 3, "check_val_every_n_epoch": None, "callbacks": list(callbacks), **options}
    trainer_for(folder, **settings).fit(task, datamodule=data)
    return task.drawn, task.stood, student_weights(task)
