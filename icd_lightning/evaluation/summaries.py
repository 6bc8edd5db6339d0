"""Tables, panels and curves of runs: methods and decodings, in all and by type; the curves of Figs. 5 and 9."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from icd_lightning.data.images import to_pictures
from icd_lightning.evaluation.examples import Example, stack
from icd_lightning.evaluation.report import MAX_MARKED, Curve, Panel, Table, Value
from icd_lightning.evaluation.results import ALL, Results, read_results

LAST = ("nfe", "seconds")
INTERVALS = " ± is half of a 95 % interval over resampled pictures."
SIDE_BY_SIDE = 6  # methods at most, or their columns become narrow


def table(title: str, note: str, results: Sequence[Results], *, by_kind: bool = False) -> Table:
    """A row for each method and decoding, or for each of their types of edits; ± is half of a 95 % interval."""
    names = dict.fromkeys([*(name for r in results for name in r.columns if name not in LAST), *LAST])
    rows: list[tuple[Value, ...]] = []
    for result in results:
        for decoding in result.decodings:
            for kind in result.kinds if by_kind else (ALL,):
                row: list[Value] = [result.name, decoding, *([kind] if by_kind else [])]
                for name in names:
                    if name in LAST:  # of one picture; the same for all, or a matter of the machine
                        row.append(float(np.nanmean(result.values(name, decoding, kind))))
                    else:
                        row.append(result.mean(name, decoding, kind) if name in result.columns else None)
                rows.append(tuple(row))
    styles = {name: style for result in reversed(results) for name, style in result.styles.items()}
    return Table(
        title=title,
        note=note + INTERVALS,
        header=("method", "decoding", *(["type"] if by_kind else []), *names),
        rows=tuple(rows),
        highlight_rows=tuple(i for i, row in enumerate(rows) if str(row[0]).startswith("icd")),
        styles={name: style._replace(best=None) for name, style in styles.items()} if by_kind else styles,
    )


def panel(results: Sequence[Results], examples: Sequence[Example]) -> Panel:
    """An edit of each type by every method in its first setting, with the true result where it is known.

    Few methods stand side by side, many under one another.
    """
    shown = list({example.kind or example.key: example for example in reversed(examples)}.values())[::-1][:8]
    edited = {f"{r.name}\n{r.decodings[0]}": read_results(r.folder, r.decodings[0], shown) for r in results}
    resolution = next(iter(edited.values())).shape[-1]
    columns = {"original": stack(shown, resolution), **edited}
    pictures = {name: to_pictures(images) for name, images in columns.items()}
    truths = [example.truth.draw(resolution) for example in shown if example.truth is not None]
    if len(truths) == len(shown):
        pictures["true result"] = np.stack(truths)
    note = "The prompts say what shall be there."
    if len(results) > SIDE_BY_SIDE:
        heads = (f"{e.kind or e.key}\n{e.target}" for e in shown)
        return Panel("Edits", note, tuple(heads), tuple((name, tuple(images)) for name, images in pictures.items()))
    ours = tuple(i for i, name in enumerate(pictures) if name.startswith("icd"))
    return Panel.of_columns("Edits", note, pictures, [f"{e.target}\nwas: {e.caption}" for e in shown], ours)


def trade_off(results: Sequence[Results], x: str, y: str, title: str) -> Curve:
    """Preservation against editing (Fig. 9), error against quality (Fig. 5): a line a method through its settings.

    The line follows the settings in their order, not x, as long as from one to the next a single option changes.
    """
    note = "A point for each setting, a line for each method, through its settings in their order."
    series = {}
    for result in results[:MAX_MARKED]:
        points: list[tuple[float, float]] = []
        last: Mapping[str, float] | None = None
        for decoding in result.decodings:
            place, options = (result.mean(x, decoding), result.mean(y, decoding)), result.options.get(decoding, {})
            if None in place:
                continue
            if last is not None and len(last.items() ^ options.items()) != 2:
                points.append((np.nan, np.nan))  # a gap, where more than one option changes
            points.append((float(place[0]), float(place[1])))
            last = options
        series[result.name] = ([a for a, _ in points], [b for _, b in points])
    return Curve(title, note, x, y, series, marks=True)
