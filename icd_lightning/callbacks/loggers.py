"""Where a training's figures and pictures go: under which names, in which charts, to which loggers."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path

import lightning
import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor

from icd_lightning.evaluation.curves import read_scalars

log = logging.getLogger(__name__)

PLAIN, GUIDED, SWEPT = "reconstruction/{}", "reconstruction_guided/{}", "guidance_sweep/{{}}_w{:g}"
GENERATED, FINAL = "generation/{}", "final/{}"
"""Names of what is measured in a validation, and in the last one."""

COMPARED = {
    "Losses": ("train/{}", "val/{}"),
    "Reconstruction": (PLAIN, GUIDED),
    "Guidance": (SWEPT,),
    "Generation": (GENERATED,),
}
CATEGORIES = {name.partition("/")[0]: category for category, names in COMPARED.items() for name in names}
"""By what stands before the / of a name. A chart compares the names of one category that are equal after it."""
OTHERS = "Training"  # the category of all else, with a chart for each beginning

Charts = dict[str, dict[str, tuple[str, list[str]]]]
"""category -> chart -> its kind, and the names of its scalars as regular expressions, as SummaryWriter takes them."""


class RunTensorBoard(TensorBoardLogger):
    """TensorBoard's log of a run, with `charts` of all that the run has logged, before a restart too.

    The tab Custom Scalars shows them. They are written at the first figures, and again when there is a new one: the
    last that are written count.
    """

    _written: Charts = {}  # noqa: RUF012  (replaced, never changed)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        self._names.update(metrics)
        if (now := charts(self._names)) != self._written:
            self.experiment.add_custom_scalars(now)
            self._written = now

    @cached_property
    def _names(self) -> set[str]:
        return set(read_scalars(Path(self.log_dir)))


def charts(names: Iterable[str]) -> Charts:
    """Put scalars into charts: train/reverse_cd with val/reverse_cd, guidance_sweep/psnr_w1 with those of other w.

    Names without a / are left out, and the last values, which are in HPARAMS.
    """
    found: Charts = {category: {} for category in (*COMPARED, OTHERS)}
    for name in sorted(names):
        place, slash, rest = name.partition("/")
        if not slash or FINAL.startswith(f"{place}/"):
            continue
        category = CATEGORIES.get(place, OTHERS)
        title = place if category == OTHERS else re.sub(r"_w[\d.]+$", "", rest)
        found[category].setdefault(title, ("Multiline", []))[1].append(f"{re.escape(name)}$")
    return {category: of for category, of in found.items() if of}


def log_picture(trainer: lightning.Trainer, name: str, draw: Callable[[], NDArray[np.uint8]]) -> None:
    """Give the picture (H, W, 3) that `draw` makes to every logger that takes pictures, on rank 0."""
    if not trainer.is_global_zero:
        return
    picture = None
    for logger in trainer.loggers:
        if not isinstance(logger, (TensorBoardLogger, WandbLogger)):
            _say_once(type(logger))
            continue
        picture = draw() if picture is None else picture
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [picture], trainer.global_step)
        else:
            logger.experiment.add_image(name, picture, trainer.global_step, dataformats="HWC")


@cache
def _say_once(kind: type[Logger]) -> None:
    log.info("%s takes no pictures: TensorBoard and Weights & Biases do (docs/loggers.md)", kind.__name__)
