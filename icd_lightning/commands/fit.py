"""`icd fit | validate | test`: LightningCLI over conf/."""

from __future__ import annotations

import inspect
import logging
import math
import os
import re
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

import lightning
import torch
from huggingface_hub.utils import WeakFileLock
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from icd_lightning.callbacks.checkpoint_io import before
from icd_lightning.callbacks.loggers import RunTensorBoard
from icd_lightning.commands.main import fail
from icd_lightning.files import read_yaml
from icd_lightning.models.weights import first_line, read_pickled
from icd_lightning.tasks.base import Task
from icd_lightning.trust import REMEDY, packages

log = logging.getLogger(__name__)

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
NOT_NEWS_EITHER = ("Tip", "litlogger", "TPU available", "HPU available", "KeyboardInterrupt", "Seed set to")
"""Of warnings, and of what Lightning logs."""

KEPT = {"pytorch-lightning_version": str, "state_dict": dict, "epoch": int, "global_step": int, "loops": dict}
TOLD = {"optimizer_states": list, "lr_schedulers": list, "callbacks": dict, "recipe": dict, "optimizer_settings": dict}
"""What every checkpoint holds, and what it may hold besides."""

INTERRUPTED = 128 + signal.SIGINT

PATIENCE = 15.0
"""Seconds to wait for another run's end: of one that was killed, data workers live on for some."""

MOVED = {  # keys of stage 2's model.init_args before students and losses were parts of their own, and what they are now
    "lora": "students.init_args.lora",
    "gradient_checkpointing": "students.init_args.gradient_checkpointing",
    "reverse_weights": "students.init_args.reverse",
    "forward_weights": "students.init_args.forward",
    "huber_c": "losses.<name>.init_args.huber_c, of each loss",
    "train": "losses.<name>, null for each loss of the student that is not to be trained",
    "allow_off_grid": "boundaries.allow_off_grid",
}
MOVED_KEY = re.compile(rf"(?:Option '|arguments: --)({'|'.join(MOVED)})(?:[.'= ]|$)")
ENDS_ALONE = "arguments are required: boundaries.boundary_timesteps"
WEIGHT_ALONE = re.compile(r'"losses\.(\w+)".*Given value: ([\d.eE+-]+)$', re.DOTALL)
LACKING = re.compile(r"class_path '([\w.]+)':\s+Requirement '([^']+)' not met")
NO_LOSS = re.compile(r"(--model\.init_args\.losses)\.(\w+)[=\0]null(?=\0|$)")


