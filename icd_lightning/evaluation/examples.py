"""What benchmarks are made of: pictures with captions, and edits with target captions, masks or true results.

Everything comes as a list of `Example`: held-out scenes of the tiny world, COCO's annotations or any CSV of image and
caption, PIE-Bench's folder, a CSV of COCO edits. Pictures are read when they are needed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from icd_lightning.data.images import read_picture, resize_and_crop, to_images
from icd_lightning.editing.prompt_to_prompt.alignment import PromptTokens
from icd_lightning.tiny.rendering import render
from icd_lightning.tiny.scenes import EDITS, Scene, random_edit, scene_at

log = logging.getLogger(__name__)

BlendedWords = tuple[str, str] | Literal[False] | None
"""By which words of source and target an edit blends; False: by none; None: nobody says."""

PIE_BENCH_SIDE = 512
PIE_BENCH_TYPES = (
    *("random", "change object", "add object", "delete object", "change attribute content"),
    *("change attribute pose", "change attribute color", "change attribute material", "change background"),
    "change style",
)
"""By editing_type_id, "0" to "9"."""


@dataclass(frozen=True)
class Example:
    """A picture (a file or a scene) with its caption; of an edit also the caption that the result shall deserve.

    `key` names it within its benchmark, and its random numbers depend on `key` alone. `runs` are the pixels that may
    change, as PIE-Bench writes them: [start, length, start, length, ...] over the rows; `truth` is the true result.
    """

    key: str
    caption: str
    picture: Path | Scene | None = None
    target: str = ""
    kind: str = ""
    runs: tuple[int, ...] | None = None
    truth: Scene | None = None
    blended_words: BlendedWords = None

    def seed(self, seed: int) -> int:
        """Of this example's random numbers, in a run with this seed."""
        return int.from_bytes(hashlib.sha256(f"{seed}/{self.key}".encode()).digest()[:7], "big")

    def array(self, resolution: int) -> NDArray[np.uint8]:
        """The picture, uint8 (R, R, 3): short side resized, centre cut out, never stretched."""
        if self.picture is None:
            raise ValueError(f"{self.key} is a caption without a picture; this benchmark needs pictures")
        if isinstance(self.picture, Scene):
            return render(self.picture, resolution)
        return np.asarray(resize_and_crop(read_picture(self.picture), resolution)[0])

    def editable(self, resolution: int) -> Tensor | None:
        """1 where the edit may change the picture, else 0, (1, R, R); None where nobody says."""
        if self.truth is not None:
            changed = (self.array(resolution) != render(self.truth, resolution)).any(-1)
            return torch.from_numpy(changed[None]).float()
        if self.runs is None:
            return None
        mask = torch.from_numpy(decode_mask(self.runs, PIE_BENCH_SIDE))[None, None].float()
        return interpolate(mask, (resolution, resolution), mode="nearest")[0]


def stack(examples: Sequence[Example], resolution: int) -> Tensor:
    """The examples' pictures, (B, 3, R, R) in [-1, 1]."""
    return to_images([example.array(resolution) for example in examples])


