"""Of a folder of results, what the notebooks read: rows, means and scalars, and the few pictures that they show."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from icd_lightning.evaluation.ablations.study import TABLE_2_JSON, UNGUIDED_ROWS, read_study
from icd_lightning.evaluation.ablations.tables import result_files, telling
from icd_lightning.evaluation.curves import read_scalars, thinned, write_scalars
from icd_lightning.evaluation.results import AGAIN, CONFIG, MEANS, ROWS, read_runs
from icd_lightning.files import inside, replaced_folder

SUMMARIES = {"ablations": TABLE_2_JSON, "eval-guidance": "guidance.json", "eval-generation": "generation.json"}
"""Folders under outputs/, and what in them names the runs."""
POINTS = 100  # of each scalar of a training: more than a plot shows


def condense(source: Path, target: Path) -> list[Path]:
    """Copy what the notebooks read of every known result in `source` to `target`, or nothing; return its folders."""
    known = {folder: name for folder, name in SUMMARIES.items() if (source / folder / name).is_file()}
    if not known:
        expected = ", ".join(f"{folder}/{name}" for folder, name in SUMMARIES.items())
        raise FileNotFoundError(f"{source} holds none of {expected}")
    for folder in known:
        if (target / folder).exists():
            raise FileExistsError(f"{target / folder} is there already: remove it first")
    with replaced_folder(target) as temporary:
        _condense(source, temporary, known)
    return [target / folder for folder in known]


def _condense(source: Path, target: Path, known: Mapping[str, str]) -> None:
    if "ablations" in known:  # scalars of all trainings, and pictures of those that the notebook shows
        study = read_study(source / "ablations")
        for folder in study.trainings.values():
            if not (scalars := read_scalars(folder)):
                raise FileNotFoundError(f"{folder} holds no scalars of a training: bring it back, or {AGAIN}")
            write_scalars(target / folder.relative_to(source), thinned(scalars, POINTS))
        keys = telling(study)
        for letter in UNGUIDED_ROWS:
            folder = study.row(letter).runs[0].folder
            _copy(folder, target / folder.relative_to(source), result_files(study, letter, keys))
    for summary, name in known.items():
        for run in read_runs(source / summary / name).values():
            _copy(run.folder, target / run.folder.relative_to(source), [CONFIG, ROWS, MEANS])
        _copy(source / summary, target / summary, [name])


def _copy(source: Path, target: Path, files: list[str]) -> None:
    for file in map(inside, files):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)
