"""Work on pieces, side by side: in this process, or in those of Ray, on this machine or on a cluster."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

INSTALL = "pip install 'icd-lightning[curate]'"
STORE = 128 << 20  # bytes of shared memory: pieces and their outcomes are small, pictures stay with whoever reads them


@dataclass(frozen=True)
class Engine:
    """Where work is done. `num_workers` processes, one for each processor if None; with 0 in this one, without Ray.

    `address` is that of a running Ray cluster, whose machines must see the same files. Each worker gets `num_gpus`.
    """

    num_workers: int | None = None
    address: str | None = None
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers {self.num_workers} must be at least 0")
        if not 0 <= self.num_gpus < float("inf"):
            raise ValueError(f"num_gpus {self.num_gpus} must be a number of GPUs, at least 0")
        if self.num_workers == 0 and self.address:
            raise ValueError(f"num_workers 0 works in this process, not at {self.address}: leave out one of the two")

        if self.num_workers != 0 and find_spec("ray") is None:  # to be told before anything is overwritten
            raise ValueError(f"Ray is not installed: {INSTALL}; or pass --num_workers 0 to do without")

    @contextmanager
    def started(self) -> Iterator[Callable[..., Iterator[Any]]]:
        """Gives `each(work, pieces)`, which yields what work(piece) returns, in any order; both must pickle.

        A ValueError or OSError of the work is raised here, with its text.
        """
        if self.num_workers == 0:
            yield map
            return
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing phones home
        import ray.data

        ours = not ray.is_initialized()
        try:
            if ours:
                self._start(ray)
            yield partial(self._each, ray)
        finally:
            if ours:
                ray.shutdown()

    def _start(self, ray: Any) -> None:
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.ERROR)
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if self.address is None:
            cores = self.num_workers or os.cpu_count()
            options |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": STORE}
        try:
            ray.init(self.address, **options)
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(f"no Ray cluster answers at {self.address} ({error}): start one by `ray start`") from error

    def _each(self, ray: Any, work: Callable[[Any], Any], pieces: Sequence[Any]) -> Iterator[Any]:
        if not pieces:
            return
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        most = min(len(pieces), self.num_workers or int(ray.cluster_resources()["CPU"]))
        pickled = pickle.dumps(work)
        rows = [{"work": pickled, "piece": pickle.dumps(piece)} for piece in pieces]
        options = {"compute": ray.data.TaskPoolStrategy(size=most), "num_cpus": 1, "num_gpus": self.num_gpus}
        for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(_worked, **options).iter_rows():
            outcome, error = pickle.loads(row["done"])
            if error:
                raise error
            yield outcome


@lru_cache(1)
def _loaded(work: bytes) -> Callable[[Any], Any]:
    """The work, once in each process of Ray's: it keeps whatever networks it has loaded."""
    import torch

    import icd_lightning  # noqa: F401  first, for torchvision

    torch.set_num_threads(1)
    return pickle.loads(work)


def _worked(row: dict[str, Any]) -> dict[str, Any]:
    try:
        done: tuple[Any, Exception | None] = _loaded(row["work"])(pickle.loads(row["piece"])), None
    except ValueError as error:  # Ray would raise it with its traceback as its text
        done = None, ValueError(str(error))
    except OSError as error:
        done = None, OSError(str(error))
    return {"done": pickle.dumps(done)}
