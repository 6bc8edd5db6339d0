"""Work spread over processes of this machine."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

S, T = TypeVar("S"), TypeVar("T")
PR_SET_PDEATHSIG = 1


def in_processes(function: Callable[[S], T], items: Sequence[S], count: int, *, chunksize: int = 1) -> Iterator[T]:
    """Yield function(item) of each item, in order, from `count` processes, or from this one if they are to be one.

    OSError if one of them is killed. None of them outlives this process, or work that is broken off.
    DataLoader starts and ends them: concurrent.futures waits for ever for a result that was cut off half sent.
    """
    if count <= 1:
        yield from map(function, items)
        return
    options: dict[str, Any] = {"collate_fn": partial(_results, function), "worker_init_fn": _begin}
    options["generator"] = torch.Generator()  # or it would draw from everybody's
    error: Exception | None = None
    try:
        for results, error in DataLoader(items, chunksize, num_workers=count, **options):
            yield from results
            if error:
                break
    except RuntimeError:  # of a worker that died: what the function raises is handed over
        error = OSError(f"one of {count} processes was killed, perhaps for memory: take fewer of them")
    if error:
        raise error


def _results(function: Callable[[S], T], items: Sequence[S]) -> tuple[list[T], Exception | None]:
    results: list[T] = []
    try:
        results.extend(map(function, items))
    except Exception as error:
        return results, error
    return results, None


def _begin(worker: int) -> None:
    """Leave Ctrl-C to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
