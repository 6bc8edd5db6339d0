"""Where a training's figures go: TensorBoard's charts of them, Weights & Biases, loggers that take no pictures."""

import logging
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_utilities.core.imports import RequirementCache
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from toy_case import Toy, toy_loader
from training_case import FEW, distillation, scenes_data, trainer_for, write_scenes

from icd_lightning.callbacks.data import DataReport
from icd_lightning.callbacks.generation import GenerationCallback
from icd_lightning.callbacks.hparams import FinalMetrics
from icd_lightning.callbacks.loggers import RunTensorBoard, charts, log_picture
from icd_lightning.callbacks.progress import TrainingProgress
from icd_lightning.callbacks.reconstruction import GuidanceSweep, ReconstructionCallback
from icd_lightning.callbacks.segments import SegmentLosses
from icd_lightning.commands.main import main
from icd_lightning.evaluation.curves import read_scalars

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")

ROOT = Path(__file__).parents[2]
WATCHING = {"max_steps": 2, "val_check_interval": 1, "check_val_every_n_epoch": None, "log_every_n_steps": 1}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("held_out"), 4, seed=9)


def layouts(folder: Path) -> list[dict[str, dict[str, list[str]]]]:
    """Every layout in a run's event files, in the order in which it was written: category -> chart -> what it shows."""
    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file)).Reload()
        if "custom_scalars__config__" in events.Tags()["tensors"]:
            written = [event.tensor_proto.string_val[0] for event in events.Tensors("custom_scalars__config__")]
            found += [Layout.FromString(text) for text in written]
    return [
        {one.title: {chart.title: list(chart.multiline.tag) for chart in one.chart} for one in layout.category}
        for layout in found
    ]


def shown(patterns: list[str], names) -> list[str]:
    """The scalars that TensorBoard draws in a chart."""
    return [name for name in names if any(re.match(pattern, name) for pattern in patterns)]


@pytest.fixture(scope="module")
def watched(random_family, scenes, held_out, tmp_path_factory) -> Path:
    """The folder of a run with every callback that logs."""
    folder = tmp_path_factory.mktemp("watched")
    callbacks = [
        TrainingProgress(),
        ReconstructionCallback(["psnr"], num_images=2),
        GuidanceSweep([1, 1.5], num_images=2),
        GenerationCallback(["tiny-agreement"], num_images=2),
        SegmentLosses(),
        FinalMetrics(),
        DataReport(),
    ]
    options = {**WATCHING, "callbacks": callbacks, "enable_progress_bar": True}
    data = scenes_data(scenes, val_urls=str(held_out), val_batch_size=4)
    logger = RunTensorBoard(folder, name="", version="")
    trainer_for(folder, logger=logger, **options).fit(distillation(random_family, students=FEW), datamodule=data)
    return folder


def test_the_charts_draw_every_scalar_of_the_run_once(watched):
    scalars, layout = read_scalars(watched), layouts(watched)[-1]
    every = [pattern for of in layout.values() for patterns in of.values() for pattern in patterns]
    assert all(len(shown([pattern], scalars)) == 1 for pattern in every)
    drawn = shown(every, scalars)
    assert len(drawn) == len(every)
    assert all(name in ("epoch", "hp_metric") or name.startswith("final/") for name in scalars if name not in drawn)


def test_the_charts_compare_what_belongs_together(watched):
    layout, scalars = layouts(watched)[-1], read_scalars(watched)
    named = {title: {chart: shown(tags, scalars) for chart, tags in of.items()} for title, of in layout.items()}
    assert list(layout) == ["Losses", "Reconstruction", "Guidance", "Generation", "Training"]
    assert set(named["Losses"]["reverse_cd"]) == {"train/reverse_cd", "val/reverse_cd"}
    assert set(named["Reconstruction"]["psnr"]) == {"reconstruction/psnr", "reconstruction_guided/psnr"}
    assert set(named["Guidance"]["psnr"]) == {"guidance_sweep/psnr_w1", "guidance_sweep/psnr_w1.5"}
    assert named["Generation"] == {"tiny-agreement": ["generation/tiny-agreement"]}
    training = {"data", "grad_norm", "learning_rate", "throughput"}
    assert training == {chart for chart in named["Training"] if not chart.endswith("_by_segment")}
    assert set(named["Training"]["grad_norm"]) == {"grad_norm/forward", "grad_norm/reverse"}


def test_a_name_that_begins_like_another_has_a_line_of_its_own():
    (category,) = charts(["guidance_sweep/psnr_w1", "guidance_sweep/psnr_w12", "epoch", "final/val/loss"]).values()
    kind, patterns = category["psnr"]
    assert kind == "Multiline"
    assert shown(patterns[:1], ["guidance_sweep/psnr_w1", "guidance_sweep/psnr_w12"]) == ["guidance_sweep/psnr_w1"]
    assert len(patterns) == 2


