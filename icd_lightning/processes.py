"""Work spread over processes of this machine."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

S, T = TypeVar("S"), TypeVar("T")


def in_processes(function: Callable[[S], T], items: Iterable[S], count: int, *, chunksize: int = 1) -> Iterator[T]:
    """Yield function(item) of each item, in order, from `count` processes, or from this one if they are to be one.

    OSError if one of them is killed.
    """
    if count <= 1:
        yield from map(function, items)
        return
    # multiprocessing.Pool would wait for ever for a process that was killed, or that inherited an answer to SIGTERM
    with ProcessPoolExecutor(count, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield from pool.map(function, items, chunksize=chunksize)
        except BrokenProcessPool:
            raise OSError(
                f"one of {count} processes was killed, perhaps for memory: take fewer, or more memory"
            ) from None
