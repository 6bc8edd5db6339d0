"""What `icd edit` is asked for, read and checked before torch is loaded: a mistake is answered at once."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from icd_lightning.editing.baselines.registry import METHODS as BASELINES
from icd_lightning.editing.limits import SHORT_NAMES, check_fraction, check_guidance_scale, check_seed

OURS = {
    "icd": "as the model is edited best, by one of the next two",
    "icd_p2p": "Prompt-to-Prompt: borrow attention from the picture; slower by half",
    "icd_swap": "follow the source prompt while t > swap_tau T",
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class EditSettings:
    """How to edit; None is the method's or the model's own."""

    method: str = "icd"
    guidance_scale: float | None = None
    tau: float | None = None
    swap_tau: float | None = None
    cross_replace: float | None = None
    self_replace: float | None = None
    amplify: float | str | dict[str, float] | None = None
    blend: str | None = None
    alignment: str | None = None
    blend_threshold: float | None = None
    blend_from: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        named = self.method.lower().replace("-", "_")
        if named in OURS or named in BASELINES:
            object.__setattr__(self, "method", named)
        elif not Path(self.method).is_file():
            names = ", ".join([*OURS, *BASELINES])
            raise ValueError(f"no method {named!r}; there is: {names}, or a YAML file as in conf/method")
        if self.guidance_scale is not None:
            check_guidance_scale(self.guidance_scale)
        for name in ("tau", "swap_tau", "cross_replace", "self_replace", "blend_threshold", "blend_from"):
            if (value := getattr(self, name)) is not None:
                check_fraction(value, name)
        if isinstance(self.amplify, str):
            object.__setattr__(self, "amplify", factors(self.amplify))
        amplified = self.amplify.values() if isinstance(self.amplify, dict) else [self.amplify or 0.0]
        if not all(0 <= factor < float("inf") for factor in amplified):
            raise ValueError(f"amplify {self.amplify} must be 0 or more: 1 leaves attention alone, 0 takes it away")
        if self.blend is not None and self.blend != "none" and len(self.blend.split()) != 2:
            raise ValueError(f"blend {self.blend!r} must be a word of the source and one of the target, or none")
        if self.alignment not in (None, "auto", "replace", "refine"):
            raise ValueError(f"alignment {self.alignment!r} is none of: auto, replace, refine")
        check_seed(self.seed)
        self._check_control()

    def _check_control(self) -> None:
        """Only what the method reads may be given."""
        given = list(self.control)
        if given and self.method == "icd_swap":
            raise ValueError(f"method icd_swap borrows no attention: leave out {', '.join(given)}, or take icd_p2p")
        if self.swap_tau is None:
            return
        if given:
            raise ValueError(f"swap_tau is of edits without {', '.join(given)}: leave out one or the other")
        if self.method == "icd_p2p":
            raise ValueError("method icd_p2p swaps no prompt: leave out swap_tau, or take icd_swap")

    @property
    def control(self) -> dict[str, float | bool | str | dict[str, float] | tuple[str, ...]]:
        """The settings given of a `PromptToPrompt`."""
        names = ("cross_replace", "self_replace", "amplify", "alignment", "blend_threshold", "blend_from")
        found: dict = {name: getattr(self, name) for name in names}
        if self.blend is not None:
            found["blend"] = False if self.blend == "none" else tuple(self.blend.split())
        return {name: value for name, value in found.items() if value is not None}


def factors(text: str) -> float | dict[str, float]:
    """A factor of attention, "4", or those of words, "lego=3 red=0"; ValueError for anything else."""
    try:
        if "=" not in text:
            return float(text)
        words = [pair.rpartition("=") for pair in text.split()]
        if all(word for word, _, _ in words):
            return {word: float(factor) for word, _, factor in words}
    except ValueError:
        pass
    raise ValueError(f"amplify {text!r} must be a number, or words with numbers, as in 'lego=3 red=0'")


@dataclass(frozen=True)
class Size:
    """Pixels of the result; None is the model's own."""

    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be 1 or more")