class FitParser(LightningArgumentParser):
    """LightningCLI's parser with errors of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if moved := MOVED_KEY.search(message):
            key = moved[1]
            message = f"model.init_args.{key} is not accepted: in stage 2 it is model.init_args.{MOVED[key]}"
        elif ENDS_ALONE in message:
            message = (
                "model.init_args.boundaries is no list: the ends are model.init_args.boundaries.boundary_timesteps"
            )
        elif weight := WEIGHT_ALONE.search(message):
            key = f"model.init_args.losses.{weight[1]}"
            message = f"{key} is no number {weight[2]}: its weight is {key}.init_args.weight, and null leaves it out"
        elif denied := re.search(r"Importing '([^']+)' is not allowed", message):
            message = f"the configuration names {denied[1]}, which is not of {', '.join(packages())}: {REMEDY}"
        fail(message)


class FitCommand(LightningCLI):
    """LightningCLI over a Task and a LightningDataModule, both named by the configuration.

    held: what is let go when the command has ended, however it does.
    """

    def __init__(self, args: list[str], held: ExitStack | None = None) -> None:
        self.held = held or ExitStack()
        super().__init__(
            model_class=Task,
            datamodule_class=lightning.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_class=FitParser,
            parser_kwargs={"prog": "icd"},
            # of a key so deep jsonargparse would hand on null as the text None
            args=NO_LOSS.sub(r"\1={\2: null}", "\0".join(args)).split("\0"),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        known = LightningCLI.subcommands()
        return {name: known[name] for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--float32_matmul_precision",
            choices=("highest", "high", "medium"),
            default="high",
            help="'high' lets a GPU use TF32 in float32 matrix products",
        )
        parser.add_argument(
            "--global_batch_size",
            type=PositiveInt | None,
            default=None,
            help="samples of one optimizer step, on all devices together: sets trainer.accumulate_grad_batches, "
            "and lets trainer.val_check_interval count optimizer steps",
        )

    def before_instantiate_classes(self) -> None:
        """Set what must be set before any network exists; refuse parts that are null, for want of a line below them."""
        if null := next(nulls(self.config[self.config.subcommand]), None):
            raise ValueError(f"{null} is null: leave it out for what is usual, or give what belongs to it")
        torch.set_float32_matmul_precision(self.config[self.config.subcommand].float32_matmul_precision)

    def _parse_ckpt_path(self) -> None:
        """Lightning would take settings from the checkpoint; ours hold none, and a damaged one is told of below."""

    def instantiate_classes(self) -> None:
        """Build trainer, task and data; say what to install for a part that needs it, such as a logger."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if (lacking := LACKING.search(str(error))) is None:
                raise
            name, package = lacking.groups()
            raise ValueError(f"{name} needs a package that is not here: pip install '{package}'") from error

    def before_validate(self) -> None:
        """Refuse to measure untrained students for want of a checkpoint."""
        if self._checkpoint() is None and self._get(self.config, "ckpt_path") == "last":
            raise ValueError(
                f"there is no checkpoint in {self.trainer.default_root_dir}: name the run's folder by "
                "trainer.default_root_dir; ckpt_path null measures what has not been trained"
            )

    before_test = before_validate

    def before_fit(self) -> None:
        """Refuse what cannot go on or together before anything is written; accumulate up to the global batch size."""
        root = Path(self.trainer.default_root_dir)
        check_room(root, self.model)
        if (checkpoint := self._checkpoint()) is not None:
            self.model.check_recipe(checkpoint)
        self.model.check_strategy(self.trainer.strategy)
        if (total := self._get(self.config, "global_batch_size")) is not None:
            self._accumulate(total)
        if self.trainer.is_global_zero:
            self.held.enter_context(alone(root))

    def _checkpoint(self) -> dict | None:
        """What ckpt_path names, if it is there, its tensors not yet read; the last is where RunCheckpoint keeps it."""
        named = self._get(self.config, "ckpt_path")
        if "://" in str(named):
            raise ValueError(f"ckpt_path {named} is not on this machine: copy it here, from where you trust it")
        file = Path(self.trainer.default_root_dir) / "checkpoints/last.ckpt" if named == "last" else Path(named or "")
        kept = before(file)
        if not file.is_file():
            if named and file.exists():
                raise ValueError(f"{file} is no file: name another ckpt_path, or take it away to begin anew")
            if named == "last" and kept.is_file():
                raise ValueError(
                    f"{file} is gone, {kept} is the one before: rename it to go on, or remove it to begin anew"
                )
            return None
        try:
            checkpoint = read_pickled(file)
            held = {key: checkpoint.get(key, None if key in KEPT else kind()) for key, kind in (KEPT | TOLD).items()}
            if wrong := [key for key, kind in (KEPT | TOLD).items() if not isinstance(held[key], kind)]:
                raise ValueError(f"{wrong[0]} {'is of another type' if wrong[0] in checkpoint else 'is missing'}")
            if checkpoint.get("optimizer_states") == []:
                raise ValueError("optimizer_states is empty")
            return checkpoint
        except (ValueError, AttributeError) as error:
            another = f" ({kept} is the one before)" if kept.is_file() else ""
            raise ValueError(
                f"{file} cannot be read as a checkpoint ({error}): name another ckpt_path{another}, or take it away, "
                "and what lies beside it, to begin anew"
            ) from error

    def _accumulate(self, total: int) -> None:
        trainer, batch_size = self.trainer, self._get(self.config, "data.init_args.batch_size")
        devices = trainer.num_devices * trainer.num_nodes
        if batch_size is None:
            raise ValueError(
                f"global_batch_size {total} needs data.init_args.batch_size: give it, or leave out the first"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"global_batch_size {total} sets trainer.accumulate_grad_batches, which is given as well "
                f"({trainer.accumulate_grad_batches}): leave out one of them"
            )
        trainer.accumulate_grad_batches = micro_batches(total, batch_size, devices)
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_interval *= trainer.accumulate_grad_batches
        if trainer.is_global_zero:
            shown = (total, batch_size, devices, trainer.accumulate_grad_batches)
            log.info("global batch %d = %d samples x %d devices x %d accumulated micro-batches", *shown)

    def instantiate_trainer(self, **kwargs) -> lightning.Trainer:
        """Log to `trainer.default_root_dir` itself, so that a run has one folder and starting again finds it.

        Other loggers come second, for Lightning keeps checkpoints where the first one writes.
        """
        given = self._get(self.config_init, "trainer.logger")
        others = [] if given in (None, True) else given if isinstance(given, list) else [given]
        if given is not False and not any(isinstance(one, TensorBoardLogger) for one in others):
            root = self._get(self.config_init, "trainer.default_root_dir") or "outputs/run"
            kwargs["logger"] = [RunTensorBoard(root, name="", version=""), *others]
        callbacks = self._get(self.config_init, "trainer.callbacks")
        for switch, kind in (("enable_progress_bar", ProgressBar), ("enable_checkpointing", Checkpoint)):
            if isinstance(callbacks, list) and self._get(self.config_init, f"trainer.{switch}") is False:
                kwargs["callbacks"] = callbacks = [one for one in callbacks if not isinstance(one, kind)]
        for name in ("accumulate_grad_batches", "val_check_interval"):
            value = self._get(self.config_init, f"trainer.{name}")
            if isinstance(value, (int, float)) and not value > 0:
                raise ValueError(f"trainer.{name} {value} must be more than 0")
        clip = self._get(self.config_init, "trainer.gradient_clip_val")
        if isinstance(clip, float) and not 0 <= clip < math.inf:
            raise ValueError(f"trainer.gradient_clip_val {clip} must be 0 or more, and finite")
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except TypeError as error:
            raise ValueError(f"trainer: {error}") from error
        trainer._checkpoint_connector = _Restoring(trainer)
        return trainer


