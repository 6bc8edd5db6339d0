"""What several methods made of the same examples: of `icd eval`'s runs, or of plain folders of pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_lightning.data.images import read_picture, resize_and_crop
from icd_lightning.evaluation.benchmark import Benchmark, Settings
from icd_lightning.evaluation.examples import Example
from icd_lightning.evaluation.results import Results, is_made_of, picture_path, read_runs, read_summary
from icd_lightning.texts import csv_rows

FEWEST = 2  # examples and methods; with fewer there is nothing to compare or to average


@dataclass(frozen=True)
class Edits:
    """Examples of a benchmark, and by method the file with its edit of each of them."""

    benchmark: str
    examples: Sequence[Example]
    files: Mapping[str, Sequence[Path]]

    def __post_init__(self) -> None:
        if len(self.examples) < FEWEST or len(self.files) < FEWEST:
            raise ValueError(
                f"{self.benchmark} has {len(self.examples)} edits by {len(self.files)} methods: a study compares at "
                f"least {FEWEST} of each"
            )
        if plain := next((one.key for one in self.examples if one.picture is None or not one.target), None):
            raise ValueError(f"{self.benchmark} is no benchmark of edits: {plain} has no picture with a target prompt")
        for method, files in self.files.items():
            if missing := [file for file in files if not file.is_file()]:
                raise ValueError(
                    f"{method} lacks {len(missing)} of {len(files)} pictures of {self.benchmark}, the first is "
                    f"{missing[0]}: make them, or leave {method} out by --methods"
                )


@dataclass(frozen=True)
class PictureFile:
    """A picture in a file, as a true result is drawn."""

    file: Path

    def draw(self, size: int) -> NDArray[np.uint8]:
        """uint8 (size, size, 3), the centre of the file's."""
        return np.asarray(resize_and_crop(read_picture(self.file), size)[0])


def read_edits(results: Sequence[str], folders: Sequence[str], methods: Sequence[str] | None) -> list[Edits]:
    """One for each benchmark, with the chosen methods. ValueError or FileNotFoundError for what does not fit together.

    Args:
        results: Summaries that `icd eval` wrote, or their folders; or tables of edits, whose pictures are in `folders`.
        folders: NAME=FOLDER of each method.
        methods: Names in the order in which they are compared; by default all.
    """
    tables = [Path(place) for place in results if place.lower().endswith(".csv")]
    if bool(tables) != bool(folders):
        raise ValueError("a table of edits (.csv) and --folders go together: give both, or results of icd eval alone")
    summaries = [summary_in(Path(place)) for place in results if Path(place) not in tables]
    found = [*_of_runs(summaries, methods), *(_of_folders(table, folders, methods) for table in tables)]
    if not found:
        raise ValueError("there is nothing to compare: name results of icd eval, e.g. outputs/eval-piebench")
    names = Counter(edits.benchmark for edits in found)
    if twice := next((name for name, times in names.items() if times > 1), None):
        raise ValueError(f"there are two sets of edits called {twice}: rename one of the tables")
    return found


def summary_in(place: Path) -> Path:
    """The summary that a folder of `icd eval` holds, or the file itself."""
    if not place.is_dir():
        return place
    files = sorted(place.glob("*.json"))
    if len(files) != 1:
        raise ValueError(f"{place} holds {len(files)} summaries of icd eval (.json): name one of them")
    return files[0]


def _chosen(files: Mapping[str, Any], methods: Sequence[str] | None, where: str) -> dict[str, Any]:
    if unknown := [name for name in methods or () if name not in files]:
        raise ValueError(f"{where} has no method {unknown[0]!r}, only {', '.join(files)}")
    return {name: files[name] for name in methods or files}


