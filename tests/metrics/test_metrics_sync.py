"""Two real processes that share pictures measure what one process measures on all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sync_case import COUNT, measure


def test_two_processes_measure_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("sync_case.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(port), tmp_path / "rank"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    expected = measure(slice(0, COUNT))
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in range(2))
    assert first == second
    assert first == pytest.approx(expected, rel=1e-4)
