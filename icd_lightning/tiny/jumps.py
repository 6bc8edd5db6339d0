"""What distillation is for: students of one to four jumps each way, beside the same jumps of the untrained network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from icd_lightning.data.images import to_pictures
from icd_lightning.evaluation.benchmark import Measured, Settings
from icd_lightning.evaluation.examples import stack
from icd_lightning.evaluation.methods import Models
from icd_lightning.evaluation.report import Panel, Report, Style, Table, markdown_table, write_report
from icd_lightning.evaluation.results import read_results
from icd_lightning.evaluation.suite import Suite
from icd_lightning.files import write_text
from icd_lightning.models.students import DIRECTIONS
from icd_lightning.tiny.benchmarks import LABELS, STYLES, TOUR, about, figures

NUMBERS = (1, 2, 3, 4)
SHOWN = 5  # pictures of a panel
*_RETURNED, _GENERATED = TOUR.tasks
BENCHMARK = replace(TOUR, tasks=(*_RETURNED, replace(_GENERATED, metrics=("attributes", "tiny-fd"))))
"""The tour, and how far generated pictures lie from true ones."""


def measured_as(count: int) -> Settings:
    """On so many held-out pictures; ValueError for a count that cannot be."""
    return Settings(f"{__name__}.BENCHMARK", methods=("untrained", "icd"), count=count)


def measure_jumps(trainings: Mapping[int, Path], models: Models, settings: Settings, root: Path) -> dict[int, Measured]:
    """The tour of each number's students, in their training's folder, and of its untrained jumps."""
    measured = {}
    for number, folder in trainings.items():
        students = {direction: str(folder / direction) for direction in DIRECTIONS}
        measured[number] = Suite(settings, replace(models, **students), root / "runs" / str(number)).measure()
    return measured


def jumps_table(measured: Mapping[int, Measured]) -> Table:
    """Reconstruction, edits and generation by number of jumps, untrained and trained."""
    rows = []
    for number, one in measured.items():
        for made, (name, result) in zip(one.results["pictures"], figures(one).items(), strict=True):
            edits = [result["edits"][key] for key in ("changed", "kept", "psnr_truth")]
            shown = float(np.mean(list(result["generation"].values())))
            distance = made.mean("tiny-fd", made.decodings[0])
            rows.append((f"{number} + {number}", name, result["reconstruction"][0]["psnr"], *edits, shown, distance))
    facts = about(next(iter(measured.values())))
    return Table(
        "What distillation is for",
        f"{facts['count']} held-out pictures, to noise and back at w 1; edited, and generated from drawn noise, at "
        f"{facts['decoding']} (below 1 it leaves the first jump unguided, so all of 1 + 1). Shown: attributes of the "
        "caption that generated pictures have; tiny-fd: their Fréchet distance to the true ones, less is better. Each "
        "number of jumps has students of its own; untrained are the weights that they start from.",
        ("jumps", "students", "PSNR (dB)", "changed as asked", "kept", "PSNR to truth", "shown", "tiny-fd"),
        tuple(rows),
        tuple(i for i, row in enumerate(rows) if row[1] == LABELS["icd"]),
        STYLES | {"shown": STYLES["kept"], "tiny-fd": Style(0)},
    )


def jumps_panel(measured: Mapping[int, Measured], task: str, title: str) -> Panel:
    """The first pictures by number of jumps, untrained and trained, beside the originals."""
    examples = next(iter(measured.values())).data.examples[:SHOWN]
    columns = {"original": to_pictures(stack(examples, 64))}
    for number, one in measured.items():
        for result in one.results[task]:
            made = read_results(result.folder, result.decodings[0], examples)
            columns[f"{number} + {number}\n{LABELS[result.name]}"] = to_pictures(made)
    ours = tuple(range(2, len(columns), 2))
    return Panel.of_columns(title, "", columns, [example.caption for example in examples], ours)


def write_jumps(measured: Mapping[int, Measured], root: Path) -> tuple[Table, tuple[Path, ...]]:
    """Write jumps.md, report.html and report.png; return the table and their paths."""
    table, file = jumps_table(measured), root / "jumps.md"
    generated = jumps_panel(measured, "pictures", "Generated from drawn noise")
    returned = jumps_panel(measured, "reconstruction", "To noise and back")
    write_text(file, markdown_table(table))
    told = "Students of one to four jumps each way, beside the same jumps of the weights that they start from."
    report = Report(table.title, told, sections=(generated, returned, table))
    return table, (file, *write_report(report, root))
