"""What benchmarks are made of: pictures with captions, and edits with target captions, masks or true results.

Everything comes as a list of `Example`: COCO's annotations or any CSV of image and caption, PIE-Bench's folder, a CSV
of edits, or pictures that draw themselves. Files are read when they are needed.
"""

from __future__ import annotations

import ast
import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from icd_lightning.data.images import read_picture, resize_and_crop, to_images
from icd_lightning.data.manifest import sha256
from icd_lightning.editing.prompt_to_prompt import BlendedWords
from icd_lightning.editing.prompt_to_prompt.alignment import PromptTokens
from icd_lightning.files import inside, read_object
from icd_lightning.progress import progress
from icd_lightning.registry import Registry
from icd_lightning.texts import csv_rows, wrong_with

if TYPE_CHECKING:
    from icd_lightning.evaluation.benchmark import Settings

log = logging.getLogger(__name__)

PHOTOGRAPH_SIDE = 512
"""Pixels of a side at which photographs are scored, of every family: metrics are compared at one size."""
PIE_BENCH_SIDE = 512
PIE_BENCH_TYPES = (
    *("random", "change object", "add object", "delete object", "change attribute content"),
    *("change attribute pose", "change attribute color", "change attribute material", "change background"),
    "change style",
)
"""By editing_type_id, "0" to "9"."""
BRACKETS = str.maketrans("", "", "[]")  # around the words that an edit changes


class Drawing(Protocol):
    """A picture that draws itself; its repr says all that it depends on."""

    def draw(self, size: int) -> NDArray[np.uint8]:
        """uint8 (size, size, 3)."""


@dataclass(frozen=True)
class Example:
    """A picture (a file or a drawing) with its caption; of an edit also the caption that the result shall deserve.

    `key` names it within its benchmark. Its random numbers depend on `key` alone, or are those of seed `number`.
    `runs` are the pixels that may change, as PIE-Bench writes them: [start, length, ...] over the rows; `truth` is the
    true result.
    """

    key: str
    caption: str
    picture: Path | Drawing | None = None
    target: str = ""
    kind: str = ""
    runs: tuple[int, ...] | None = None
    truth: Drawing | None = None
    blended_words: BlendedWords = None
    number: int | None = None

    @cached_property
    def identity(self) -> str:
        """A hash of all that the example is, its picture's file by content."""
        file = sha256(self.picture) if isinstance(self.picture, Path) else ""
        text = repr(replace(self, picture=None)) + (file or repr(self.picture))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def seed(self, seed: int) -> int:
        if self.number is not None:
            return self.number
        return int.from_bytes(hashlib.sha256(f"{seed}/{self.key}".encode()).digest()[:7], "big")

    def array(self, resolution: int) -> NDArray[np.uint8]:
        """The picture, uint8 (R, R, 3): short side resized, centre cut out, never stretched."""
        if self.picture is None:
            raise ValueError(f"{self.key} is a caption without a picture; this benchmark needs pictures")
        if isinstance(self.picture, Path):
            return np.asarray(resize_and_crop(read_picture(self.picture), resolution)[0])
        return self.picture.draw(resolution)

    def editable(self, resolution: int) -> Tensor | None:
        """1 where the edit may change the picture, else 0, (1, R, R); None where nobody says."""
        if self.truth is not None:
            changed = (self.array(resolution) != self.truth.draw(resolution)).any(-1)
            return torch.from_numpy(changed[None]).float()
        if self.runs is None:
            return None
        mask = torch.from_numpy(decode_mask(self.runs, PIE_BENCH_SIDE))[None, None].float()
        return interpolate(mask, (resolution, resolution), mode="nearest")[0]


def stack(examples: Sequence[Example], resolution: int) -> Tensor:
    """The examples' pictures, (B, 3, R, R) in [-1, 1]."""
    return to_images([example.array(resolution) for example in examples])


