"""A study's folder: blinded tasks in random order and on random sides, with checks among them, and their pictures."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from icd_lightning.apps.study import store
from icd_lightning.apps.study.edits import Edits
from icd_lightning.apps.study.store import FILE, PICTURES, Plan, Store, Task
from icd_lightning.data.images import read_picture, resize_and_crop, save_png
from icd_lightning.evaluation.examples import Example
from icd_lightning.files import remove_tree, replaced_folder
from icd_lightning.progress import progress

Save = Callable[[NDArray[np.uint8]], str]
"""Writes a picture; returns the file's name, which says nothing of it."""


@dataclass(frozen=True)
class Material:
    """The files of one example: its original, the true result if it is known, and the edits by method."""

    benchmark: str
    example: Example
    side: int
    source: str
    reference: str | None
    edits: dict[str, str]

    def task(self, a: str, b: str | None, picture_b: str, swapped: bool) -> Task:
        about = (self.benchmark, self.example.kind, self.example.key, self.example.target)
        files = (self.source, self.reference, self.edits[a], picture_b)
        return Task(secrets.token_hex(12), *about, a, b, *files, int(swapped))


def create_study(found: Sequence[Edits], plan: Plan, folder: Path, *, overwrite: bool = False) -> tuple[int, int]:
    """Write a study; return how many pairs of edits, and how many checks, it has. Votes are never replaced."""
    check_free(folder, overwrite=overwrite)
    rng = np.random.default_rng(plan.seed)
    with replaced_folder(folder) as temporary:
        save = partial(_save, temporary / PICTURES)
        total = sum(len(edits.examples) for edits in found)
        materials = list(progress(_materials(found, save), "pictures", total))
        methods = list(dict.fromkeys(method for edits in found for method in edits.files))
        pairs = [
            one.task(a, b, one.edits[b], rng.random() < 0.5)
            for one in materials
            for a, b in combinations([method for method in methods if method in one.edits], 2)
        ]
        count = math.ceil(len(pairs) * plan.check_share / (1 - plan.check_share))
        checks = [_check(number, materials, save, rng) for number in range(count)]
        tasks = [*pairs, *checks]
        store.create(temporary / FILE, plan, [tasks[index] for index in rng.permutation(len(tasks))])
        check_free(folder, overwrite=overwrite)  # somebody may have voted meanwhile
        remove_tree(folder / PICTURES)
        for suffix in ("", "-wal", "-shm"):
            (folder / f"{FILE}{suffix}").unlink(missing_ok=True)
    return len(pairs), count


def check_free(folder: Path, *, overwrite: bool) -> None:
    """ValueError for a folder with other things in it, or with a study that may not be replaced, as one with votes."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / FILE).exists():
        raise ValueError(f"{folder} is not empty and holds no study: name another --out")
    if not overwrite:
        raise ValueError(
            f"{folder} holds a study; name another --out, or replace it, while it has no votes, by --overwrite"
        )
    study = Store(folder)
    try:
        if votes := len(study.votes()):
            raise ValueError(f"{folder} holds {votes} votes, which are never replaced: name another --out")
        if study.is_shared():
            raise ValueError(f"{folder} is being served: stop that first, or name another --out")
    finally:
        study.close()


def _save(folder: Path, picture: NDArray[np.uint8]) -> str:
    name = f"{secrets.token_hex(12)}.png"
    save_png(picture, folder / name, about={})  # pixels alone: a file's metadata tells of its method
    return name


def _materials(found: Sequence[Edits], save: Save) -> Iterator[Material]:
    """All pictures of an example become squares of the smallest edit's side: a size would tell of a method."""
    for edits in found:
        for example, files in zip(edits.examples, zip(*edits.files.values(), strict=True), strict=True):
            pictures = [read_picture(file) for file in files]
            side = min(min(picture.size) for picture in pictures)
            squares = (np.asarray(resize_and_crop(picture, side)[0]) for picture in pictures)
            made = dict(zip(edits.files, map(save, squares), strict=True))
            reference = save(example.truth.draw(side)) if example.truth else None
            yield Material(edits.benchmark, example, side, save(example.array(side)), reference, made)


def _check(number: int, materials: Sequence[Material], save: Save, rng: np.random.Generator) -> Task:
    """An edit beside what cannot be one: by turns noise, and the original of another task."""
    one = materials[rng.integers(len(materials))]
    others = [other for other in materials if other.example.caption not in (one.example.caption, one.example.target)]
    if number % 2 and others:
        wrong = others[rng.integers(len(others))].example.array(one.side)
    else:
        wrong = rng.integers(0, 256, (one.side, one.side, 3), dtype=np.uint8)
    return one.task(rng.choice(list(one.edits)), None, save(wrong), rng.random() < 0.5)
