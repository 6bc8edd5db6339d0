"""From raw pairs to shards: look at each, choose, write; go on where a call stopped, and with what is new alone.

A plan lists the units of one call that were new to the set. Its pairs are chosen once all its units have records, and
written to shards of their own, so that what earlier plans have written stays as it is. All that is kept, in `FOLDER`
and beside the shards, depends on the pairs and the recipe alone: not on who did the work, or how often it was stopped.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_lightning.data.curation.duplicates import KEPT, REASONS, Prints
from icd_lightning.data.curation.engine import Engine
from icd_lightning.data.curation.passes import Looking, Piece, Record, Writing
from icd_lightning.data.curation.recipe import Recipe
from icd_lightning.data.curation.sources import Unit, find_units
from icd_lightning.data.images import FORMATS, read_picture
from icd_lightning.data.manifest import Manifest, complete_set, finished_shards, remove_shards
from icd_lightning.data.tally import REASONS as UNREADABLE
from icd_lightning.data.tars import is_local
from icd_lightning.files import read_object, remove_tree, write_json, write_whole
from icd_lightning.progress import progress

logger = logging.getLogger(__name__)

FOLDER = "curation"  # in that of the shards: records of units, plans and what they chose
BINS = 32  # of a histogram
AT_ONCE = 256  # pictures of a benchmark


@dataclass(frozen=True)
class Plan:
    """Units that were new to the set in one call, and the file that says which of their fit pairs were not chosen."""

    number: int
    units: tuple[Unit, ...]
    folder: Path

    @property
    def choice(self) -> Path:
        return self.folder / f"choice-{self.number:04d}.npy"

    def save(self) -> None:
        write_json(self.folder / f"plan-{self.number:04d}.json", {"units": [asdict(unit) for unit in self.units]})

    def chosen(self) -> NDArray[np.int8]:
        """For all pairs of the plan, in order: KEPT, or why a pair that is fit was dropped."""
        return np.load(self.choice, allow_pickle=False)


Reasons = tuple[Unit, Record, NDArray[np.str_]]


@dataclass(frozen=True)
class Curation:
    """A set that is being made, or was."""

    folder: Path
    recipe: Recipe
    shard_size: int

    @cached_property
    def looking(self) -> Looking:
        recipe = self.recipe
        return Looking(recipe.stages, recipe.duplicates is not None, recipe.caption_field, self.folder / FOLDER)

    @property
    def settings(self) -> dict[str, Any]:
        return self.recipe.settings() | {"shard_size": self.shard_size}

    def plans(self) -> list[Plan]:
        folder = self.folder / FOLDER
        files = sorted(folder.glob("plan-*.json"))
        try:
            units = [tuple(Unit(**unit) for unit in read_object(file)["units"]) for file in files]
        except (TypeError, KeyError) as error:
            raise ValueError(f"{folder} holds no plans of a curation ({error!r}): pass --overwrite") from error
        return [Plan(number, of_plan, folder) for number, of_plan in enumerate(units)]

    def record(self, unit: Unit) -> Record:
        return Record.load(self.looking.path(unit))

    def reasons(self, plan: Plan) -> Iterator[Reasons]:
        """Each unit, its record, and why each of its pairs was dropped in the end; "" of what was kept."""
        verdicts, start = np.array(REASONS)[plan.chosen()], 0
        for unit in plan.units:
            record = self.record(unit)
            of_unit = verdicts[start : start + len(record.key)]
            yield unit, record, np.where(record.reason == "", of_unit, record.reason)
            start += len(record.key)


def curate(
    inputs: Sequence[str], out: str | Path, recipe: Recipe, *, shard_size: int, engine: Engine, overwrite: bool = False
) -> tuple[Manifest, bool]:
    """Write what the recipe keeps of the inputs to shards in `out`; returns their manifest, and if anything was new.

    Raises ValueError if `out` holds another set, an input has changed since it was curated, or nothing was kept.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size {shard_size} must be at least 1")
    if not is_local(str(out)):
        raise ValueError(
            f"{out} is elsewhere: give a folder that all workers see, and copy the shards there afterwards"
        )
    curation = Curation(Path(out), recipe, shard_size)
    if curation.folder.exists() and not curation.folder.is_dir():
        raise ValueError(f"cannot write to {out}: that is a file, give a folder")
    units = find_units(inputs)
    if any(Path(unit.url).parent == curation.folder.resolve() for unit in units if is_local(unit.url)):
        raise ValueError(f"{out} holds the pairs themselves: choose another folder for what is kept of them")
    benchmark = _batches(recipe.duplicates.benchmarks if recipe.duplicates else ())
    if overwrite:
        remove_shards(curation.folder)
        remove_tree(curation.folder / FOLDER)
    manifest = _begun(curation)
    plans = _planned(curation, units)
    if manifest.complete and manifest.parameters["plans"] == len(plans):
        return manifest, False
    with engine.started() as each:
        for plan in plans[manifest.parameters["plans"] :]:
            _look(curation, plan, each)
            if not plan.choice.exists():
                _choose(curation, plans[: plan.number + 1], Prints.join(each(_benchmark_prints, benchmark)))
            manifest = _write(curation, plan, each)
    return manifest, True


