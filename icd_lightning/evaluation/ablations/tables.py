"""The study of ablations as tables and a report, beside the paper's own figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from icd_lightning.data.images import read_picture
from icd_lightning.evaluation.ablations.study import (
    ORDERINGS,
    TABLE_2_JSON,
    TAU,
    UNGUIDED_ROWS,
    AblationStudy,
    Comparison,
)
from icd_lightning.evaluation.benchmarks.inversion import TABLE_2
from icd_lightning.evaluation.decodings import UNGUIDED
from icd_lightning.evaluation.examples import Example
from icd_lightning.evaluation.report import Curve, Panel, Report, Style, Table, markdown_table, write_report
from icd_lightning.evaluation.results import places
from icd_lightning.evaluation.statistics import MIN_SEEDS
from icd_lightning.files import write_json, write_text


def table_2(study: AblationStudy) -> list[Table]:
    """The unguided rows, and the guided ones at each w, with the paper's figures beside ours."""
    return [_table(study, w) for w in (None, *study.guidance_scales)]


def _table(study: AblationStudy, w: float | None) -> Table:
    columns, rows = study.columns, []
    for row in study.rows(w):
        lpips, dino, psnr = TABLE_2.get(row.name, (None,) * 3)
        ours = [row.mean(column) for column in columns]
        rows.append((row.name, row.description, *ours, psnr, lpips, dino))
    known = study.runs["ddim"].styles
    styles = {n: Style(2 if n == "psnr" else 3, known[n].best if n in known else None) for n in columns}
    numbers, several = ", ".join(map(str, study.seeds)), len(study.seeds) > 1
    seeds = f"mean of {len(study.seeds)} trainings (seeds {numbers})" if several else f"one training (seed {numbers})"
    pictures = len(study.runs["ddim"].of(UNGUIDED.name))
    how = "unguided" if w is None else f"guided at w {w:g}, d.CFG with tau {TAU:g}; the paper's at w 8"
    return Table(
        title="Table 2, unguided" if w is None else f"Table 2, guided at w {w:g}",
        note=f"To noise and back, {how}. {pictures} held-out pictures, {seeds}; ± is half of a 95 % interval over "
        f"{_scope(study)}. Untrained: the weights that the students start from, through the same jumps.",
        header=("row", "students", *columns, "paper: PSNR", "LPIPS", "DinoV2"),
        rows=tuple(rows),
        highlight_rows=tuple(i for i, row in enumerate(rows) if row[0] in ("G", "K")),
        styles=styles | {"paper: PSNR": Style(2), "LPIPS": Style(3), "DinoV2": Style(3)},
    )


def _scope(study: AblationStudy) -> str:
    """What intervals are over."""
    return "resampled pictures" if len(study.seeds) < MIN_SEEDS else "other pictures and other trainings"


def verdict_table(study: AblationStudy) -> Table:
    """The paper's orderings in PSNR, each found, reversed or undecided here."""
    rows = []
    for one in study.verdicts():
        agreeing = f"{one.seeds_agreeing} of {len(study.seeds)}"
        ordering = f"{one.worse.name} < {one.better.name}"
        rows.append((ordering, one.where, one.difference, one.papers, agreeing, one.verdict))
    count = len(study.seeds)
    of = "this training" if count == 1 else f"these {count} trainings"
    scope = f"{_scope(study)}; undecided if that holds 0."
    if count < MIN_SEEDS:
        scope += f" Verdicts are of {of}: others may differ."
    return Table(
        title="The paper's orderings",
        note=f"Differences in PSNR (dB) over the same pictures, ± half of a 95 % interval over {scope}",
        header=("ordering", "decoding", "difference", "paper's", "seeds that agree", "verdict"),
        rows=tuple(rows),
        styles={"difference": Style(2), "paper's": Style(2)},
    )


def place_of_e(study: AblationStudy) -> str:
    """Where the student that never sees a consistency loss of its own falls: a finding, not a bar."""
    means = {letter: float(study.row(letter).values().mean()) for letter in UNGUIDED_ROWS}
    order = sorted(means, key=means.__getitem__)
    return "In ascending order of PSNR: " + " < ".join(f"{letter} ({means[letter]:.2f})" for letter in order) + "."


# --- pictures ---------------------------------------------------------------------------------------------------------


def losses(study: AblationStudy) -> list[Comparison]:
    """Of unguided rows that a preservation loss tells apart."""
    return [one for one in study.comparisons() if one.better.name in "FG"]


def telling(study: AblationStudy, count: int = 2) -> list[str]:
    """Keys of the pictures that each preservation loss helps most, and then of those that it helps least."""
    keys = []
    for one in losses(study):
        order = np.argsort(-one.gain, kind="stable")
        keys += [one.keys[i] for i in (*order[:count], *order[-count:])]
    return list(dict.fromkeys(keys))


