"""Programs that tests start, and that never outlive the test, however it ends."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def running(command: list[str], **options) -> Iterator[subprocess.Popen]:
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()  # or leaving would wait for a program that hangs


def wait_for_file(process: subprocess.Popen, folder: Path, pattern: str) -> None:
    """Until the program has made a file of that name."""
    while not list(folder.glob(pattern)):
        assert process.poll() is None, "ended before"
        time.sleep(0.05)