def _begun(curation: Curation) -> Manifest:
    """The manifest of the set as it is; a new one where there is none yet."""
    manifest = Manifest.of_set(curation.folder, curation.settings, partly=True)
    if manifest is None:
        manifest = Manifest({**curation.settings, "plans": 0}, complete=False)
        manifest.save(curation.folder)
    return manifest


def _planned(curation: Curation, units: Sequence[Unit]) -> list[Plan]:
    plans = curation.plans()
    known = {unit.place: unit for plan in plans for unit in plan.units}
    for unit in units:
        if unit.place in known and known[unit.place] != unit:
            raise ValueError(f"{unit.url} has changed since it was curated: choose another folder or pass --overwrite")
    if new := [unit for unit in units if unit.place not in known]:
        plans.append(Plan(len(plans), tuple(new), curation.folder / FOLDER))
        plans[-1].save()
    return plans


def _look(curation: Curation, plan: Plan, each: Callable[..., Iterator[Any]]) -> None:
    missing = [unit for unit in plan.units if not curation.looking.path(unit).exists()]
    if missing:
        for damage in filter(None, progress(each(curation.looking, missing), "looking at pairs", len(missing))):
            logger.warning("%s", damage)


def _choose(curation: Curation, plans: Sequence[Plan], benchmark: Prints) -> None:
    """Decide which of the last plan's fit pairs are kept: none that a benchmark, an earlier plan or itself has."""
    *earlier, plan = plans
    records = [curation.record(unit) for unit in plan.units]
    fit = np.flatnonzero(np.concatenate([record.reason == "" for record in records]))
    chosen = np.full(sum(len(record.key) for record in records), KEPT, np.int8)
    if duplicates := curation.recipe.duplicates:
        before = [r.prints.take(why == "") for old in earlier for _, r, why in curation.reasons(old)]
        pixels = np.concatenate([record.pixels for record in records])
        order = fit[np.argsort(-pixels[fit], kind="stable")]
        new = Prints.join(record.prints for record in records).take(order)
        verdicts = duplicates.verdicts(Prints.join((benchmark, *before, new)), len(benchmark.hash))
        chosen[order] = verdicts[len(verdicts) - len(order) :]
    write_whole(plan.choice, partial(_save_array, chosen))


def _save_array(array: NDArray, path: Path) -> None:
    with path.open("wb") as file:  # by its path, numpy would add an ending
        np.save(file, array, allow_pickle=False)


def _batches(folders: Sequence[str]) -> list[list[str]]:
    files = []
    for folder in folders:
        endings = {f".{name.lower()}" for name in (*FORMATS, "JPG")}
        found = sorted(str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in endings)
        if not found:
            raise ValueError(f"benchmark {folder} holds no pictures: name a folder of .jpg, .png or .webp files")
        files += found
    remaining = iter(files)
    return list(iter(lambda: list(islice(remaining, AT_ONCE)), []))


