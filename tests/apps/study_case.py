"""A study whose methods are told by colours, a server of it, and assessors who know what they like."""

import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from random import Random
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from icd_lightning.apps.listening import listen
from icd_lightning.apps.study.create import create_study
from icd_lightning.apps.study.edits import read_edits
from icd_lightning.apps.study.server import server
from icd_lightning.apps.study.store import Plan, Store
from icd_lightning.commands.main import main
from icd_lightning.data.images import save_png

COLORS = {"method-ours": (0, 160, 0), "method-theirs": (0, 0, 200), "method-other": (200, 200, 0)}
KINDS = ("recolour", "add")
PROMPT = 'a <b>cat</b> & "dog" number'
Choose = Callable[[str, list[str | None]], str]
"""Of a task's original (as text that names it) and the methods on the left and right, None for none: a side."""


def solid(color, side=16):
    return np.full((side, side, 3), color, np.uint8)


def write_edits(root: Path, count: int, methods=tuple(COLORS)[:2]) -> tuple[list[str], list[str]]:
    """A table of edits with its originals, and a folder of each method: arguments of `read_edits`."""
    lines = ["image,source,target,kind"]
    for number in range(count):
        name = f"{number:03d}.png"
        save_png(solid((200, number, 30)), root / name, about={})
        prompt = f"{PROMPT} {number}".replace('"', '""')
        lines.append(f'{name},before {number},"{prompt}",{KINDS[number % 2]}')
        for method in methods:
            save_png(solid(COLORS[method]), root / method / name, about={"method": method})
    (root / "edits.csv").write_text("\n".join(lines), encoding="utf-8")
    return [str(root / "edits.csv")], [f"{method}={root / method}" for method in methods]


def make_study(root: Path, count: int = 4, methods=tuple(COLORS)[:2], **plan) -> Path:
    """A study in root/study."""
    found = read_edits(*write_edits(root, count, methods), None)
    create_study(found, Plan(**plan), root / "study")
    return root / "study"


@contextmanager
def served(study: Path) -> Iterator[int]:
    """The port at which the study is served, for as long as the block runs."""
    store = Store(study)
    with listen("127.0.0.1", 0) as listening:
        running = server(store)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join(20)
    store.close()


def method_in(picture: bytes) -> str | None:
    """Whose colour a PNG has all over."""
    pixels = np.asarray(Image.open(BytesIO(picture)).convert("RGB")).reshape(-1, 3)
    return next((name for name, color in COLORS.items() if (pixels == color).all()), None)


def liking(number: int, first: str, share: float, ties: float) -> Choose:
    """Takes edits before what is none; of two, the method `first` and ties at these shares, by chance that repeats."""

    def choose(original: str, methods: list[str | None]) -> str:
        if None in methods:
            return "right" if methods[0] is None else "left"
        drawn = Random(f"{number} {original}").random()
        if drawn < ties:
            return "tie"
        return ("left", "right")[(methods[0] == first) != (drawn < ties + share)]

    return choose


def careless(original: str, methods: list[str | None]) -> str:
    """Takes what is no edit, and the other method."""
    return "left" if methods[0] in (None, "method-theirs") else "right"


class Assessor:
    """Votes by HTTP, as a browser would; `seen` is all that it was told, with headers."""

    pictures: ClassVar[dict[tuple[int, str], bytes]] = {}

    def __init__(self, port: int, path: str | None = None) -> None:
        self.connection, self.seen = HTTPConnection("127.0.0.1", port, timeout=60), []
        self.path = path or self.ask("POST", "/join")[1]["location"]

    def ask(self, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, dict, bytes]:
        """Status, headers and body of an answer."""
        form = {"Content-Type": "application/x-www-form-urlencoded"} if body is not None else {}
        self.connection.request(method, path, body, {**form, **headers})
        answer = self.connection.getresponse()
        told = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        self.seen.append(told)
        return told

    def task(self) -> tuple[str, list[str]] | None:
        """Of the page: the task, and its pictures' addresses, the two edits last; None if there is none left."""
        status, _, page = self.ask("GET", self.path)
        assert status == 200, page
        found = re.search(r'name="task" value="(\w+)"', page.decode())
        return found and (found[1], re.findall(r'<img src="([^"]+)"', page.decode()))

    def picture(self, place: str) -> bytes:
        """Asked for once by all assessors together, for the sake of time."""
        if (key := (self.connection.port, place)) not in self.pictures:
            self.pictures[key] = self.ask("GET", place)[2]
        return self.pictures[key]

    def vote(self, task: str, side: str) -> int:
        """The answer's status."""
        return self.ask("POST", f"{self.path}/votes", f"task={task}&choice={side}")[0]

    def assess(self, choose: Choose) -> None:
        """Do as many tasks as there are."""
        while found := self.task():
            task, places = found
            original, *_, left, right = map(self.picture, places)
            side = choose(str(zlib.crc32(original)), [method_in(left), method_in(right)])
            assert self.vote(task, side) == 303


def told(capsys, *args):
    """The one line of a mistake."""
    with pytest.raises(SystemExit, match="2"):
        main(["study", *map(str, args)])
    (line,) = capsys.readouterr().err.splitlines()
    return line


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for it, no longer than that."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
