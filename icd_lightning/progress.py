"""A bar on the terminal for what takes long, and for nothing else."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items and draw a bar while that goes on, if stderr is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, label, total, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the bar that transformers draws for every file that it reads; downloads keep theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()  # and the hub's with it
    enable_progress_bars()
    try:
        yield
    finally:
        logging.enable_progress_bar()
