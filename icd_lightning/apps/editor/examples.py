"""What there is to try, for a model that ships with pictures of its own world."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from icd_lightning.models.released import SHIPPED


class Example(NamedTuple):
    """A picture, what it shows, and what it may show instead."""

    picture: Image.Image
    source: str
    target: str


def examples_of(model: str, count: int = 8) -> list[Example]:
    """Held-out scenes of the picture world, an edit of each kind in turn, for its families; for others, none."""
    if model not in SHIPPED:
        return []
    from icd_lightning.tiny.benchmarks import scene_edits
    from icd_lightning.tiny.scenes import HELD_OUT_SEED

    edits = scene_edits(count, HELD_OUT_SEED)
    return [Example(Image.fromarray(edit.picture.draw()), edit.caption, edit.target) for edit in edits]
