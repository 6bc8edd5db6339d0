"""Opens what a shard's url names: a local file, `pipe:<command>`, or what fsspec reads (http, s3, gs, hf ...)."""

from __future__ import annotations

import glob
import math
import os
import re
import select
import signal
import subprocess
from typing import Any, Protocol


class Readable(Protocol):
    """As much of a file as a tar needs to be read from end to end."""

    def read(self, size: int = -1, /) -> bytes: ...

    def close(self) -> None: ...


def is_local(url: str) -> bool:
    """Whether `url` is a path on this machine, not `http://...`, `pipe:...` or the like."""
    return re.match(r"[a-z0-9]+:", url) is None


def open_url(url: str, *, patience: float = 60.0) -> Readable:
    """Open a shard for reading; remote ones fail with an OSError where nothing comes for `patience` seconds."""
    if is_local(url):
        return open(url, "rb")
    if url.startswith("pipe:"):
        return _Pipe(url.removeprefix("pipe:"), patience)
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url, **_options(url, patience))
    return system.open(path, "rb")


def expand(url: str) -> list[str]:
    """Replace `*` by what is there, in order; [url] where there is none, as in a command.

    ValueError if no installed package reads urls of this kind, naming the one that would.
    """
    if is_local(url):
        return sorted(glob.glob(url)) if "*" in url else [url]
    if url.startswith("pipe:"):
        return [url]
    from fsspec import get_filesystem_class
    from fsspec.core import url_to_fs

    try:
        get_filesystem_class(url.partition(":")[0])
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be read here: {error}; or copy it to this machine") from error
    if "*" not in url:
        return [url]
    system, pattern = url_to_fs(url)
    return sorted(system.unstrip_protocol(path) for path in system.glob(pattern))


def _options(url: str, patience: float) -> dict[str, Any]:
    if not url.startswith(("http:", "https:")):
        return {}  # the drivers of stores have timeouts and retries of their own
    from aiohttp import ClientTimeout

    # aiohttp's own limit is five minutes for the whole of an answer, and a shard may well be read for longer
    limit = None if math.isinf(patience) else patience
    return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=limit, sock_read=limit)}}


class _Pipe:
    """What a shell command writes, as a file. A silence or an exit code is an error, and closing ends the command."""

    def __init__(self, command: str, patience: float) -> None:
        self.patience = patience
        self.process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
        assert self.process.stdout is not None
        self.output = self.process.stdout
        self.poll = select.poll()
        self.poll.register(self.output, select.POLLIN)

    def read(self, size: int = -1, /) -> bytes:
        if not self.poll.poll(None if math.isinf(self.patience) else self.patience * 1000):
            raise TimeoutError(f"the command gave nothing for {self.patience:g} s")
        data = self.output.read(size)
        if not data and (code := self.process.wait()):
            raise OSError(f"the command ended with exit code {code}")
        return data

    def close(self) -> None:
        self.output.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # what the shell has started, too
        self.process.wait()
