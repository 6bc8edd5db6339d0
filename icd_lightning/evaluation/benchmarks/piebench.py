"""PIE-Bench: 700 edits with masks (arXiv:2310.01506)."""

from __future__ import annotations

from dataclasses import replace

from icd_lightning.evaluation.benchmark import Benchmark, Published, Settings
from icd_lightning.evaluation.benchmarks.editing import EDITING, TABLE_3_COLUMNS, TABLE_3_TITLE, edit_sections
from icd_lightning.evaluation.examples import DataSet, of_file, read_pie_bench

COLUMNS = ("structure, e-3", "PSNR", "LPIPS, e-3", "MSE, e-4", "SSIM, e-2", "CLIP, whole", "CLIP, edited")
BY_PROMPT_TO_PROMPT = {
    "ddim_p2p": (69.43, 17.87, 208.80, 219.88, 71.14, 25.01, 22.44),
    "nti_pie": (13.44, 27.03, 60.67, 35.86, 84.11, 24.75, 21.86),
    "npi_pie": (16.17, 26.21, 69.01, 39.73, 83.40, 24.61, 21.87),
    "pnp_inversion": (11.65, 27.22, 54.55, 32.86, 84.76, 25.02, 22.10),
}
TABLE_3 = {
    "iCD-XL": (0.254, 0.707, 0.858),
    "ReNoise, Turbo": (0.254, 0.615, 0.820),
    "ReNoise, SDXL": (0.234, 0.642, 0.835),
    "ReNoise, LCM": (0.236, 0.736, 0.865),
}


def _read(settings: Settings) -> DataSet:
    examples = read_pie_bench(settings.data, natural=settings.natural)
    return of_file(examples, settings.data, settings.count, settings.data / "mapping_file.json")


PIEBENCH = Benchmark(
    (replace(EDITING, metrics=("icd", "piebench")),),
    edit_sections,
    read=_read,
    published=(
        Published("arXiv:2310.01506, SD1.5, all 700 pictures, edits by Prompt-to-Prompt", COLUMNS, BY_PROMPT_TO_PROMPT),
        Published(f"{TABLE_3_TITLE}, 420 natural pictures", TABLE_3_COLUMNS, TABLE_3),
    ),
    unread=("images",),
    needs_data="PIE-Bench's folder",
)
