"""The study of ablations as tables, verdicts and curves, beside the paper's own figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from icd_lightning.evaluation.ablations import ORDERINGS, TABLE_2_JSON, TAU, AblationStudy
from icd_lightning.evaluation.decodings import Decoding
from icd_lightning.evaluation.published import TABLE_2
from icd_lightning.evaluation.report import Curve, Report, Table, markdown_table, write_report
from icd_lightning.evaluation.runs import Results
from icd_lightning.evaluation.statistics import MIN_SEEDS, bootstrap
from icd_lightning.files import write_json, write_text

DESCRIPTIONS = {
    "A": "fCD2, CD2",
    "B": "fCD3, CD3",
    "C": "fCD4, CD4",
    "E": "CD4, fCD4 by L_f alone",
    "F": "C + L_f",
    "G": "F + L_r",
    "H": "C",
    "I": "H + d.CFG",
    "J": "I + L_f",
    "K": "J + L_r",
}


def table_2(study: AblationStudy) -> list[Table]:
    """The unguided rows, and the guided ones at each w, with the paper's figures beside ours."""
    return [_table(study, None), *(_table(study, w) for w in study.guidance_scales)]


def _table(study: AblationStudy, w: float | None) -> Table:
    columns, rows = study.columns, []
    for name, label, values in _rows(study, w):
        lpips, dino, psnr = TABLE_2.get(name, (None,) * 3)
        ours = [bootstrap(values[column]) for column in columns]
        rows.append((name, label, *ours, psnr, lpips, dino))
    seeds = f"mean of {len(study.seeds)} trainings (seeds {', '.join(map(str, study.seeds))})"
    pictures = len(study.ddim.values("psnr", "w 1"))
    how = "unguided" if w is None else f"guided at w {w:g}, d.CFG with tau {TAU:g}; the paper's at w 8"
    return Table(
        title="Table 2, unguided" if w is None else f"Table 2, guided at w {w:g}",
        note=f"To noise and back, {how}. {pictures} held-out pictures, {seeds}; ± is half of a 95 % interval over "
        "resampled pictures. Untrained: the weights of stage 1, from which the students start, through the same jumps.",
        header=("row", "students", *columns, "paper: PSNR", "LPIPS", "DinoV2"),
        rows=tuple(rows),
        highlight_rows=tuple(i for i, row in enumerate(rows) if row[0] in ("G", "K")),
        digits=(None, None, *(2 if column == "psnr" else 3 for column in columns), 2, 3, 3),
        best=(None, None, *(study.ddim.style(column).best for column in columns), None, None, None),
    )


def _rows(study: AblationStudy, w: float | None) -> list[tuple[str, str, dict[str, np.ndarray]]]:
    """Name, description and each column's values, one a picture, averaged over seeds."""
    columns = study.columns
    rows = []

    def add(name: str, label: str, results: Results, decoding: str) -> None:
        rows.append((name, label, {column: results.values(column, decoding) for column in columns}))

    if w is None:
        add("DDIM-50", "teacher", study.ddim, "w 1")
        for segments, results in sorted(study.untrained.items()):
            add("untrained", f"{segments} + {segments} jumps", results, "w 1")
    else:
        add("DDIM-50, guided", "teacher", study.ddim, Decoding.step(w).name)
        add("DDIM-50 + d.CFG", "teacher", study.ddim, Decoding.step(w, TAU).name)
        most = max(study.untrained)
        for tau in (1.0, TAU):
            label = f"{most} + {most} jumps" + (" + d.CFG" if tau < 1 else "")
            add("untrained", label, study.untrained[most], Decoding.step(w, tau).name)
    for letter, ablation in study.ablations.items():
        if ablation.guided == (w is not None):
            values = {column: study.values(letter, w or 1.0, column).mean(0) for column in columns}
            rows.append((letter, DESCRIPTIONS[letter], values))
    return rows


