"""Stage 2 on two real gloo processes, through the Trainer, against one process with the joined batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_case import train
from training_case import distillation, same, student_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


@pytest.fixture(scope="module")
def ddp(random_family, tmp_path_factory) -> Path:
    """The folder of two gloo processes, half of the batch each; the second one is interrupted in its second step."""
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    command = [sys.executable, Path(__file__).with_name("ddp_case.py"), random_family, folder]
    processes = [  # started together, as torchrun does, for Lightning would start the second after the first
        subprocess.Popen(command, env={**shared, "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert (folder / "rank1.pt").is_file(), "\n".join(errors)
    assert [process.returncode for process in processes] == [1, 1]
    return folder


@pytest.fixture(scope="module")
def ranks(ddp):
    """What each process had after two steps: losses, students' weights, metrics."""
    return [torch.load(ddp / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_equal_one_with_the_joined_batch(random_family, ranks, tmp_path):
    losses, weights, metrics = train(random_family, tmp_path)
    of_the_halves = [sum(halves) / 2 for halves in zip(*(rank[0] for rank in ranks), strict=True)]
    assert of_the_halves == pytest.approx(losses, rel=1e-4)
    start = student_weights(distillation(random_family))
    for direction, named in weights.items():
        first, second = (rank[1][direction] for rank in ranks)
        assert same(first, second)
        moved, expected = (
            torch.cat([(after[name] - start[direction][name]).flatten() for name in named]) for after in (first, named)
        )
        assert (moved - expected).norm() < 1e-2 * expected.norm()
        norms = [found[f"grad_norm/{direction}"] for found in (ranks[0][2], metrics)]
        torch.testing.assert_close(*norms, rtol=1e-3, atol=0)


def test_two_processes_stop_after_the_same_step_though_one_alone_was_interrupted(ddp):
    assert torch.load(ddp / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_two_processes_agree_on_the_metrics_of_a_validation(ranks):
    first, second = (rank[2] for rank in ranks)
    names = [name for name in first if name.startswith(("reconstruction", "val/"))]
    assert {"reconstruction/psnr", "reconstruction_guided/latent_mse", "val/reverse_cd"} <= set(names)
    assert all(first[name] == second[name] for name in names)
