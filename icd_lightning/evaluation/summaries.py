"""Tables and curves of runs: methods and decodings, in all and by type; Table 1; the curves of Figs. 4, 5 and 9."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from icd_lightning.data.images import to_pictures
from icd_lightning.evaluation.examples import Example, stack
from icd_lightning.evaluation.published import GUIDANCES, PUBLISHED, TABLE_1, TABLE_1_NLL
from icd_lightning.evaluation.report import MAX_MARKED, MAX_SERIES, Curve, Panel, Table, Value
from icd_lightning.evaluation.runs import ALL, Results, read_results
from icd_lightning.evaluation.statistics import Estimate
from icd_lightning.tiny.rendering import render


class Style(NamedTuple):
    """How a column is printed: decimals, what is good, and a factor, 100 for shares."""

    digits: int | None = None
    best: Literal["max", "min"] | None = None
    factor: float = 1.0


SHARES = ("changed", "kept", "tiny-agreement", "object", "background", "layout")
LESS_IS_BETTER = ("lpips", "mse", "structure", "fid", "tiny-fd", "tiny-perceptual", "latent_mse")
LAST = ("nfe", "seconds")
INTERVALS = " ± is half of a 95 % interval over resampled pictures."
STYLES = {"nll": Style(3), "nfe": Style(0), "seconds": Style(3)}


def style_of(column: str) -> Style:
    """By the name's beginning: shares are percentages, PSNR in dB; what is not listed is printed to three digits."""
    if column in STYLES:
        return STYLES[column]
    if column.startswith(SHARES):
        return Style(1, "max", 100.0)
    return Style(2 if column.startswith("psnr") else None, "min" if column.startswith(LESS_IS_BETTER) else "max")


def table(title: str, note: str, results: Sequence[Results], *, by_kind: bool = False) -> Table:
    """A row for each method and decoding, or for each of their types of edits; ± is half of a 95 % interval."""
    names = dict.fromkeys(name for r in results for name in (*r.columns, *r.set_scores))
    columns = [*(name for name in names if name not in LAST), *LAST]
    rows: list[tuple[Value, ...]] = []
    for result in results:
        for decoding in result.decodings:
            for kind in result.kinds if by_kind else (ALL,):
                first = (result.name, decoding, *([kind] if by_kind else []))
                rows.append((*first, *(_value(result, column, decoding, kind) for column in columns)))
    styles = [style_of(column) for column in columns]
    heads = [f"{c} (%)" if s.factor == 100 else c for c, s in zip(columns, styles, strict=True)]
    lead = ("method", "decoding", *(["type"] if by_kind else []))
    return Table(
        title=title,
        note=note + INTERVALS,
        header=(*lead, *heads),
        rows=tuple(rows),
        highlight_rows=tuple(i for i, row in enumerate(rows) if str(row[0]).startswith("icd")),
        digits=(*(None for _ in lead), *(style.digits for style in styles)),
        best=(*(None for _ in lead), *(None if by_kind else style.best for style in styles)),
    )


def _value(result: Results, column: str, decoding: str, kind: str) -> Value:
    if column in LAST:  # of one picture; the same for all, or a matter of the machine
        return float(np.nanmean(result.values(column, decoding, kind)))
    value = result.mean(column, decoding, kind) if column in (*result.columns, *result.set_scores) else None
    return value.scaled(style_of(column).factor) if isinstance(value, Estimate) else value


def plain(table: Table) -> Table:
    """The table without its intervals, for a terminal's width."""
    rows = tuple(tuple(float(v) if isinstance(v, Estimate) else v for v in row) for row in table.rows)
    return replace(table, rows=rows, note=table.note.removesuffix(INTERVALS))


def published(benchmark: str) -> list[Table]:
    """What papers print for this benchmark on photographs, if anything."""
    return [
        Table(f"As published: {title}", "Not run here.", ("row", *columns), tuple((n, *r) for n, r in rows.items()))
        for title, columns, rows in PUBLISHED.get(benchmark, ())
    ]


SIDE_BY_SIDE = 6
"""Methods at most, or their columns become narrow."""


