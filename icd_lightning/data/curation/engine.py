"""Work on pieces, side by side: in this process, or in those of Ray, on this machine or on a cluster."""

from __future__ import annotations

import logging
import os
import pickle
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import islice
from typing import Any

INSTALL = "pip install 'icd-lightning[curate]'"
STORE = 128 << 20  # bytes of shared memory: pieces and their outcomes are small, pictures stay with whoever reads them


@dataclass(frozen=True)
class Engine:
    """Where work is done. `num_workers` processes, one for each processor if None; with 0 in this one, without Ray.

    `address` is that of a running Ray cluster, whose machines must see the same files. Each worker gets `num_gpus`.
    `option` is what a command calls the number of workers.
    """

    num_workers: int | None = None
    address: str | None = None
    num_gpus: float = 0.0
    option: str = "num_workers"

    def __post_init__(self) -> None:
        """What is wrong is told before anything is overwritten."""
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"{self.option} {self.num_workers} must be at least 0")
        if not 0 <= self.num_gpus < float("inf"):
            raise ValueError(f"num_gpus {self.num_gpus} must be a number of GPUs, at least 0")
        if self.num_workers == 0 and self.address is not None:
            raise ValueError(
                f"{self.option} 0 works in this process, not at {self.address!r}: leave out the address, or give "
                f"--{self.option} 1 or more"
            )
        if self.num_workers == 0 and self.num_gpus:
            raise ValueError(
                f"num_gpus {self.num_gpus:g} are of Ray's processes, and {self.option} 0 has none: leave num_gpus out, "
                f"or give --{self.option} 1 or more"
            )
        if self.num_workers != 0 and find_spec("ray") is None:
            raise ValueError(f"Ray is not installed: {INSTALL}; or pass --{self.option} 0 to do without")
        if self.address not in (None, "auto"):
            _check_address(self.address)

    @contextmanager
    def started(self) -> Iterator[Callable[..., Iterator[Any]]]:
        """Gives `each(work, pieces)`, which yields what work(piece) returns, in any order; both must pickle.

        A ValueError or OSError of the work is raised here, with its text.
        """
        if self.num_workers == 0:
            yield map
            return
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing phones home
        import ray

        ours = not ray.is_initialized()
        try:
            if ours:
                self._start(ray)
            yield partial(self._each, ray)
        finally:
            if ours:
                ray.shutdown()

    def _start(self, ray: Any) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if self.address is None:
            cores = self.num_workers or os.cpu_count()
            options |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": STORE}
        try:
            ray.init(self.address, **options)
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(
                f"no Ray cluster answers at {self.address} ({error}): start one by `ray start --head`"
            ) from error

    def _each(self, ray: Any, work: Callable[[Any], Any], pieces: Sequence[Any]) -> Iterator[Any]:
        room = self._room(ray.cluster_resources()) if pieces else 0
        most, waiting, running = min(room, self.num_workers or room), iter(pieces), []
        # without max_calls Ray ends a process that had a GPU after each piece, and what it has loaded with it
        worked, work = ray.remote(num_cpus=1, num_gpus=self.num_gpus, max_calls=0)(_worked), ray.put(pickle.dumps(work))
        while running := [*running, *(worked.remote(work, piece) for piece in islice(waiting, most - len(running)))]:
            (done,), running = ray.wait(running)
            try:
                yield ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise OSError(
                    f"a process of Ray's ended ({type(error).__name__}): see that memory lasts (fewer workers), and "
                    "call again; what is done is kept"
                ) from error

    def _room(self, resources: Mapping[str, float]) -> int:
        """How many workers Ray has room for; ValueError for none, for which it would wait for ever."""
        room, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        if self.num_gpus:
            room = min(room, gpus / self.num_gpus)
        if room < 1:
            raise ValueError(
                f"num_gpus {self.num_gpus} of each worker cannot be: Ray finds {gpus:g} in all; lower it, or name a "
                "cluster by ray_address"
            )
        return int(room)


@lru_cache(1)
def _loaded(work: bytes) -> Callable[[Any], Any]:
    """The work, once in each process of Ray's: it keeps whatever networks it has loaded."""
    import torch

    import icd_lightning  # noqa: F401  first, for torchvision

    torch.set_num_threads(1)
    return pickle.loads(work)


def _worked(work: bytes, piece: Any) -> Any:
    try:
        return _loaded(work)(piece)
    except (ValueError, OSError) as error:  # of a class that can be made of its text, whatever the library's own takes
        raise (ValueError if isinstance(error, ValueError) else OSError)(str(error)) from None


def _check_address(address: str) -> None:
    """ValueError unless something answers there; Ray itself waits for minutes."""
    place = re.fullmatch(r"(?:ray://)?([\w.-]+|\[[\da-f:]+\]):(\d{1,5})", address)
    if place is None:
        raise ValueError(f"ray_address {address!r} is none: give auto, host:6379 or ray://host:10001")
    try:
        socket.create_connection((place[1].strip("[]"), int(place[2])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray cluster answers at {address} ({error}): start one by `ray start --head`") from error