def decode_mask(runs: Sequence[int], side: int) -> NDArray[np.bool_]:
    """PIE-Bench's mask (side, side), True where editable: runs [start, length, ...] over the rows, and the border."""
    if len(runs) % 2:
        raise ValueError(f"a mask of {len(runs)} numbers is not made of pairs [start, length, ...]")
    mask = np.zeros(side * side, dtype=bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        if start < 0 or length < 0 or start + length > mask.size:
            raise ValueError(f"a mask's run of {length} pixels from {start} leaves the {side} x {side} picture")
        mask[start : start + length] = True
    mask = mask.reshape(side, side)
    mask[[0, -1]] = mask[:, [0, -1]] = True  # PIE-Bench's own loader does so
    return mask


# --- the tiny world ---------------------------------------------------------------------------------------------------


def scene_examples(count: int, seed: int) -> list[Example]:
    """The first `count` held-out scenes with their captions."""
    scenes = [scene_at(seed, index) for index in range(count)]
    return [Example(f"scene-{seed}-{i:05d}", scene.caption(), scene) for i, scene in enumerate(scenes)]


def scene_edits(count: int, seed: int) -> list[Example]:
    """`count` edits of held-out scenes, the kinds in EDITS taking turns, each with its true result.

    An edit that a scene is not fit for ("add" to two objects, "remove" from one) takes the next scene that is.
    """
    examples: list[Example] = []
    index = 0
    while len(examples) < count:
        scene, kind = scene_at(seed, index), EDITS[len(examples) % len(EDITS)]
        if len(scene.things) != {"add": 1, "remove": 2}.get(kind, len(scene.things)):
            index += 1
            continue
        truth, _ = random_edit(scene, np.random.default_rng((seed, index)), kind)
        key = f"edit-{seed}-{index:05d}"
        examples.append(Example(key, scene.caption(), scene, truth.caption(), kind, truth=truth))
        index += 1
    return examples


# --- files ------------------------------------------------------------------------------------------------------------


def read_captions(file: Path, images: Path | None = None) -> list[Example]:
    """Pictures with captions from a CSV or from COCO's annotations, in the order of their names.

    A CSV has a column `caption` and, unless only captions are needed, `image` or `file_name`; COCO's JSON has `images`
    and `annotations`, of which each image's first caption is taken. Names are relative to `images`, by default the
    file's own folder.
    """
    _check_file(file)
    pairs = _coco_pairs(file) if file.suffix.lower() == ".json" else _csv_pairs(file)
    folder = file.parent if images is None else images
    examples = [Example(key, caption, folder / name if name else None) for key, name, caption in sorted(pairs)]
    return _checked(examples, file)


def read_coco_edits(file: Path, images: Path | None = None) -> list[Example]:
    """Edits from a CSV with columns file_name, old_caption, edited_caption and, if it has it, blended_words."""
    _check_file(file)
    folder, examples = file.parent if images is None else images, []
    for number, row in enumerate(_csv_rows(file, ("file_name", "old_caption", "edited_caption"))):
        source, target, text = row["old_caption"], row["edited_caption"], row.get("blended_words") or ""
        words = _blended(text, source, target, f"{file}, row {number + 1}") if text.strip() else None
        key, place = f"{number:05d}-{Path(row['file_name']).stem}", folder / row["file_name"]
        examples.append(Example(key, source, place, target, blended_words=words))
    return _checked(examples, file)


def read_pie_bench(folder: Path, *, natural: bool = False) -> list[Example]:
    """PIE-Bench: 700 edits of ten types (arXiv:2310.01506), or the natural pictures alone, as the iCD paper takes it.

    `folder` holds mapping_file.json and the pictures in annotation_images/.
    """
    file = folder / "mapping_file.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not PIE-Bench: there is no {file}; name the folder that holds mapping_file.json")
    examples = []
    for key, entry in sorted(_json(file).items()):
        try:
            path, kind = entry["image_path"], PIE_BENCH_TYPES[int(entry["editing_type_id"])]
            source, target = (entry[name].translate(BRACKETS) for name in ("original_prompt", "editing_prompt"))
            runs = tuple(int(value) for value in entry["mask"])
            words = _blended(entry.get("blended_word", ""), source, target, f"{file}, {key}")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"{file}: entry {key!r} is not as PIE-Bench's are ({error!r})") from error
        if natural and "artificial" in path:
            continue
        place = folder / "annotation_images" / path
        examples.append(Example(key, source, place, target, kind, runs=runs, blended_words=words))
    return _checked(examples, file)


BRACKETS = str.maketrans("", "", "[]")
"""Around the words that an edit changes."""


def _blended(text: str, source: str, target: str, where: str) -> BlendedWords:
    """The two words; False, with a warning, where they are not two or one is missing from its prompt, and for none."""
    words = text.replace(",", " ").split()
    if not words:
        return False
    try:
        old, new = words
        for word, prompt in ((old, source), (new, target)):
            _words_of(prompt).places_of(word)
    except ValueError as error:
        reason = error if len(words) == 2 else "they are not two, one of each prompt"
        log.warning("%s: edited without a blend by the words %r: %s", where, text, reason)
        return False
    return old, new


def _words_of(prompt: str) -> PromptTokens:
    """Its words, as edits look for them, without tokens."""
    words = tuple(prompt.split())
    return PromptTokens(prompt, (), words, ((),) * len(words))


def _coco_pairs(file: Path) -> list[tuple[str, str, str]]:
    content = _json(file)
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        first: dict[Any, dict] = {}
        for note in content["annotations"]:
            known = first.setdefault(note["image_id"], note)
            if note["id"] < known["id"]:
                first[note["image_id"]] = note
        return [(names[image], names[image], note["caption"].strip()) for image, note in first.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not as COCO's caption annotations are ({error!r})") from error


def _csv_pairs(file: Path) -> list[tuple[str, str, str]]:
    pairs = []
    for number, row in enumerate(_csv_rows(file, ("caption",))):
        name = row.get("image") or row.get("file_name") or ""
        pairs.append((name or f"caption-{number:05d}", name, row["caption"]))
    return pairs


def _csv_rows(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            rows, found = list(reader), reader.fieldnames or []
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as CSV ({error})") from error
    if missing := [name for name in columns if name not in found]:
        raise ValueError(f"{file} has no column {missing[0]!r}, only {', '.join(found) or 'none'}")
    for number, row in enumerate(rows):
        if empty := [name for name in columns if not row[name]]:
            raise ValueError(f"{file}, row {number + 1}: {empty[0]} is empty")
    return rows


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"there is no file {file}: give a CSV, or COCO's annotations as JSON")


def _checked(examples: list[Example], file: Path) -> list[Example]:
    if not examples:
        raise ValueError(f"{file} holds no examples")
    key, times = Counter(example.key for example in examples).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{file}: {key!r} comes {times} times; an example is known by its name")
    for example in examples:
        if isinstance(example.picture, Path) and not example.picture.is_file():
            raise ValueError(
                f"{file} names {example.picture}, which is not there; give the pictures' folder by --images"
            )
    return examples
