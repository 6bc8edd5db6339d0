"""What runs leave in their folders, read back: rows and means, pictures, and the summaries that name them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from icd_lightning.data.images import read_picture, resize_and_crop, to_images
from icd_lightning.evaluation.decodings import Options
from icd_lightning.evaluation.examples import Example
from icd_lightning.evaluation.report import Style
from icd_lightning.evaluation.statistics import Estimate, bootstrap
from icd_lightning.files import check_file, inside, read_object

ALL = "all"
CONFIG, ROWS, MEANS = "config.json", "rows.parquet", "results.json"
NOT_MEASURED = ("key", "decoding", "kind", "image")  # columns of a row that are no figures


@dataclass(frozen=True, eq=False)
class Results:
    """A run in its folder: a row for each picture and decoding, and its sets' scores, name -> decoding -> value."""

    name: str
    frame: pd.DataFrame
    set_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    folder: Path = Path()
    options: Mapping[str, Options] = field(default_factory=dict)
    styles: Mapping[str, Style] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, folder: Path) -> Results:
        """What `perform` left in a run's folder."""
        means, config = read_object(folder / MEANS), read_object(folder / CONFIG)
        check_file(folder / ROWS)
        try:
            frame = pd.read_parquet(folder / ROWS)
            frame.drop(columns=list(NOT_MEASURED)).iloc[0].astype(float)  # all columns, a row, numbers in it
            of_sets = [score for score in next(iter(means.values()))[ALL] if score not in frame]
            scores = {score: {decoding: kinds[ALL][score] for decoding, kinds in means.items()} for score in of_sets}
            styles = {column: Style(**style) for column, style in config.get("columns", {}).items()}
        except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
            raise ValueError(f"{folder} does not hold what a run leaves ({error!r}): run it again") from error
        return cls(name, frame, scores, folder, config.get("options", {}), styles)

    @property
    def decodings(self) -> list[str]:
        return list(self.frame.decoding.unique())

    @property
    def kinds(self) -> list[str]:
        """Types of edits, in the order of their appearance; none where examples have no types."""
        return [kind for kind in self.frame.kind.unique() if kind]

    @property
    def columns(self) -> list[str]:
        """Names of all figures, of pictures and of sets."""
        return [*(name for name in self.frame if name not in NOT_MEASURED), *self.set_scores]

    def of(self, decoding: str, kind: str = ALL) -> pd.DataFrame:
        frame = self.frame[self.frame.decoding == decoding]
        return frame if kind == ALL else frame[frame.kind == kind]

    def values(self, column: str, decoding: str, kind: str = ALL) -> np.ndarray:
        """One value for each picture, NaN where there is none."""
        return self.of(decoding, kind)[column].to_numpy(dtype=float)

    def mean(self, column: str, decoding: str, kind: str = ALL) -> Estimate | float | None:
        """Mean with confidence interval of a column, or a set's score; None where it means nothing."""
        if column in self.set_scores:
            return self.set_scores[column].get(decoding) if kind == ALL else None
        values = self.values(column, decoding, kind)
        return None if np.isnan(values).all() else bootstrap(values)

    def as_dict(self) -> dict[str, Any]:
        """Means by decoding, in all and by kind, fit for JSON."""
        means: dict[str, Any] = {decoding: {} for decoding in self.decodings}
        for decoding in means:
            for kind in (ALL, *self.kinds):
                found = {column: self.mean(column, decoding, kind) for column in self.columns}
                means[decoding][kind] = {n: v.as_dict() if isinstance(v, Estimate) else v for n, v in found.items()}
        return means


def slug(text: str) -> str:
    """A name for a folder: "w 3, tau 0.8" -> "w-3-tau-0.8"."""
    return re.sub(r"[^\w.=+]+", "-", text).strip("-").lower()


def picture_path(decoding: str, example: Example) -> Path:
    return Path("images") / slug(decoding) / f"{quote(example.key, safe='')}.png"


def is_made_of(file: Path, example: Example) -> bool:
    """Whether a picture is there, and a result of this very example: another data set may have replaced it."""
    try:
        check_file(file)
        with Image.open(file) as picture:
            return picture.info.get("example") == example.identity
    except OSError:
        return False


def read_results(folder: Path, decoding: str, batch: Sequence[Example], resolution: int | None = None) -> Tensor:
    """A decoding's pictures of a batch, (B, 3, R, R), as the PNG files in a run's folder hold them, or resized."""
    pictures = []
    for example in batch:
        file = folder / picture_path(decoding, example)
        if not is_made_of(file, example):
            raise ValueError(f"{file} is not a result of {example.key}: run it again, which makes the picture anew")
        picture = read_picture(file)
        pictures.append(picture if resolution is None else resize_and_crop(picture, resolution)[0])
    return to_images([np.asarray(picture) for picture in pictures])


MADE_BY = {
    "table2.json": "icd ablations",
    "guidance.json": "icd eval --benchmark guidance --method icd,ddim",
    "generation.json": "icd eval --benchmark generation --grid 'tau1=0.2,0.4,0.6,0.8,1 tau2=0.4,0.6,0.8,1'",
}
"""The commands whose summaries the notebooks read."""
AGAIN = "make it again; what was measured before is reused"


def places(folders: Mapping[str, Path], root: Path) -> dict[str, str]:
    """Where folders lie, seen from `root`: so that a whole of results can be moved."""
    return {name: Path(os.path.relpath(folder, root)).as_posix() for name, folder in folders.items()}


def read_summary(file: Path) -> dict[str, Any]:
    """A summary, such as table2.json, which names its `runs`; FileNotFoundError says what makes it."""
    if not file.is_file():
        command = MADE_BY.get(file.name, "icd eval")
        raise FileNotFoundError(
            f"there is no {file}: `{command}` makes it, by default in outputs/; a notebook reads it from there with "
            "ICD_RESULTS set to that folder"
        )
    try:
        return read_object(file)
    except ValueError as error:
        raise ValueError(f"{error}: {AGAIN}") from error


def named_folders(file: Path, key: str) -> dict[str, Path]:
    """Folders that a summary names under this key, by name; ValueError unless they are in its own."""
    summary = read_summary(file)
    try:
        return {name: file.parent / inside(place) for name, place in summary[key].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} does not name its {key}: {AGAIN}") from error


def read_runs(file: Path) -> dict[str, Results]:
    """The runs that a summary was made of, by name."""
    return {name: Results.read(name, folder) for name, folder in named_folders(file, "runs").items()}