@dataclass(frozen=True)
class DataSet:
    """Examples and what goes with them: a name for reports, a hash for the keys of results, scores of their own.

    metrics: by what is done, in place of the task's own. scorers: name -> what makes a scorer, beside the metrics that
    every data set can be scored by. photographs: papers measured on such; scored at PHOTOGRAPH_SIDE.
    """

    examples: Sequence[Example]
    name: str
    identity: str
    photographs: bool = True
    metrics: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scorers: Mapping[str, Any] = field(default_factory=dict)

    def score_side(self, resolution: int) -> int:
        """Pixels of a side of what is scored, of results of this resolution; of photographs at most 512."""
        return min(resolution, PHOTOGRAPH_SIDE) if self.photographs else resolution


DATA_SETS = Registry("data set", "icd_lightning.data_sets", {})
"""Functions of a number of examples, or None, that give a `DataSet`; scenes is measured on where nobody says."""


def read_data(settings: Settings) -> DataSet:
    """Pictures with captions: of a file, or a data set by its name."""
    data = settings.data
    if data is None or str(data) in DATA_SETS:
        return DATA_SETS.find(str(data or "scenes")).load()(settings.count)
    return read_captions(data, settings.images, settings.count)


def read_captions(file: Path, images: Path | None = None, count: int | None = None) -> DataSet:
    """Pictures with captions from a CSV or from COCO's annotations, in the order of their names.

    A CSV has a column `caption` and, unless only captions are needed, `image` or `file_name`; COCO's JSON has `images`
    and `annotations`, of which each image's first caption is taken. Names are relative to `images`, by default the
    file's own folder.
    """
    captions: list[tuple[str, str, str]] = []  # key, name and caption
    if file.suffix.lower() == ".json" and file.is_file():
        content = read_object(file)
        try:
            names = {image["id"]: str(inside(image["file_name"])) for image in content["images"]}
            notes = sorted(content["annotations"], key=lambda note: note["id"], reverse=True)
            first = {note["image_id"]: note["caption"].strip() for note in notes}  # the least id is written last
            captions += [(names[image], names[image], caption) for image, caption in first.items()]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} is not as COCO's caption annotations are ({error!r})") from error
    else:
        for number, row in enumerate(csv_rows(file, ("caption",))):
            name = row.get("image", "")
            captions.append((name or f"caption-{number:05d}", name, row["caption"]))
    folder = file.parent if images is None else images
    examples = [Example(key, caption, folder / name if name else None) for key, name, caption in sorted(captions)]
    return _data_set(examples, file, file, count)


def read_coco_edits(file: Path, images: Path | None = None, count: int | None = None) -> DataSet:
    """Edits from a CSV of image, source, target and blended_words, where an empty cell means no blend."""
    folder, examples = file.parent if images is None else images, []
    for number, row in enumerate(csv_rows(file, ("image", "source", "target"))):
        image, source, target = row["image"], row["source"], row["target"]
        where = f"{file}, row {number + 1}"
        words = read_blended(row["blended_words"], source, target, where) if "blended_words" in row else None
        key = f"{number:05d}-{Path(image).stem}"
        examples.append(Example(key, source, folder / image, target, blended_words=words))
    return _data_set(examples, file, file, count)


def read_pie_bench(folder: Path, *, natural: bool = False, count: int | None = None) -> DataSet:
    """PIE-Bench: 700 edits of ten types (arXiv:2310.01506), or the natural pictures alone, as the iCD paper takes it.

    `folder` holds mapping_file.json and the pictures in annotation_images/. As its authors' reader does, what has
    another type is left out, and what of a mask lies outside of the picture.
    """
    file = folder / "mapping_file.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not PIE-Bench: there is no {file}; name the folder that holds mapping_file.json")
    examples = [_pie_bench_example(folder, key, entry) for key, entry in sorted(read_object(file).items())]
    chosen = [one for one in examples if one is not None and not (natural and "artificial" in str(one.picture))]
    return _data_set(chosen, folder, file, count)