def _benchmark_prints(files: Sequence[str]) -> Prints:
    return Prints.join(Prints.of(Path(file).read_bytes(), read_picture(file)) for file in files)


def _write(curation: Curation, plan: Plan, each: Callable[..., Iterator[Any]]) -> Manifest:
    folder, manifest = curation.folder, Manifest.load(curation.folder)
    pieces = _pieces(plan, list(curation.reasons(plan)), curation.shard_size, len(manifest.shards))
    done = finished_shards(folder)
    if missing := [piece for piece in pieces if piece.name not in done]:
        replace(manifest, complete=False).save(folder)
        writing = each(Writing(curation.looking, curation.recipe.resolution, folder), missing)
        deque(progress(writing, f"writing {folder}", len(missing)), maxlen=0)
    parameters = {**curation.settings, "plans": plan.number + 1, **summary(curation, plan.number + 1)}
    for stale in (folder / FOLDER).glob(".*.tmp"):  # of calls that were killed
        stale.unlink(missing_ok=True)
    if not parameters["kept"]:
        dropped = ", ".join(f"{reason} {count}" for reason, count in parameters["dropped"].items()) or "there were none"
        readable = parameters["dropped"].keys() - set(UNREADABLE)
        remedy = "change the recipe" if readable else "none could be read, see that the inputs are whole"
        raise ValueError(f"{folder}: no pair was kept ({dropped}): {remedy}, and pass --overwrite")
    return complete_set(folder, parameters, [*manifest.shards, *(piece.name for piece in pieces)])


def _pieces(plan: Plan, reasons: Sequence[Reasons], shard_size: int, first: int) -> list[Piece]:
    """The shards of a plan, numbered from `first` on: as few as hold its pairs, as equal as they can be."""
    rows_of = [np.flatnonzero(why == "") for _, _, why in reasons]
    unit_of = np.repeat(np.arange(len(rows_of)), list(map(len, rows_of)))
    count = -(-len(unit_of) // shard_size) or 1
    pieces = []
    for units, rows in zip(np.array_split(unit_of, count), np.array_split(np.concatenate(rows_of), count), strict=True):
        parts = tuple((plan.units[unit], tuple(rows[units == unit].tolist())) for unit in np.unique(units).tolist())
        pieces += [Piece(f"{first + len(pieces):05d}.tar", parts)] if parts else []
    return pieces


def summary(curation: Curation, plans: int) -> dict[str, Any]:
    """Counts of all pairs by reason, what was damaged, and a histogram of each stage's values."""
    counts, damaged = Counter[str](), list[str]()
    for plan in curation.plans()[:plans]:
        for _, record, why in curation.reasons(plan):
            counts.update(why.tolist())
            damaged += [record.damage] if record.damage else []
    read, kept = counts.total(), counts.pop("", 0)
    histograms = {stage.name: _histogram(curation, stage.name, plans) for stage in curation.recipe.stages}
    about = {"read": read, "kept": kept, "dropped": dict(sorted(counts.items())), "damaged": damaged}
    return about | {"histograms": histograms}


def _histogram(curation: Curation, stage: str, plans: int) -> dict[str, list[float]]:
    """Counts of a stage's values in bins between the least and the largest, read twice so that few are in memory."""

    def values() -> Iterator[NDArray[np.float32]]:
        for plan in curation.plans()[:plans]:
            for unit in plan.units:
                column = curation.record(unit).values[stage]
                yield column[np.isfinite(column)]

    ends = [(float(one.min()), float(one.max())) for one in values() if len(one)]
    low, high = min((end[0] for end in ends), default=0.0), max((end[1] for end in ends), default=1.0)
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    counts = sum((np.histogram(one, edges)[0] for one in values()), np.zeros(BINS, np.int64))
    return {"edges": edges.round(6).tolist(), "counts": counts.tolist()}
