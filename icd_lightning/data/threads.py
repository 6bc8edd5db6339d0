"""Work that goes on side by side, in threads: Pillow, torch and files let others run meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")
PATIENCE = 5.0  # seconds that an interrupted program waits for a thread that reads or uploads


class StoppedError(Exception):
    """The thread at the other end has stopped."""


class _Channel(Generic[T]):
    """Hands items, none of them None, from one thread to another; at most `most` wait to be taken."""

    def __init__(self, most: int) -> None:
        self.room, self.closed = Semaphore(most), False
        self.items: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def put(self, item: T) -> None:
        """Wait for room; StoppedError if nobody takes items any more."""
        self.room.acquire()
        if self.closed:
            raise StoppedError
        self.items.put((item, None))

    def end(self, error: BaseException | None = None) -> None:
        """Let the taker come to an end, or to an error, after the items that wait."""
        self.items.put((None, error))

    def close(self) -> None:
        """Take no more."""
        self.closed = True
        self.room.release()

    def __iter__(self) -> Iterator[T]:
        while (taken := self.items.get())[0] is not None:
            self.room.release()
            yield taken[0]
        if taken[1]:
            raise taken[1]


def side_by_side(source: Generator[S, None, None], work: Callable[[S], T], sink: Callable[[Iterator[T]], None]) -> None:
    """sink(map(work, source)), with source and sink in threads of their own: for one item at work, one more is drawn.

    The first error of the three is raised here; sink then gets a StoppedError, after what was made before.
    """
    drawn, made, errors = _Channel[S](1), _Channel[T](16), list[BaseException]()

    def draw() -> None:
        error = None
        try:
            with closing(source):
                for item in source:
                    drawn.put(item)
        except BaseException as raised:
            error = raised
        drawn.end(error)

    def drain() -> None:
        try:
            sink(iter(made))
        except BaseException as raised:
            errors.append(raised)
        made.close()

    reader, writer = (Thread(target=part, daemon=True) for part in (draw, drain))
    reader.start()
    writer.start()
    try:
        for item in drawn:
            made.put(work(item))
        made.end()
        writer.join()
    except BaseException as error:
        made.end(StoppedError())
        writer.join(None if isinstance(error, Exception) else PATIENCE)
        if not isinstance(error, StoppedError):
            raise
    finally:
        drawn.close()
        reader.join(PATIENCE)
    if errors:
        raise errors[0]


def submitted(function: Callable[[S], T], items: Iterable[S], num_threads: int) -> Generator[Future[T], None, None]:
    """Yield in order a future of function(item) for each; beyond the one yielded two a thread are under way.

    With no threads one is done after the other.
    """
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * num_threads:
                yield waiting.popleft()
        yield from waiting
