"""Edits of COCO's pictures whose captions differ in a word (Table 3 of arXiv:2406.14539)."""

from __future__ import annotations

from icd_lightning.evaluation.benchmark import Benchmark, Published, Settings
from icd_lightning.evaluation.benchmarks.editing import EDITING, TABLE_3_COLUMNS, TABLE_3_TITLE, edit_sections
from icd_lightning.evaluation.examples import DataSet, of_file, read_coco_edits

TABLE_3 = {
    "iCD-XL": (0.267, 0.472, 0.748),
    "ReNoise, Turbo": (0.265, 0.399, 0.705),
    "ReNoise, SDXL": (0.227, 0.431, 0.732),
    "ReNoise, LCM": (0.218, 0.350, 0.663),
}


def _read(settings: Settings) -> DataSet:
    return of_file(read_coco_edits(settings.data, settings.images), settings.data, settings.count)


COCO_EDIT = Benchmark(
    (EDITING,),
    edit_sections,
    read=_read,
    published=(Published(TABLE_3_TITLE, TABLE_3_COLUMNS, TABLE_3),),
    needs_data="a CSV of edits",
)