def result_files(study: AblationStudy, letter: str, keys: Sequence[str]) -> list[str]:
    """Pictures that an unguided row's first training made of these, relative to its run's folder."""
    rows = study.row(letter).runs[0].of(UNGUIDED.name).set_index("key")
    return rows.image[list(keys)].tolist()


def effect_panel(study: AblationStudy, examples: Mapping[str, Example], keys: Sequence[str]) -> Panel:
    """Pictures beside what each unguided row makes of them, with what the losses add to each."""
    gains = {one.better.part: dict(zip(one.keys, one.gain, strict=True)) for one in losses(study)}
    columns = {}
    for letter in UNGUIDED_ROWS:
        folder = study.row(letter).runs[0].folder
        columns[letter] = [np.asarray(read_picture(folder / file)) for file in result_files(study, letter, keys)]
    columns = {"original": [examples[key].array(len(columns["G"][0])) for key in keys], **columns}
    labels = []
    for key in keys:
        added = ", ".join(f"{part} {gain[key]:+.1f} dB" for part, gain in gains.items())
        labels.append(f"{examples[key].caption}\n{added}")
    note = f"To noise and back, unguided, by the training of seed {study.seeds[0]}; gains are means over all trainings."
    return Panel.of_columns("Pictures that the losses help most and least", note, columns, labels, (6,))


# --- files ------------------------------------------------------------------------------------------------------------


def write_study(study: AblationStudy, root: Path, facts: Mapping[str, Any]) -> tuple[Path, ...]:
    """Write table2.md, table2.json, report.html and report.png; return their paths.

    The JSON file holds all that `read_study` needs to put the study together again, and its figures as plain numbers.
    """
    tables, verdicts, place = [*table_2(study), verdict_table(study)], study.verdicts(), place_of_e(study)
    write_text(root / "table2.md", "\n".join(map(markdown_table, tables)) + f"\n{place}\n")
    record = {
        "ablations": [asdict(ablation) for ablation in study.ablations.values()],
        "guidance_scales": list(study.guidance_scales),
        "seeds": list(study.seeds),
        "runs": places({name: results.folder for name, results in study.runs.items()}, root),
        "trainings": places(study.trainings, root),
        "rows": _rows(study),
        "verdicts": [
            {
                "decoding": one.where,
                "worse": one.worse.name,
                "better": one.better.name,
                "difference": one.difference.as_dict(),
                "seeds_agreeing": one.seeds_agreeing,
                "seeds": len(study.seeds),
                "verdict": one.verdict,
            }
            for one in verdicts
        ],
        "place_of_e": place,
        "facts": dict(facts),
    }
    write_json(root / TABLE_2_JSON, record)
    words = [one.verdict for one in verdicts]
    report = Report(
        title="What each part adds",
        subtitle="The paper's ablations (Table 2), trained and measured on the tiny family. " + place,
        summary=tuple((f"{words.count(w)} of {len(words)}", f"orderings {w}") for w in dict.fromkeys(words)),
        sections=(*_curves(study), *tables),
        facts={name: str(value) for name, value in facts.items()},
    )
    return (root / "table2.md", root / TABLE_2_JSON, *write_report(report, root))


def _curves(study: AblationStudy) -> list[Curve]:
    """Fig. 7's question, share of pictures below a PSNR, for each row: how all pictures fare, not their mean alone."""
    curves = []
    for guided, letters in ORDERINGS.items():
        w = study.guidance_scales[0] if guided else 1.0
        shares = np.linspace(0, 100, 41)
        series = {x: (np.percentile(study.row(x, w).pictures(), shares).tolist(), shares.tolist()) for x in letters}
        where = f"guided, w {w:g}" if guided else "unguided"
        title, note = f"Pictures below a PSNR, {where}", "Each row's students; further right is better."
        curves.append(Curve(title, note, "PSNR (dB)", "pictures (%)", series))
    return curves


def _rows(study: AblationStudy) -> list[dict[str, Any]]:
    """Every row as plain numbers, each seed by itself too."""
    rows = []
    for w in (None, *study.guidance_scales):
        for row in study.rows(w):
            means = {column: row.mean(column).as_dict() for column in study.columns}
            paper = dict(zip(("lpips", "dinov2", "psnr"), TABLE_2.get(row.name, ()), strict=False))
            numbers = {"row": row.name, "students": row.description, "guidance_scale": w or 1.0}
            rows.append({**numbers, "ours": means, "paper": paper})
            if row.name in study.ablations:
                per_seed = map(float, row.values().mean(1))
                rows[-1]["psnr_by_seed"] = dict(zip(map(str, study.seeds), per_seed, strict=True))
    return rows