def verdict_table(study: AblationStudy) -> Table:
    """The paper's orderings in PSNR, each found, reversed or undecided here."""
    rows = []
    for where, verdict in study.verdicts():
        paper = TABLE_2[verdict.better][2] - TABLE_2[verdict.worse][2]
        agreeing = f"{verdict.seeds_agreeing} of {verdict.seeds}"
        rows.append((f"{verdict.worse} < {verdict.better}", where, verdict.difference, paper, agreeing, verdict.word))
    return Table(
        title="The paper's orderings",
        note=f"Differences in PSNR (dB) over the same pictures, ± half of a 95 % interval over {_scope(study)}",
        header=("ordering", "decoding", "difference", "paper's", "seeds that agree", "verdict"),
        rows=tuple(rows),
        digits=(None, None, 2, 2, None, None),
    )


def _scope(study: AblationStudy) -> str:
    """Of what intervals and verdicts are."""
    count = len(study.seeds)
    if count >= MIN_SEEDS:
        return "other pictures and other trainings; undecided if that holds 0."
    of = "this training" if count == 1 else f"these {count} trainings"
    return f"resampled pictures; undecided if that holds 0. Verdicts are of {of}: others may differ."


def place_of_e(study: AblationStudy) -> str:
    """Where the student that never sees a consistency loss of its own falls: a finding, not a bar."""
    means = {letter: float(study.values(letter, 1.0).mean()) for letter in "ABCEFG"}
    order = sorted(means, key=means.__getitem__)
    return "In ascending order of PSNR: " + " < ".join(f"{letter} ({means[letter]:.2f})" for letter in order) + "."


def write_study(study: AblationStudy, root: Path, facts: Mapping[str, Any]) -> tuple[Path, ...]:
    """Write table2.md, table2.json, report.html and report.png; return their paths."""
    tables, verdicts = table_2(study), verdict_table(study)
    text = "\n".join(markdown_table(table) for table in (*tables, verdicts)) + f"\n{place_of_e(study)}\n"
    write_text(root / "table2.md", text)
    write_json(root / TABLE_2_JSON, {**study.record(root), **_as_dict(study, facts)})
    words = [verdict.word for _, verdict in study.verdicts()]
    report = Report(
        title="What each part adds",
        subtitle="The paper's ablations (Table 2), trained and measured on the tiny family. " + place_of_e(study),
        summary=tuple((f"{words.count(w)} of {len(words)}", f"orderings {w}") for w in dict.fromkeys(words)),
        sections=(*_curves(study), *tables, verdicts),
        facts={name: str(value) for name, value in facts.items()},
    )
    return (root / "table2.md", root / TABLE_2_JSON, *write_report(report, root))


def _curves(study: AblationStudy) -> tuple[Curve, ...]:
    """Fig. 7's question, share of pictures below a PSNR, for each row: how all pictures fare, not their mean alone."""
    curves = []
    for guided, letters in ORDERINGS.items():
        w = study.guidance_scales[0] if guided else 1.0
        shares = np.linspace(0, 100, 41)
        series = {x: (np.percentile(study.values(x, w).mean(0), shares).tolist(), shares.tolist()) for x in letters}
        where = f"guided, w {w:g}" if guided else "unguided"
        title, note = f"Pictures below a PSNR, {where}", "Each row's students; further right is better."
        curves.append(Curve(title, note, "PSNR (dB)", "pictures (%)", series))
    return tuple(curves)


def _as_dict(study: AblationStudy, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as plain numbers, each seed by itself too."""
    rows = []
    for w in (None, *study.guidance_scales):
        for name, label, values in _rows(study, w):
            means = {column: bootstrap(value).as_dict() for column, value in values.items()}
            paper = dict(zip(("lpips", "dinov2", "psnr"), TABLE_2.get(name, ()), strict=False))
            row = {"row": name, "students": label, "guidance_scale": w or 1.0, "ours": means, "paper": paper}
            if name in study.ablations:
                per_seed = study.values(name, w or 1.0).mean(1)
                row["psnr_by_seed"] = dict(zip(map(str, study.seeds), map(float, per_seed), strict=True))
            rows.append(row)
    verdicts = [
        {
            "decoding": where,
            "worse": verdict.worse,
            "better": verdict.better,
            "difference": verdict.difference.as_dict(),
            "seeds_agreeing": verdict.seeds_agreeing,
            "seeds": verdict.seeds,
            "verdict": verdict.word,
        }
        for where, verdict in study.verdicts()
    ]
    return {"rows": rows, "verdicts": verdicts, "place_of_e": place_of_e(study), "facts": dict(facts)}
