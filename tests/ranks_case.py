"""Two real processes, as torchrun starts them, for the tests of what ranks share.

Each is forked from one that has imported everything: to import torch, diffusers and lightning again takes seconds.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch

WORLD = 2
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["icd_lightning.callbacks.reconstruction", "icd_lightning.tasks.sharding"])


def run_ranks(function: Callable[..., None], *args) -> list[int]:
    """Call function(rank, *args) in both processes at once, on one thread each; their exit codes, 0 where all is well.

    The function belongs to a module; what it prints is in the test's output.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [PROCESSES.Process(target=_run, args=(function, rank, port, *args)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
    return [process.exitcode for process in ranks]


def _run(function: Callable[..., None], rank: int, port: int, *args) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    function(rank, *args)
