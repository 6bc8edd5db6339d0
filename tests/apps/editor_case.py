"""Pictures to edit, a served editor, and a count of what its network does."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import numpy as np
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from icd_lightning.tiny.benchmarks import scene_edits

if TYPE_CHECKING:
    from icd_lightning.apps.editor.page import EditorPage


class Task(NamedTuple):
    picture: Image.Image
    source: str
    target: str


TASKS = [Task(Image.fromarray(one.picture.draw()), one.caption, one.target) for one in scene_edits(24, seed=77)]


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and np.array_equal(np.asarray(first.convert("RGB")), np.asarray(second))


class Visitor:
    """Calls a served page's API as a browser does; Gradio's own client would ask other hosts."""

    sessions = count()

    def __init__(self, page: "EditorPage") -> None:
        self.root, self.calls = f"{page.local_url}gradio_api", page.config["dependencies"]

    def upload(self, content: Image.Image | bytes, name: str = "picture.png") -> dict:
        """A file sent, as calls then name it."""
        if isinstance(content, Image.Image):
            buffer = BytesIO()
            content.save(buffer, "PNG")
            content = buffer.getvalue()
        answer = httpx.post(f"{self.root}/upload", files={"files": (name, content)}, timeout=60).raise_for_status()
        return {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def call(self, name: str, *values: Any) -> dict[str, Any]:
        """What the server answers: `data`, a value of each output, or `error`."""
        number = next(one["id"] for one in self.calls if one["api_name"] == name)
        session = f"visitor-{next(self.sessions)}"
        call = {"data": values, "fn_index": number, "session_hash": session}
        httpx.post(f"{self.root}/queue/join", json=call, timeout=60).raise_for_status()
        with httpx.stream("GET", f"{self.root}/queue/data?session_hash={session}", timeout=120) as stream:
            done = next(line for line in stream.iter_lines() if '"process_completed"' in line)
        return json.loads(done.removeprefix("data: "))["output"]

    def edit(self, picture: Image.Image, *values: Any) -> list[Any]:
        return self.call("edit", self.upload(picture), *values)["data"]


def fetched(file: dict[str, Any]) -> Image.Image:
    """A picture that the page names."""
    return Image.open(BytesIO(httpx.get(file["url"], timeout=60).raise_for_status().content))


@contextmanager
def evaluations() -> Iterator[list[int]]:
    """The rows of every batch that a UNet is given meanwhile."""
    rows: list[int] = []

    def note(module, args) -> None:
        if isinstance(module, UNet2DConditionModel):
            rows.append(len(args[0]))

    hook = register_module_forward_pre_hook(note)
    try:
        yield rows
    finally:
        hook.remove()


@contextmanager
def serving(page: "EditorPage") -> Iterator["EditorPage"]:
    page.launch(prevent_thread_lock=True)
    try:
        yield page
    finally:
        page.close(verbose=False)
