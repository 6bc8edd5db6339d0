"""What the tiny world adds to the core's registries. Names alone, so that it is light to import."""

from __future__ import annotations

from icd_lightning.registry import Entry

METRICS = {
    "tiny-fd": Entry("icd_lightning.tiny.metrics.TinyFrechetDistance", "Frechet distance to the scene network"),
    "tiny-agreement": Entry("icd_lightning.tiny.metrics.TinyAgreement", "share of its caption that a picture shows"),
    "tiny-perceptual": Entry("icd_lightning.tiny.metrics.TinyPerceptualDistance", "distance to the scene network"),
}
METRIC_PRESETS = {"tiny": ("psnr", "ssim", "tiny-perceptual", "tiny-agreement", "tiny-fd")}
