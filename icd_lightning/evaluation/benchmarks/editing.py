"""What benchmarks of edits share: the edits themselves, their tables, a panel, the trade-off of Fig. 9."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

from icd_lightning.evaluation.bench import Bench, Clock, Outcome
from icd_lightning.evaluation.benchmark import Measured, Task, edited
from icd_lightning.evaluation.decodings import Decoding
from icd_lightning.evaluation.examples import Example
from icd_lightning.evaluation.report import Section
from icd_lightning.evaluation.summaries import panel, table, trade_off

TRADE_OFFS = (("psnr_outside", "changed"), ("psnr-unedited", "clip-score-edited"), ("dinov2", "clip-t"))
"""Preservation and editing, the first pair that was measured."""
TABLE_3_TITLE = "arXiv:2406.14539, Table 3, SDXL"
TABLE_3_COLUMNS = ("CLIP-T", "Dino", "CLIP-I")


def edit(bench: Bench, batch: Sequence[Example], decodings: Sequence[Decoding]) -> Iterator[Outcome]:
    """Edit towards the target captions, with the decodings' options of the method's `edit`."""
    images = bench.images(batch)
    sources, targets = [example.caption for example in batch], [example.target for example in batch]
    known = inspect.signature(bench.method.edit).parameters
    words = {"blended_words": [example.blended_words for example in batch]} if "blended_words" in known else {}
    for decoding in decodings:
        clock = Clock(bench.device)
        result = bench.method.edit(
            images,
            sources,
            targets,
            guidance=decoding.guidance,
            seed=bench.seeds(batch),
            on_step=clock.count,
            **decoding.edit,
            **words,
        )
        yield Outcome(decoding.name, result, clock.nfe, clock.seconds() / len(batch))


def edit_sections(measured: Measured) -> list[Section]:
    """A panel, a table in all and by type, and the trade-off between methods or settings."""
    (results,) = measured.results.values()
    note = f"{measured.data.name}, each edited towards its target caption."
    title = f"Edits: {measured.settings.benchmark}"
    sections: list[Section] = [panel(results, measured.data.examples), table(title, note, results)]
    if results[0].kinds:
        sections.append(table(f"{title}, by type", note, results, by_kind=True))
    pair = next((p for p in TRADE_OFFS if set(p) <= {*results[0].columns, *results[0].set_scores}), None)
    if pair is not None and len(results) * len(measured.settings.grid) > 1:
        sections.append(trade_off(results, *pair, "Preservation against editing"))
    return sections


EDITING = Task("editing", edit, ("dinov2", "clip-t", "clip-i", "image-reward"), edited, edits=True)
