"""A page of what a curation kept and dropped: counts, histograms, and pictures of each kind, for people to look at."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from icd_lightning.data.curation.curate import Curation
from icd_lightning.data.curation.passes import open_pair
from icd_lightning.data.curation.recipe import Recipe, build_recipe
from icd_lightning.data.curation.sources import Unit, read_unit
from icd_lightning.data.images import resize_and_crop
from icd_lightning.data.manifest import MANIFEST, Manifest
from icd_lightning.data.tally import RejectedError
from icd_lightning.data.tars import Raw
from icd_lightning.evaluation.report import Curve, Panel, Picture, Report, Section, Table
from icd_lightning.texts import printable

SIDE = 192  # pixels of an example
KEPT = "kept"
IN_ROW = 4

Example = tuple[str, Picture | None]
"""What is written beside a picture, and the picture, cut to a square; None for one that cannot be read."""


def curation_report(folder: str | Path, examples: int) -> Report:
    """Of what `icd data curate` wrote to `folder`; ValueError if that is no finished set of it."""
    folder = Path(folder)
    manifest = Manifest.load(folder)
    if manifest is None or "plans" not in manifest.parameters or not manifest.complete:
        raise ValueError(f"{folder} has no complete {MANIFEST} of a curation: run `icd data curate` to its end first")
    about = manifest.parameters
    recipe, shard_size = _recipe(about, folder / MANIFEST)
    counts = {KEPT: about["kept"]} | about["dropped"]
    rows = tuple((reason, count, 100 * count / about["read"]) for reason, count in counts.items())
    found = _examples(Curation(folder, recipe, shard_size), set(counts), examples)
    sections: list[Section] = [Table("What became of the pairs", "", ("outcome", "pairs", "%"), rows)]
    sections += [_histogram(recipe, name, histogram) for name, histogram in about["histograms"].items()]
    sections += [_panel(reason, found[reason]) for reason in counts if found[reason]]
    numbers = {"pairs read": about["read"], "kept": about["kept"], "shards": len(manifest.shards)}
    summary = tuple((f"{number:,}", name) for name, number in numbers.items())
    facts = {"damaged": "; ".join(map(printable, about["damaged"]))} if about["damaged"] else {}
    return Report("Curated pairs", "What was kept, what was dropped, and why.", summary, tuple(sections), facts)


def _histogram(recipe: Recipe, name: str, histogram: dict[str, list[float]]) -> Curve:
    stage = next(stage for stage in recipe.stages if stage.name == name)
    ends = (("at least", stage.least), ("at most", stage.most))
    limits = [f"{word} {value:g}" for word, value in ends if value is not None]
    edges, counts = histogram["edges"], histogram["counts"]
    series = {"pairs": (np.repeat(edges, 2)[1:-1].tolist(), np.repeat(counts, 2).tolist())}
    return Curve(f"Values of {name}", f"Kept: {', '.join(limits)}.", name, "pairs", series)


def _examples(curation: Curation, reasons: set[str], number: int) -> dict[str, list[Example]]:
    """Up to `number` pairs of each outcome, (label, picture), of the first units that have them."""
    found: dict[str, list[Example]] = defaultdict(list)
    for plan in curation.plans():
        for unit, record, whys in curation.reasons(plan):
            outcomes = np.where(whys == "", KEPT, whys)
            wanted = {}
            for reason in sorted(reasons):
                rows = np.flatnonzero(outcomes == reason)[: number - len(found[reason])]
                wanted |= dict.fromkeys(rows.tolist(), reason)
            values = [{name: value[row] for name, value in record.values.items()} for row in range(len(whys))]
            for row, raw in _rows(unit, wanted):
                found[wanted[row]].append(_example(raw, values[row], curation.recipe.caption_field))
    return found


def _rows(unit: Unit, wanted: dict[int, str]) -> list[tuple[int, Raw]]:
    """The raw samples of these rows; none if the unit is not there any more."""
    last = max(wanted, default=-1)
    rows = zip(range(last + 1), read_unit(unit, []), strict=False) if wanted else ()
    return [(row, raw) for row, raw in rows if row in wanted]


def _example(raw: Raw, values: dict[str, float], caption_field: str | None) -> Example:
    measured = ", ".join(f"{name} {value:.3g}" for name, value in values.items() if np.isfinite(value))
    try:
        sample = open_pair(raw, caption_field)
    except RejectedError as error:
        return error.detail[:160], None
    return f"{printable(sample.caption)[:120]} ({measured})", np.asarray(resize_and_crop(sample.picture, SIDE)[0])


def _panel(reason: str, examples: list[Example]) -> Panel:
    rows = []
    for start in range(0, len(examples), IN_ROW):
        labels, pictures = zip(*examples[start : start + IN_ROW], strict=True)
        text = "\n".join(f"{number}: {label}" for number, label in enumerate(labels, 1))
        rows.append((text, (*pictures, *(None,) * (IN_ROW - len(pictures)))))
    columns = tuple(map(str, range(1, IN_ROW + 1)))
    return Panel("Kept" if reason == KEPT else f"Dropped for {reason}", "", columns, tuple(rows))


def _recipe(settings: dict[str, Any], file: Path) -> tuple[Recipe, int]:
    """The recipe and the size of shards that a manifest tells of."""
    stages = [{name: stage[name] for name in ("class_path", "init_args")} for stage in settings["stages"]]
    others = {name: settings[name] for name in ("duplicates", "resolution", "caption_field")}
    return build_recipe({"stages": stages, **others}, file), settings["shard_size"]
