"""Pictures to edit, a served editor, and a count of what its network does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from icd_lightning.apps.editor.page import EditorPage
from icd_lightning.tiny.benchmarks import scene_edits


class Task(NamedTuple):
    picture: Image.Image
    source: str
    target: str


TASKS = [Task(Image.fromarray(one.picture.draw()), one.caption, one.target) for one in scene_edits(24, seed=77)]


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and np.array_equal(np.asarray(first.convert("RGB")), np.asarray(second))


@contextmanager
def evaluations() -> Iterator[list[int]]:
    """The rows of every batch that a UNet is given meanwhile."""
    rows: list[int] = []

    def count(module, args) -> None:
        if isinstance(module, UNet2DConditionModel):
            rows.append(len(args[0]))

    hook = register_module_forward_pre_hook(count)
    try:
        yield rows
    finally:
        hook.remove()


@contextmanager
def serving(page: EditorPage) -> Iterator[EditorPage]:
    page.launch(prevent_thread_lock=True)
    try:
        yield page
    finally:
        page.close(verbose=False)