def _pie_bench_example(folder: Path, key: str, entry: Mapping[str, Any]) -> Example | None:
    where = f"{folder / 'mapping_file.json'}, entry {key!r}"
    try:
        types = {str(number): name for number, name in enumerate(PIE_BENCH_TYPES)}
        kind = types.get(str(entry["editing_type_id"]))
        if kind is None:
            log.warning("%s: left out, there is no type %r", where, entry["editing_type_id"])
            return None
        source, target = (entry[name].translate(BRACKETS) for name in ("original_prompt", "editing_prompt"))
        runs = tuple(map(index, entry["mask"]))
        if any(start + length > PIE_BENCH_SIDE**2 for start, length in zip(runs[::2], runs[1::2], strict=False)):
            log.warning("%s: the mask leaves the picture and is cut there", where)
        decode_mask(runs, PIE_BENCH_SIDE)
        words = read_blended(entry.get("blended_word", ""), source, target, where)
        picture = folder / "annotation_images" / inside(entry["image_path"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"{where} is not as PIE-Bench's are ({error!r})") from error
    return Example(key, source, picture, target, kind, runs=runs, blended_words=words)


def decode_mask(runs: Sequence[int], side: int) -> NDArray[np.bool_]:
    """PIE-Bench's mask (side, side), True where editable: runs [start, length, ...] over the rows, and the border."""
    if len(runs) % 2 or len(runs) > side * side or min(runs, default=0) < 0:
        raise ValueError(f"a mask of {len(runs)} numbers is not made of pairs [start, length, ...], none negative")
    mask = np.zeros(side * side, dtype=bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        mask[np.arange(start, min(start + length, mask.size))] = True  # cut at the end, as its authors' decoder does
    mask = mask.reshape(side, side)
    mask[[0, -1]] = mask[:, [0, -1]] = True  # so does this
    return mask


def read_blended(text: str, source: str, target: str, where: str) -> BlendedWords:
    """The first two of "cat dog" or "('cat', 'dog')"; False for none, and with a warning for words of no prompt."""
    try:
        listed = ast.literal_eval(text) if text.startswith(("(", "[")) else text.replace(",", " ").split()
        words = list(map(str, listed))
        if not words:
            return False
        if len(words) == 1:
            raise ValueError("they are not two, one of each prompt")
        for word, prompt in zip(words, (source, target), strict=False):
            tokens = tuple(prompt.split())
            PromptTokens(prompt, (), tokens, ((),) * len(tokens)).places_of(word)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:  # the last two: of brackets in brackets
        log.warning("%s: edited without a blend by the words %.200r: %s", where, text, error)
        return False
    if len(words) > 2:
        log.warning("%s: blended by the first two of the words %.200r", where, text)
    return words[0], words[1]


def _data_set(examples: list[Example], place: Path, file: Path, count: int | None) -> DataSet:
    """The first of the examples that `place` describes, in this file; ValueError for what is wrong."""
    if not examples:
        raise ValueError(f"{file} holds no examples")
    key, times = Counter(example.key for example in examples).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{file}: {key!r} comes {times} times; an example is known by its name")
    for example in examples:
        if wrong := wrong_with(example.caption) or wrong_with(example.target):
            raise ValueError(f"{file}: a caption of {example.key!r} {wrong}")
        if isinstance(example.picture, Path) and not example.picture.is_file():
            raise ValueError(
                f"{file} names {example.picture}, which is not there; give the pictures' folder by --images"
            )
    chosen = examples[:count]
    _check_pictures(frozenset(example.picture for example in chosen if isinstance(example.picture, Path)), file)
    return DataSet(chosen, f"{len(chosen)} of {place.name}", sha256(file))


@lru_cache(1)  # ablations read the same pictures for every row
def _check_pictures(pictures: frozenset[Path], file: Path) -> None:
    """ValueError if some cannot be read: figures are of all pictures, and the last of them may be hours away."""
    wrong = []
    for picture in progress(sorted(pictures), "looking at pictures", len(pictures)):
        try:
            read_picture(picture)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError(
            f"{file} names {len(wrong)} of {len(pictures)} pictures that cannot be used, such as {wrong[0]}: copy them "
            "again, or take them out of it"
        )
