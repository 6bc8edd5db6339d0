"""Edits of PIE-Bench and of COCO's captions, and what these share with others: a panel, tables, Fig. 9's trade-off."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace

from icd_lightning.editing.method import Clock
from icd_lightning.evaluation.benchmark import Bench, Benchmark, Measured, Outcome, Task, published
from icd_lightning.evaluation.decodings import Decoding, edited
from icd_lightning.evaluation.examples import Example, read_coco_edits, read_pie_bench
from icd_lightning.evaluation.report import Section
from icd_lightning.evaluation.summaries import panel, table, trade_off

TRADE_OFFS = (("psnr_outside", "changed"), ("psnr-unedited", "clip-score-edited"), ("dinov2", "clip-t"))
"""Preservation and editing, the first pair that was measured."""


def edit(bench: Bench, batch: Sequence[Example], decodings: Sequence[Decoding]) -> Iterator[Outcome]:
    """Edit towards the target captions, with the decodings' options of the method's `edit`."""
    images = bench.images(batch)
    sources, targets = [example.caption for example in batch], [example.target for example in batch]
    known = inspect.signature(bench.method.edit).parameters
    words = {"blended_words": [example.blended_words for example in batch]} if "blended_words" in known else {}
    for decoding in decodings:
        clock = Clock(bench.device)
        options = {"guidance": decoding.guidance, "seed": bench.seeds(batch), **decoding.edit, **words}
        result = bench.method.edit(images, sources, targets, on_step=clock.count, **options)
        yield Outcome(decoding.name, result, clock.nfe, clock.seconds() / len(batch))


def edit_sections(measured: Measured) -> list[Section]:
    """A panel, a table in all and by type, and the trade-off between methods or settings."""
    (results,) = measured.results.values()
    note = f"{measured.data.name}, each edited towards its target caption."
    title = f"Edits: {measured.settings.benchmark}"
    sections: list[Section] = [panel(results, measured.data.examples), table(title, note, results)]
    if results[0].kinds:
        sections.append(table(f"{title}, by type", note, results, by_kind=True))
    pair = next((pair for pair in TRADE_OFFS if set(pair) <= set(results[0].columns)), None)
    if pair is not None and len(results) * len(measured.settings.grid) > 1:
        sections.append(trade_off(results, *pair, "Preservation against editing"))
    return sections


EDITING = Task("editing", edit, ("dinov2", "clip-t", "clip-i", "image-reward"), edited, edits=True)


# --- PIE-Bench, 700 edits with masks (arXiv:2310.01506) ---------------------------------------------------------------

TABLE_3 = "arXiv:2406.14539, Table 3, SDXL"
TABLE_3_COLUMNS = ("CLIP-T", "Dino", "CLIP-I")


PIEBENCH = Benchmark(
    (replace(EDITING, metrics=(*EDITING.metrics, "piebench")),),
    edit_sections,
    read=lambda settings: read_pie_bench(settings.data, natural=settings.natural, count=settings.count),
    published=(
        published(
            "arXiv:2310.01506, SD1.4, all 700 pictures, edits by Prompt-to-Prompt",
            ("structure, e-3", "PSNR", "LPIPS, e-3", "MSE, e-4", "SSIM, e-2", "CLIP, whole", "CLIP, edited"),
            {
                "ddim_p2p": (69.43, 17.87, 208.80, 219.88, 71.14, 25.01, 22.44),
                "nti_pie": (13.44, 27.03, 60.67, 35.86, 84.11, 24.75, 21.86),
                "npi_pie": (16.17, 26.21, 69.01, 39.73, 83.40, 24.61, 21.87),
                "pnp_inversion": (11.65, 27.22, 54.55, 32.86, 84.76, 25.02, 22.10),
            },
        ),
        published(
            f"{TABLE_3}, 420 natural pictures",
            TABLE_3_COLUMNS,
            {
                "iCD-XL": (0.254, 0.707, 0.858),
                "ReNoise, Turbo": (0.254, 0.615, 0.820),
                "ReNoise, SDXL": (0.234, 0.642, 0.835),
                "ReNoise, LCM": (0.236, 0.736, 0.865),
            },
        ),
    ),
    unread=("images",),
    needs_data="PIE-Bench's folder",
)


COCO_EDIT = Benchmark(
    (EDITING,),
    edit_sections,
    read=lambda settings: read_coco_edits(settings.data, settings.images, settings.count),
    published=(
        published(
            TABLE_3,
            TABLE_3_COLUMNS,
            {
                "iCD-XL": (0.267, 0.472, 0.748),
                "ReNoise, Turbo": (0.265, 0.399, 0.705),
                "ReNoise, SDXL": (0.227, 0.431, 0.732),
                "ReNoise, LCM": (0.218, 0.350, 0.663),
            },
        ),
    ),
    needs_data="a CSV of edits",
)