def panel(results: Sequence[Results], examples: Sequence[Example]) -> Panel:
    """An edit of each type by every method in its first setting, with the true result where it is known.

    Few methods stand side by side, many under one another.
    """
    shown = list({example.kind or example.key: example for example in reversed(examples)}.values())[::-1][:8]
    made = {f"{r.name}\n{r.decodings[0]}": read_results(r.folder, r.decodings[0], shown) for r in results}
    resolution = next(iter(made.values())).shape[-1]
    columns = {"original": stack(shown, resolution), **made}
    pictures = {name: to_pictures(images) for name, images in columns.items()}
    truths = [render(example.truth, resolution) for example in shown if example.truth is not None]
    if len(truths) == len(shown):
        pictures["true result"] = np.stack(truths)
    note = "The prompts say what shall be there."
    if len(results) > SIDE_BY_SIDE:
        heads = (f"{e.kind or e.key}\n{e.target}" for e in shown)
        return Panel("Edits", note, tuple(heads), tuple((name, tuple(images)) for name, images in pictures.items()))
    rows = ((f"{e.target}\nwas: {e.caption}", tuple(p[i] for p in pictures.values())) for i, e in enumerate(shown))
    ours = tuple(i for i, name in enumerate(pictures) if name.startswith("icd"))
    return Panel("Edits", note, tuple(pictures), tuple(rows), ours)


def table_1(result: Results, quality: str) -> Table:
    """A score by the decoder's guidance (rows) and the encoder's (columns)."""
    rows: list[tuple[Value, ...]] = []
    for decoder in GUIDANCES:
        ours = [result.mean(quality, f"encoder {encoder}, decoder {decoder}") for encoder in GUIDANCES]
        rows.append((decoder, *ours, *TABLE_1[decoder]))
    return _by_encoder(
        f"Table 1: {quality} by the encoder's and the decoder's guidance",
        "DDIM-50, guided both ways by classifier-free guidance. The paper's columns are FID, of SD1.5 on 5K pictures.",
        "decoder",
        rows,
        (None, *(style_of(quality).digits for _ in GUIDANCES), *(1 for _ in GUIDANCES)),
    )


def table_1_nll(result: Results) -> Table:
    """Negative log-likelihood of what each encoder's guidance makes of pictures."""
    ours = [result.mean("nll", f"encoder {encoder}, decoder none") for encoder in GUIDANCES]
    note = "Per dimension, under the standard normal distribution; noise drawn from it has 1.419."
    return _by_encoder("Table 1: latent NLL", note, "", [("", *ours, *TABLE_1_NLL)], (None, *(3 for _ in range(8))))


def _by_encoder(title: str, note: str, head: str, rows, digits) -> Table:
    header = (head, *(f"encoder {name}" for name in GUIDANCES), *(f"paper: {name}" for name in GUIDANCES))
    return Table(title, note, header, tuple(rows), digits=digits)


def curve_over_tau(results: Sequence[Results], taus: Sequence[float], column: str) -> Curve:
    """Fig. 4: what comes back, against the threshold below which the decoder is guided, one decoding for each."""
    series = {
        result.name: (list(taus), [float(np.nanmean(result.values(column, name))) for name in result.decodings])
        for result in results[:MAX_SERIES]
    }
    note = "Encoded unguided, decoded with guidance at t <= tau T only."
    return Curve(f"{column} against the turn-on threshold", note, "tau", column, series)


def trade_off(results: Sequence[Results], x: str, y: str, title: str) -> Curve:
    """Preservation against editing (Fig. 9), error against quality (Fig. 5): a line a method through its settings.

    The line follows the settings in their order, not x, as long as from one to the next a single option changes.
    """
    series = {}
    for result in results[:MAX_MARKED]:
        means = {d: (result.mean(x, d), result.mean(y, d)) for d in result.decodings}
        points: list[tuple[float, float]] = []
        last: str | None = None
        for decoding, (a, b) in means.items():
            if a is None or b is None:
                continue
            if last is not None and len(options_of(last).items() ^ options_of(decoding).items()) != 2:
                points.append((np.nan, np.nan))  # a gap
            points.append((float(a), float(b)))
            last = decoding
        series[result.name] = ([a for a, _ in points], [b for _, b in points])
    note = "A point for each setting, a line for each method, through its settings in their order."
    return Curve(title, note, x, y, series, marks=True)


def options_of(decoding: str) -> dict[str, float]:
    """The numbers in a decoding's name: "tau1 0.4, tau2 0.8" -> {"tau1": 0.4, "tau2": 0.8}."""
    return {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+)", decoding)}
