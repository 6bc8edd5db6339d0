"""Trainings by the real command, killed at random moments, against unbroken ones."""

import os
import signal
import time

import pytest
from kills_case import STEPS, differences, fit_command, kill_in_training, killed_runs, last_checkpoint, run, start
from training_case import write_scenes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.mark.parametrize(("devices", "kills"), [(1, 20), (2, 5)])
def test_killed_and_resumed_runs_end_bit_equal_to_an_unbroken_one(tmp_path, scenes, devices, kills, measured):
    elsewhere = tmp_path / "temporary"
    elsewhere.mkdir()
    run(fit_command(tmp_path / "whole", scenes, devices))
    whole, broken = last_checkpoint(tmp_path / "whole"), []
    for folder in killed_runs(tmp_path, scenes, kills=kills, devices=devices):
        broken.append(folder)
        assert differences(last_checkpoint(folder), whole) == []
        assert sorted(file.name for file in (folder / "checkpoints").iterdir()) == ["before-last.ckpt", "last.ckpt"]
    measured(
        f"kill -9 of all processes at random moments of a training, {devices} process{'es' * (devices > 1)}",
        f"{kills} kills, {len(broken)} runs of {STEPS} steps, each bit-equal to the unbroken run",
    )


def test_sigterm_saves_and_exits_with_143(tmp_path, scenes, measured):
    command = fit_command(tmp_path, scenes)
    assert kill_in_training(command, 1.0, signal.SIGTERM) == 128 + signal.SIGTERM
    reached = last_checkpoint(tmp_path)["global_step"]
    assert 0 < reached < STEPS
    assert (
        f"after step {reached}" in "".join(run(command).splitlines())
        or last_checkpoint(tmp_path)["global_step"] == STEPS
    )
    measured("SIGTERM in a training", f"saved after its step ({reached} of {STEPS}), exit code 143")


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
