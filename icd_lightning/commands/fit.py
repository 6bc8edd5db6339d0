"""`icd fit | validate | test`: LightningCLI over conf/."""

from __future__ import annotations

import logging
import signal
import warnings

import lightning
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from icd_lightning.commands.parsing import OneLineErrors
from icd_lightning.tasks.base import Task

NOT_NEWS = (
    ".*does not have many workers.*",
    ".*LightningCLI's args parameter is intended to run from within Python.*",
    ".*there is no last checkpoint available.*",  # a first run has none; a resumed one says which it takes
    ".*exists and is not empty.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*The `srun` command is available.*",
    r".*module\(s\) in eval mode at the start of training.*",  # frozen networks
    ".*infer the `batch_size` from an ambiguous collection.*",  # it takes the pictures', which is right
    ".*is smaller than the logging interval.*",  # which counts steps, not batches of an epoch
    ".*Total length of `list` across ranks is zero.*",  # no val_urls
)

INTERRUPTED = 128 + signal.SIGINT


class FitParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with our errors."""


class FitCommand(LightningCLI):
    """LightningCLI over a Task and a LightningDataModule, both named by the configuration."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            model_class=Task,
            datamodule_class=lightning.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_class=FitParser,
            parser_kwargs={"prog": "icd"},
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of LightningCLI that make sense here."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what the trainer's signature lacks."""
        parser.add_argument(
            "--float32_matmul_precision",
            choices=("highest", "high", "medium"),
            default="high",
            help="'high' lets a GPU use TF32 in float32 matrix products",
        )

    def before_instantiate_classes(self) -> None:
        """Set what must be set before any network exists."""
        torch.set_float32_matmul_precision(self.config[self.config.subcommand].float32_matmul_precision)

    def instantiate_trainer(self, **kwargs) -> lightning.Trainer:
        """Log to `trainer.default_root_dir` itself, so that a run has one folder and starting again finds it."""
        if self._get(self.config_init, "trainer.logger") in (None, True):
            root = self._get(self.config_init, "trainer.default_root_dir") or "outputs/run"
            kwargs["logger"] = TensorBoardLogger(root, name="", version="")
        return super().instantiate_trainer(**kwargs)


def run(args: list[str]) -> None:
    """Compose the configuration, build trainer, task and data, and call the trainer."""
    for message in NOT_NEWS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning").handlers.clear()  # it would say once more, on a console, what the root logger says
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)
    try:
        FitCommand(args)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except SystemExit as end:
        raise SystemExit(INTERRUPTED if end.code == 1 else end.code) from None  # Lightning's 1 means Ctrl-C alone


def _is_news(record: logging.LogRecord) -> bool:
    """Tips and advertisements are not, nor what RunCheckpoint says better."""
    message = record.getMessage()
    return not any(
        word in message for word in ("Tip", "litlogger", "TPU available", "HPU available", "KeyboardInterrupt")
    )
