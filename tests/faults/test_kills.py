"""Trainings by the real command, killed at random moments, against unbroken ones."""

import os
import signal
import time
from collections.abc import Callable
from functools import cache

import pytest
from kills_case import STEPS, differences, fit_command, kill_in_training, killed_runs, last_checkpoint, run, start
from training_case import write_scenes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def unbroken(scenes, tmp_path_factory) -> Callable[[int], dict]:
    """The last checkpoint of a run that nothing disturbs, by its number of processes."""

    @cache
    def train(devices: int) -> dict:
        folder = tmp_path_factory.mktemp("unbroken")
        run(fit_command(folder, scenes, devices))
        return last_checkpoint(folder)

    return train


@pytest.mark.parametrize(("devices", "kills"), [(1, 20), (2, 5)])
def test_killed_and_resumed_runs_end_bit_equal_to_an_unbroken_one(tmp_path, scenes, unbroken, devices, kills, measured):
    runs = 0
    for folder in killed_runs(tmp_path, scenes, kills=kills, devices=devices):
        runs += 1
        assert differences(last_checkpoint(folder), unbroken(devices)) == []
        assert sorted(file.name for file in (folder / "checkpoints").iterdir()) == ["before-last.ckpt", "last.ckpt"]
    measured(
        f"kill -9 of all processes at random moments of a training, {devices} process{'es' * (devices > 1)}",
        f"{kills} kills in {runs} runs of {STEPS} steps, each of which ended bit-equal to the unbroken run",
    )


def test_sigterm_saves_exits_with_143_and_the_run_goes_on_as_if_unbroken(tmp_path, scenes, unbroken, measured):
    command = fit_command(tmp_path, scenes)
    assert kill_in_training(command, 1.0, signal.SIGTERM) == 128 + signal.SIGTERM
    reached = last_checkpoint(tmp_path)["global_step"]
    assert 0 < reached < STEPS
    run(command)
    assert differences(last_checkpoint(tmp_path), unbroken(1)) == []
    measured("SIGTERM in a training", f"saved after step {reached} of {STEPS}, exit code 143; went on bit-equal")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other(tmp_path, scenes, rank, measured):
    process = start(fit_command(tmp_path, scenes, devices=2))
    for line in process.stderr:
        if line.startswith("step "):
            break
    ranks = [process.pid, int(os.popen(f"pgrep -P {process.pid} -f trainer.devices").read().split()[0])]
    os.kill(ranks[rank], signal.SIGKILL)
    began = time.monotonic()
    process.communicate(timeout=60)
    while os.popen(f"pgrep -g {process.pid}").read() and time.monotonic() - began < 60:
        time.sleep(0.2)
    seconds = time.monotonic() - began
    assert process.returncode
    assert seconds < 60
    measured(f"kill -9 of rank {rank} of two", f"the other ended {seconds:.0f} s later")
