"""`torchrun ... icd fit`, as docs/gpus.md has it: stage 1 spread over two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_case import write_scenes

from icd_lightning.models.family import Family

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.slow
def test_a_whole_network_is_trained_in_parts_and_exported_whole(random_family, tmp_path):
    scenes, run = write_scenes(tmp_path / "scenes", 8), tmp_path / "run"
    names = ("base", "model/tiny", "task/guidance_distillation", "trainer/fsdp")
    settings = {
        "global_batch_size": 8,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.default_root_dir": run,
        "trainer.callbacks+": "icd_lightning.callbacks.averaging.ExponentialAverage",
        "model.init_args.family.model": random_family,
        "model.init_args.gradient_checkpointing": "true",
        "data.init_args.urls": scenes,
        "data.init_args.val_urls": scenes,
        "data.init_args.batch_size": 2,
        "data.init_args.val_batch_size": 2,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]
    command += ["icd_lightning", "fit"]
    command += [word for name in names for word in ("--config", str(CONF / f"{name}.yaml"))]
    command += [f"--{key}={value}" for key, value in settings.items()]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[:5000]
    assert done.stderr.count("global batch 8 = 2 samples x 2 devices x 2 accumulated micro-batches") == 1

    student = Family(str(random_family), guided_unet=str(run)).load_model(guided=True).network
    teacher = Family(str(random_family)).load_model(guided=False).network
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {f"student.{name}" for name in student.state_dict()}
    assert all(torch.equal(saved[f"student.{name}"], weight) for name, weight in student.state_dict().items())
    moved = [
        name for name, weight in teacher.state_dict().items() if not torch.equal(weight, student.state_dict()[name])
    ]
    assert len(moved) > 0.9 * len(teacher.state_dict())
