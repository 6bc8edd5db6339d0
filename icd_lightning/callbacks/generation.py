"""What the reverse student makes of drawn noise, looked at during training."""

from __future__ import annotations

from collections.abc import Sequence

import lightning

from icd_lightning.callbacks.evaluation import StudentEvaluation, pipeline_of
from icd_lightning.callbacks.loggers import GENERATED
from icd_lightning.data.batch import Batch
from icd_lightning.editing.method import UNGUIDED, seeded_noise


class GenerationCallback(StudentEvaluation):
    """Generate from validation captions as the task decodes; log `generation/<metric>` over all ranks, and a grid.

    Args:
        metrics: names of metrics.registry that make sense of new pictures: those that read captions (clip-t,
            image-reward, tiny-agreement) and distances to the distribution of the validation pictures (fid, tiny-fd).
        num_images: pictures of each rank to generate in a validation; distances between distributions want many.
        grid_columns: pictures in a row of the grid.
    """

    def __init__(self, metrics: Sequence[str], *, num_images: int = 64, grid_columns: int = 8) -> None:
        super().__init__(metrics, (GENERATED,), num_images, grid_columns)

    def look(self, trainer: lightning.Trainer, task, batch: Batch, *, seeds: list[int], draw: bool) -> None:
        pipeline = pipeline_of(task)
        shape = pipeline.latent_shape(len(batch.captions), *batch.images.shape[-2:])
        noise = seeded_noise(shape, seeds, batch.images.device)
        result = pipeline.generate(batch.captions, noise, guidance=task.decoding)
        self.measure(GENERATED, result, batch, noise)
        if draw:
            unguided = pipeline.generate(batch.captions, noise, guidance=UNGUIDED)
            rows = {"w 1": unguided, f"w {task.decoding.guidance_scale:g}": result}
            self.draw(trainer, "pictures/samples", rows, batch.captions)