def run_toy(folder: Path, *loggers, **options) -> None:
    trainer_for(folder, logger=list(loggers), **{**WATCHING, **options}).fit(Toy(), toy_loader(), toy_loader(2))


def test_a_run_that_goes_on_keeps_its_charts(tmp_path):
    """Its first steps log no validation, whose charts the last layout must have all the same."""
    log = partial(RunTensorBoard, tmp_path, name="", version="")
    run_toy(tmp_path, log())
    before = layouts(tmp_path)
    run_toy(tmp_path, log(), limit_val_batches=0)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2
    assert before[-1]["Losses"].keys() == {"loss", "part", "number"}
    assert layouts(tmp_path) == [*before, before[-1]]  # once a start, if nothing is new
    run_toy(tmp_path, log(), callbacks=[TrainingProgress()], enable_progress_bar=True)
    assert layouts(tmp_path)[-1]["Losses"].keys() == {"loss", "part", "number"}
    assert layouts(tmp_path)[-1]["Training"].keys() == before[-1]["Training"].keys() | {"throughput"}


def test_lightnings_own_log_gets_no_charts(tmp_path):
    run_toy(tmp_path, TensorBoardLogger(tmp_path, name="", version=""))
    assert read_scalars(tmp_path)
    assert layouts(tmp_path) == []


def test_a_logger_without_pictures_is_left_alone_and_told_of_once(tmp_path, caplog):
    class Figures(CSVLogger):
        """Not told of before, in this process."""

    caplog.set_level(logging.INFO, "icd_lightning")
    board, drawn = RunTensorBoard(tmp_path, name="", version=""), []

    def draw():
        drawn.append(np.full((4, 6, 3), 128, np.uint8))
        return drawn[-1]

    other = TensorBoardLogger(tmp_path / "other", name="", version="")
    for loggers in ([Figures(tmp_path)], [Figures(tmp_path), board, other]):
        log_picture(trainer_for(tmp_path, logger=loggers), "pictures/grey", draw)
    board.save()
    assert [text for text in caplog.messages if "Figures" in text] == [
        "Figures takes no pictures: TensorBoard and Weights & Biases do (docs/loggers.md)"
    ]
    assert len(drawn) == 1  # for the second trainer alone, and once
    (event,) = EventAccumulator(str(tmp_path)).Reload().Images("pictures/grey")
    assert (event.height, event.width) == (4, 6)


@pytest.fixture
def fit(random_family, scenes, held_out, tmp_path):
    """`icd fit` of two steps, logged as conf/logger/wandb.yaml says, into tmp_path / "run"."""
    files = [f"{ROOT}/conf/{name}.yaml" for name in ("base", "model/tiny", "logger/wandb")]
    settings = {
        "model.init_args.family.model": random_family,
        "model.init_args.students.init_args.lora.rank": 2,
        "data.init_args.urls": scenes,
        "data.init_args.val_urls": held_out,
        "data.init_args.batch_size": 2,
        "data.init_args.val_batch_size": 4,
        "trainer.default_root_dir": tmp_path / "run",
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.log_every_n_steps": 1,
    }
    return ["fit", *(f"--config={file}" for file in files), *(f"--{key}={value}" for key, value in settings.items())]


@pytest.mark.slow
def test_weights_and_biases_gets_figures_and_pictures_offline(fit, tmp_path, monkeypatch):
    settings = {"MODE": "offline", "DIR": tmp_path, "SILENT": "true", "CONSOLE": "off"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    import wandb

    try:
        callback = "--trainer.callbacks+=icd_lightning.callbacks.hparams.FinalMetrics"
        main([*fit, callback, "--trainer.logger.init_args.id=mine"])
    finally:
        wandb.teardown()  # which waits for what is not yet written
    (record,) = tmp_path.glob("wandb/offline-run-*/run-mine.wandb")
    held = record.read_bytes()
    names = ("train/loss", "grad_norm/forward", "reconstruction/psnr", "data/train/passed", "pictures/inversion")
    assert [name for name in (*names, "model.boundaries.boundary_timesteps") if name.encode() not in held] == []
    (picture,) = record.parent.glob("files/media/images/pictures/inversion_*.png")
    assert Image.open(picture).width > 128
    run = tmp_path / "run"  # has what it has without Weights & Biases
    assert {"config.yaml", "checkpoints", "forward", "reverse"} <= {file.name for file in run.iterdir()}
    assert "reconstruction/psnr" in read_scalars(run)
    assert layouts(run)


def test_weights_and_biases_that_is_not_installed_is_one_line(fit, capsys, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", RequirementCache("wandb>=9999"))
    with pytest.raises(SystemExit) as ended:
        main(fit)
    assert ended.value.code == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("icd: error: ")]
    needs = "lightning.pytorch.loggers.WandbLogger needs a package that is not here"
    assert line == f"icd: error: {needs}: pip install 'wandb>=9999'"
