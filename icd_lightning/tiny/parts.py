"""What the tiny world adds to the core's registries. Names alone, so that it is light to import."""

from __future__ import annotations

from icd_lightning.registry import Entry

METRICS = {
    "tiny-fd": Entry("icd_lightning.tiny.metrics.TinyFrechetDistance", "Frechet distance to the scene network"),
    "tiny-agreement": Entry("icd_lightning.tiny.metrics.TinyAgreement", "share of its caption that a picture shows"),
    "tiny-perceptual": Entry("icd_lightning.tiny.metrics.TinyPerceptualDistance", "distance to the scene network"),
}
METRIC_PRESETS = {"tiny": ("psnr", "ssim", "tiny-perceptual", "tiny-agreement", "tiny-fd")}
BENCHMARKS = {
    "scenes": Entry("icd_lightning.tiny.benchmarks.TOUR", "a tour of the tiny family"),
    "tiny_edit": Entry("icd_lightning.tiny.benchmarks.TINY_EDIT", "edits of scenes with known true results"),
}
DATA_SETS = {"scenes": Entry("icd_lightning.tiny.benchmarks.held_out_scenes", "held-out scenes")}