GRID_KEYS = {"w": "guidance_scale", **SHORT_NAMES} | {
    field.name: field.name for field in fields(EditSettings) if field.name not in ("method", "blend", "alignment")
}
"""What a grid may vary, by its names on the command line."""


def parse_grid(words: Sequence[str]) -> dict[str, list[float]]:
    """Read `tau=0.6,0.7 cross=0.2,0.4`; ValueError for what is no setting or no number."""
    grid: dict[str, list[float]] = {}
    for word in words:
        key, _, values = word.partition("=")
        name = GRID_KEYS.get(key.replace("-", "_"))
        if name is None:
            raise ValueError(f"grid {word!r} must be NAME=VALUE,VALUE ..., NAME one of {', '.join(GRID_KEYS)}")
        if name in grid:
            raise ValueError(f"grid varies {key} twice: give all its values at once")
        try:
            grid[name] = [int(value) if name == "seed" else float(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"grid {word!r}: {values!r} are not numbers separated by commas") from None
    return grid


def variants(settings: EditSettings, grid: dict[str, list[float]]) -> list[EditSettings]:
    """The settings of every cell, the first key varying fastest."""
    keys = list(grid)[::-1]
    cells = itertools.product(*(grid[key] for key in keys))
    return [replace(settings, **dict(zip(keys, cell, strict=True))) for cell in cells]


@dataclass(frozen=True)
class Edit:
    """One picture to edit: what it shows, what it shall show, and where that goes."""

    image: Path
    source: str
    target: str
    output: Path

    @property
    def about(self) -> dict[str, str]:
        """For the result's metadata."""
        return {"image": self.image.name, "source": self.source, "target": self.target}

    def check(self) -> None:
        """ValueError for what cannot be an edit, as far as a look at its names tells."""
        if not self.image.is_file():
            raise ValueError(f"there is no picture at {self.image}")
        for name in ("source", "target"):
            if not getattr(self, name):
                raise ValueError(
                    f"{self.image} has no {name} prompt: say what it shows (source) and shall show (target)"
                )
        if self.output.suffix.lower() != ".png":
            raise ValueError(f"output {self.output} will be a png file: give it a name that ends in .png")
        if self.output.resolve() == self.image.resolve():
            raise ValueError(f"output {self.output} is the picture itself: name another --output")


def several_edits(place: Path, source: str | None, target: str | None, output: str | None) -> list[Edit]:
    """The edits that a folder of pictures, or a CSV file with columns image, source, target (and output), stands for.

    The prompts given go for every picture that says no other. Results go to the folder `output`, by default
    name-edited beside folder or file. ValueError for a file without the columns, and for two edits of one output.
    """
    if output is not None and (Path(output).is_file() or Path(output).suffix.lower() in SUFFIXES):
        raise ValueError(f"output {output} must be a folder, for the results of several edits")
    folder = Path(output) if output else place.with_name(f"{place.resolve().stem}-edited")
    rows = _folder_rows(place) if place.is_dir() else _csv_rows(place)
    edits, seen = [], Counter[str]()
    for row in rows:
        image = place / row["image"] if place.is_dir() else place.parent / row["image"]
        name = row.get("output") or ""
        if not name:
            seen[image.stem] += 1
            number = f"-{seen[image.stem]}" if seen[image.stem] > 1 else ""
            name = f"{image.stem}-edited{number}.png"
        edits.append(Edit(image, row.get("source") or source or "", row.get("target") or target or "", folder / name))
    if twice := [str(path) for path, times in Counter(edit.output for edit in edits).items() if times > 1]:
        raise ValueError(
            f"{place}: {', '.join(twice[:3])} would be written more than once: give each edit its own output"
        )
    return edits


def _folder_rows(folder: Path) -> list[dict[str, str]]:
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not names:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    return [{"image": name} for name in names]


def _csv_rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        raise ValueError(f"there is no table at {file}")
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, skipinitialspace=True)
            rows = [
                {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)} for row in reader
            ]
            columns = reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read as a CSV file in UTF-8 ({error})") from error
    if "image" not in columns:
        raise ValueError(f"{file} has no column image; it needs image, source and target, and may have output")
    if not rows:
        raise ValueError(f"{file} has no rows below its heading")
    return rows
