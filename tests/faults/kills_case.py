"""Real trainings by `icd fit` that are killed at random moments, for the tests of crash safety."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
ICD = Path(sys.executable).with_name("icd")
STEPS = 48
SAVED_EVERY = 2


def fit_command(folder: Path, scenes: Path, devices: int = 1) -> list[str]:
    """A short training of the tiny students: averaged weights, a decaying lr, validations, two readers of data."""
    callbacks = ["progress.TrainingProgress", "checkpoint.RunCheckpoint", "averaging.ExponentialAverage"]
    options = {
        "trainer.accelerator": "cpu",
        "trainer.devices": devices,
        "trainer.strategy": "auto" if devices == 1 else "ddp",
        "trainer.max_steps": STEPS,
        "trainer.val_check_interval": 5,
        "trainer.limit_val_batches": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": folder,
        "trainer.callbacks": [{"class_path": f"icd_lightning.callbacks.{name}"} for name in callbacks],
        "data.init_args.urls": scenes,
        "data.init_args.val_urls": scenes,
        "data.init_args.batch_size": 2,
        "data.init_args.val_batch_size": 2,
        "data.init_args.num_workers": 2,
        "model.init_args.students.init_args.lora.rank": 2,
    }
    options["trainer.callbacks"][1]["init_args"] = {"every_n_train_steps": SAVED_EVERY}
    written = [f"--{name}={value}" for name, value in options.items()]
    return [str(ICD), "fit", "--config", "conf/base.yaml", "--config", "conf/model/tiny.yaml", *written]


def start(command: list[str], **environment: str) -> subprocess.Popen:
    """The command as a process group of its own, which can be killed as a whole."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def run(command: list[str], **environment: str) -> str:
    """What the command says, once it has ended well."""
    process = start(command, **environment)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def kill_in_training(command: list[str], wait: float, number: int = signal.SIGKILL, **environment: str) -> int:
    """Send the signal to all processes, `wait` seconds after the first step; the exit code (0: it ended before)."""
    process = start(command, **environment)
    for line in process.stderr:
        if line.startswith("step "):
            break
    time.sleep(wait)
    os.killpg(process.pid, number)
    process.communicate(timeout=120)
    return process.returncode


def killed_runs(root: Path, scenes: Path, *, kills: int, devices: int = 1, seconds: float = 4.0) -> Iterator[Path]:
    """Folders of finished runs that were killed at random moments and started again, `kills` kills in all."""
    moments, done, runs = random.Random(devices), 0, 0
    while done < kills:
        folder = root / f"broken-{runs}"
        command = fit_command(folder, scenes, devices)
        while done < kills and kill_in_training(command, moments.uniform(0, seconds)) == -signal.SIGKILL:
            done += 1
        run(command)
        runs += 1
        yield folder


def differences(first: object, second: object, place: str = "") -> list[str]:
    """Where two checkpoints differ; every tensor and number is compared bit for bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if torch.equal(first, second) else [place]
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [*first, *(key for key in second if key not in first)]
        return [d for key in keys for d in differences(first.get(key), second.get(key), f"{place}/{key}")]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        return [d for i, pair in enumerate(zip(first, second, strict=True)) for d in differences(*pair, f"{place}/{i}")]
    return [] if first == second else [f"{place}: {first!r}, {second!r}"]


def last_checkpoint(folder: Path) -> dict:
    """The run's last checkpoint, without the folder's own name and Lightning's count of epochs begun.

    An epoch in which a run was killed has begun twice; nothing reads that.
    """
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    for state in checkpoint["callbacks"].values():
        for name in ("dirpath", "last_model_path"):
            state.pop(name, None)
    for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        for name in ("ready", "started"):
            counts.pop(name)
    return checkpoint