def _of_runs(summaries: Sequence[Path], methods: Sequence[str] | None) -> Iterable[Edits]:
    """Runs by benchmark; those of one benchmark may come from several summaries."""
    by_benchmark: dict[str, tuple[list[Example], dict[str, Results]]] = {}
    for summary in summaries:
        name, examples = _examples_of(summary)
        known, runs = by_benchmark.setdefault(name, (examples, {}))
        if [one.identity for one in known] != [one.identity for one in examples]:
            raise ValueError(f"{summary} was measured on other examples of {name} than the results before it")
        added = read_runs(summary)
        if twice := runs.keys() & added.keys():
            raise ValueError(f"{summary} has {min(twice)} on {name}, as the results before it have: leave one out")
        runs |= added
    for name, (examples, runs) in by_benchmark.items():
        chosen = _chosen(runs, methods, name)
        yield Edits(name, examples, {method: _pictures(run, examples) for method, run in chosen.items()})


def _examples_of(summary: Path) -> tuple[str, list[Example]]:
    """The benchmark that a summary tells of, and its examples, read again."""
    told = read_summary(summary).get("settings")
    if not isinstance(told, dict) or not isinstance(told.get("benchmark"), str):
        raise ValueError(f"{summary} does not say its benchmark: make it again by icd eval --benchmark")
    try:
        places = {name: Path(told[name]) for name in ("data", "images") if told.get(name)}
        options = {name: told.get(name) for name in ("count", "seed")}
        settings = Settings(told["benchmark"], natural=bool(told.get("natural")), **places, **options)
    except TypeError as error:
        raise ValueError(f"{summary} holds settings that icd eval does not write ({error}): make it again") from error
    benchmark = Benchmark.find(settings.benchmark, told_by=str(summary))
    return settings.benchmark, list(benchmark.read(settings).examples)


def _pictures(run: Results, examples: Sequence[Example]) -> list[Path]:
    """Of a method's first setting, as its report shows them; ValueError for one that is of another example."""
    files = [run.folder / picture_path(run.decodings[0], example) for example in examples]
    for file, example in zip(files, examples, strict=True):
        if file.is_file() and not is_made_of(file, example):
            raise ValueError(f"{file} is not a result of {example.key}: run icd eval again, which makes it anew")
    return files


def _of_folders(table: Path, folders: Sequence[str], methods: Sequence[str] | None) -> Edits:
    """Rows of image and target; source, reference, kind and output, the name of the edit, where they are given."""
    named = dict(folder.partition("=")[::2] for folder in folders)
    if len(set(named.values())) < len(folders) or not all(named) or not all(named.values()):
        raise ValueError(f"folders {' '.join(folders)} must be a NAME=FOLDER for each method, no folder twice")
    if odd := next((name for name in named if not name.isprintable()), None):
        raise ValueError(f"method {odd!r} must have a name that can be printed in a line: give another NAME=FOLDER")
    rows = csv_rows(table, ("image", "target"))
    examples = [_example(table.parent, row) for row in rows]
    key, times = Counter(example.key for example in examples).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{table}: {key!r} comes {times} times: tell the edits apart by a column output")
    chosen = _chosen(named, methods, str(table))
    files = {method: [_edit_in(Path(folder), row) for row in rows] for method, folder in chosen.items()}
    return Edits(table.stem, examples, files)


def _example(folder: Path, row: Mapping[str, str]) -> Example:
    truth = PictureFile(folder / row["reference"]) if row.get("reference") else None
    about = {"target": row["target"], "kind": row.get("kind", ""), "truth": truth}
    return Example(row.get("output") or row["image"], row.get("source", ""), folder / row["image"], **about)


def _edit_in(folder: Path, row: Mapping[str, str]) -> Path:
    """As the table names it, or called as its original, or as `icd edit` calls it."""
    if row.get("output"):
        return folder / row["output"]
    stem = Path(row["image"]).stem
    places = [folder / name for name in (Path(row["image"]).name, f"{stem}.png", f"{stem}-edited.png")]
    return next((place for place in places if place.is_file()), places[1])
