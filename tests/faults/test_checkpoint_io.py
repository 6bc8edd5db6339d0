"""Checkpoints through kills and full disks, on a file system that the temporary folder is not on."""

import os
import random
import resource
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_case import PROCESSES

from icd_lightning.callbacks.checkpoint_io import WholeCheckpointIO, before
from icd_lightning.models.weights import read_pickled


def write_on(place: Path, temporary: Path, written: Any) -> None:
    tempfile.tempdir = str(temporary)
    for step in count(1):
        checkpoint = {"step": step, "weights": torch.full((1 << 20,), float(step))}
        WholeCheckpointIO().save_checkpoint(checkpoint, place)
        written.send(step)


@pytest.fixture
def elsewhere():
    """A folder on another file system than the temporary files, where this machine has one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


def load(file: Path) -> dict:
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint["weights"].unique().tolist() == [checkpoint["step"]]
    return checkpoint


def test_a_killed_writer_leaves_whole_checkpoints_and_no_rubbish_after_the_next(elsewhere, tmp_path):
    place, moments = elsewhere / "last.ckpt", random.Random(0)
    for _ in range(5):
        reader, writer = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=write_on, args=(place, tmp_path, writer))
        process.start()
        step = max(reader.recv() for _ in range(2))
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert load(place)["step"] >= step
        assert load(before(place))["step"] >= step - 1
    WholeCheckpointIO().save_checkpoint({"step": 0, "weights": torch.zeros(1)}, place)
    assert {file.name for file in elsewhere.iterdir()} == {"last.ckpt", "before-last.ckpt"}
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_before_is_kept(tmp_path):
    place = tmp_path / "last.ckpt"
    for step in (1, 2, 3):
        WholeCheckpointIO().save_checkpoint({"step": step, "weights": torch.full((4,), float(step))}, place)
    assert (load(before(place))["step"], load(place)["step"]) == (2, 3)


def test_without_hard_links_the_checkpoint_before_is_kept_too(tmp_path, monkeypatch):
    def refuse(*_) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    test_the_checkpoint_before_is_kept(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint_and_is_told_of_with_a_remedy(tmp_path):
    place, checkpoint = tmp_path / "last.ckpt", {"step": 1, "weights": torch.ones(1 << 16)}
    WholeCheckpointIO().save_checkpoint(checkpoint, place)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last\.ckpt cannot be written \(.+\); .* is as it was: make room"):
            WholeCheckpointIO().save_checkpoint({"step": 2, "weights": torch.ones(1 << 16)}, place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load(place)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_damaged_file_is_read_or_refused_with_a_reason(tmp_path):
    """Whatever byte is wrong: unpickling ends in errors of many classes, some without a word."""
    place = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(50, 50)}, "loops": {"epoch": 3}}, place)
    whole, rng = place.read_bytes(), random.Random(0)
    refused = []
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 5, 20))):
            damaged[rng.choice((rng.randrange(1000), -rng.randrange(1, 1000)))] = rng.randrange(256)
        place.write_bytes(damaged)
        try:
            read_pickled(place)
        except ValueError as error:
            refused.append(error)
    assert all(map(str, refused))
    assert len({type(error.__cause__) for error in refused}) > 2
