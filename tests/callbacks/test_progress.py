import logging
import re
import time

import lightning
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from toy_case import Toy, toy_loader
from training_case import trainer_for

from icd_lightning.callbacks.progress import TrainingProgress, _clock
from icd_lightning.evaluation.curves import read_scalars

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


def test_a_log_gets_lines_with_loss_images_a_second_and_time_left(tmp_path, caplog):
    caplog.set_level(logging.INFO, "icd_lightning")
    progress = TrainingProgress(every_seconds=0)
    trainer_for(tmp_path, max_steps=3, callbacks=[progress], enable_progress_bar=True).fit(Toy(), toy_loader())
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("icd_lightning")]
    assert len(lines) == 3
    for step, line in enumerate(lines, 1):
        assert re.fullmatch(rf"step {step}/3  train/loss \S+  images/s \S+  left \d+:\d\d:\d\d", line), line
    assert lines[-1].endswith("left 0:00:00")


def test_lines_keep_their_distance(tmp_path, caplog):
    caplog.set_level(logging.INFO, "icd_lightning")
    progress = TrainingProgress(every_seconds=3600)
    trainer_for(tmp_path, max_steps=5, callbacks=[progress], enable_progress_bar=True).fit(Toy(), toy_loader())
    assert sum(record.name.startswith("icd_lightning") for record in caplog.records) == 1


def test_images_a_second_are_logged(tmp_path):
    options = {"max_steps": 3, "log_every_n_steps": 1, "callbacks": [TrainingProgress()], "enable_progress_bar": True}
    start = time.monotonic()
    trainer_for(tmp_path, logger=TensorBoardLogger(tmp_path, "", ""), **options).fit(Toy(), toy_loader())
    steps, rates = read_scalars(tmp_path)["throughput/images_per_second"]
    assert len(steps) == 3
    images = sum(len(batch.captions) for batch, _ in zip(toy_loader(), range(3), strict=False))
    assert rates[-1] > images / (time.monotonic() - start)


def test_throughput_counts_from_where_a_run_went_on(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = TrainingProgress()
    progress._restart(50, 100)
    progress._images = 80
    now[0] += 20
    assert progress._rate() == 4.0
    assert progress._seconds_left(60) == 80.0
    progress._validating = 20.0
    now[0] += 20
    assert progress._rate() == 4.0
    assert progress._seconds_left(60) == 160.0


def test_a_validation_takes_no_time_from_images_a_second(tmp_path):
    class Slow(lightning.Callback):
        def on_validation_batch_end(self, *_) -> None:
            time.sleep(0.2)

    progress = TrainingProgress()
    options = {"max_steps": 2, "val_check_interval": 1, "limit_val_batches": 1, "enable_progress_bar": True}
    trainer_for(tmp_path, callbacks=[progress, Slow()], **options).fit(Toy(), toy_loader(), toy_loader())
    assert progress._validating >= 0.4


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00:00"), (59.6, "0:01:00"), (130_000, "36:06:40"), (float("inf"), "for ever")]
)
def test_time_left_can_be_longer_than_a_day(seconds, shown):
    assert _clock(seconds) == shown
