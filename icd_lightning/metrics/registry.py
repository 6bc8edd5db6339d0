"""Metrics by name. Those with a pretrained network load the real one from disk, or say what to fetch; never another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchmetrics import Metric

from icd_lightning.metrics import pretrained
from icd_lightning.metrics.reconstruction import PSNR, SSIM

METRICS: dict[str, Callable[[], Metric]] = {
    "psnr": PSNR,
    "ssim": SSIM,
    "lpips": pretrained.lpips,
    "dinov2": pretrained.DinoV2Similarity,
    "fid": pretrained.fid,
}


def build_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """One metric a name, ValueError if unknown; each takes update(images, reference), (B, 3, H, W) in [-1, 1]."""
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"no metric {unknown[0]!r}; there is: {', '.join(METRICS)}")
    return {name: METRICS[name]() for name in names}