class _Restoring(_CheckpointConnector):
    """What gives a run its checkpoint back; Lightning has no hook around that, whose errors are of any class."""

    def _restore_modules_and_callbacks(self, *args: Any) -> None:
        with _going_on():
            super()._restore_modules_and_callbacks(*args)

    def restore_training_state(self) -> None:
        with _going_on():
            super().restore_training_state()


@contextmanager
def _going_on() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"this run cannot go on from its checkpoint ({first_line(error)}): name another ckpt_path, such as the "
            "before-last.ckpt beside it, or give ckpt_path null to begin anew"
        ) from error


def nulls(config: Namespace, prefix: str = "") -> Iterator[str]:
    """Keys of parts that are null and may not be, by the signature of this package that they are an argument of."""
    if "trainer" in config and config.trainer is None:
        yield f"{prefix}trainer"
    if "init_args" in config and config.class_path.startswith("icd_lightning."):  # others take what they do not say
        taken = inspect.signature(resolve_name(config.class_path)).parameters
        for name in (name for name, value in vars(config.init_args).items() if value is None and name in taken):
            if taken[name].default is not None and not re.search("None|Optional|Any", str(taken[name].annotation)):
                yield f"{prefix}init_args.{name}"
    for name, value in vars(config).items():
        if isinstance(value, Namespace):
            yield from nulls(value, f"{prefix}{name}.")


def check_room(root: Path, task: torch.nn.Module) -> None:
    """OSError if a run cannot write to its folder, or its checkpoints find no room there."""
    remedy = "give another trainer.default_root_dir"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {root} ({error.strerror}): {remedy}") from error
    if (config := root / "config.yaml").exists() and not config.is_file():
        raise OSError(f"{config} is no file, and a run keeps its configuration there: {remedy}")
    trained = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    # weights and AdamW's two averages, in the last file, the one before it, and the one being written
    needed, free = 3 * 3 * 4 * trained, shutil.disk_usage(root).free
    if free < needed:
        raise OSError(f"{root} has {free >> 20:,} MB free, checkpoints need {needed >> 20:,}: make room, or {remedy}")


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Keep other runs out of this folder, where each would replace the other's checkpoints; OSError if there is one."""
    with ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(root / ".lock", timeout=PATIENCE))
        except TimeoutError as error:
            raise OSError(
                f"another run trains into {root}: wait for its end, or give another trainer.default_root_dir"
            ) from error
        yield


def micro_batches(global_batch_size: int, batch_size: int, devices: int) -> int:
    """How many micro-batches of this size each device accumulates for one optimizer step; ValueError for no number."""
    if global_batch_size % (batch_size * devices) == 0:
        return global_batch_size // (batch_size * devices)
    fitting = [b for b in range(1, global_batch_size // devices + 1) if global_batch_size % (b * devices) == 0]
    nearest = min(fitting, key=lambda size: abs(size - batch_size), default=None)
    remedy = f"take data.init_args.batch_size {nearest}" if nearest else "take fewer devices"
    raise ValueError(
        f"global_batch_size {global_batch_size} is not a multiple of {batch_size * devices} "
        f"(batch_size {batch_size} x {devices} devices): {remedy}, or another global_batch_size"
    )


def conf_files(conf: str, names: Iterable[str]) -> list[Path]:
    """Configuration files by their names in the folder `conf`; FileNotFoundError if one is not there."""
    files = [Path(conf) / f"{name}.yaml" for name in names]
    if missing := next((file for file in files if not file.is_file()), None):
        raise FileNotFoundError(f"no configuration {missing}: run this in the repository, or name its conf/ by --conf")
    return files


def train(files: Iterable[Path], options: Mapping[str, object]) -> None:
    """`icd fit` by configuration files, with options in the place of what they say."""
    overlays = [word for file in files for word in ("--config", str(file))]
    run(["fit", *overlays, *(f"--{key}={value}" for key, value in options.items())])


def run(args: list[str]) -> None:
    """Compose the configuration, build trainer, task and data, and call the trainer."""
    for message in NOT_NEWS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning").handlers.clear()  # it would say once more, on a console, what the root logger says
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda one: not any(words in one.getMessage() for words in NOT_NEWS_EITHER))
    for option, word in pairwise(["", *args]):
        name, _, value = word.partition("=")
        file = Path(value or word)
        if (file.suffix in (".yaml", ".yml") or "--config" in (option, name)) and os.path.exists(file):
            read_yaml(file)  # its size and depth: jsonargparse reads files of any, and pipes in which nothing comes
    try:
        with ExitStack() as held:
            FitCommand(args, held)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except SystemExit as end:
        raise SystemExit(INTERRUPTED if end.code == 1 else end.code) from None  # Lightning's 1 means Ctrl-C alone
