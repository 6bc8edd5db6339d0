"""Work spread over processes of this machine."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

S, T = TypeVar("S"), TypeVar("T")
PR_SET_PDEATHSIG = 1


def in_processes(function: Callable[[S], T], items: Iterable[S], count: int, *, chunksize: int = 1) -> Iterator[T]:
    """Yield function(item) of each item, in order, from `count` processes, or from this one if they are to be one.

    OSError if one of them is killed. None of them outlives this process, or work that is broken off.
    """
    if count <= 1:
        yield from map(function, items)
        return
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(count, initializer=_begin) as pool:
        try:
            yield from pool.map(function, items, chunksize=chunksize)
        except BrokenProcessPool:
            raise OSError(f"one of {count} processes was killed, perhaps for memory: take fewer of them") from None
        except BaseException:  # the pool would wait for what is under way
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise


def _begin() -> None:
    """Heed SIGTERM alone, by which a pool ends its processes, whatever its parent answers to that, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
