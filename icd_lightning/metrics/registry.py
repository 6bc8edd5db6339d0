"""Metrics by name. Those with a pretrained network load the real one from disk, or say what to fetch; never another.

Nothing but names is here until a metric is asked for. See docs/metrics.md for what each of them is.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from icd_lightning.metrics.base import PictureMetric

METRICS = {  # name -> what makes it, in icd_lightning.metrics
    "psnr": "reconstruction.PSNR",
    "ssim": "reconstruction.SSIM",
    "mse": "reconstruction.MSE",
    "lpips": "perceptual.lpips",
    "lpips-squeeze": "perceptual.lpips_squeeze",
    "dinov2": "perceptual.DinoV2Similarity",
    "structure-distance": "perceptual.StructureDistance",
    "clip-t": "alignment.CLIPText",
    "clip-i": "alignment.CLIPImage",
    "clip-score": "alignment.CLIPScore",
    "image-reward": "alignment.ImageReward",
    "fid": "distribution.fid",
    "fid-clean": "distribution.fid_clean",
    "latent-nll": "latents.LatentNLL",
    "tiny-fd": "tiny.TinyFrechetDistance",
    "tiny-agreement": "tiny.TinyAgreement",
    "tiny-perceptual": "tiny.TinyPerceptualDistance",
}
PARTS = {"unedited": False, "edited": True}
"""Endings of a name: that metric inside or outside of an edit's mask, e.g. `psnr-unedited`."""

PRESETS = {  # name -> the metrics it stands for
    "icd": ("psnr", "lpips", "dinov2", "clip-t", "clip-i", "image-reward", "fid", "latent-nll"),
    "piebench": (
        *("structure-distance", "psnr-unedited", "lpips-squeeze-unedited", "mse-unedited", "ssim-unedited"),
        *("clip-score", "clip-score-edited"),
    ),
    "tiny": ("psnr", "ssim", "tiny-perceptual", "tiny-agreement", "tiny-fd"),
}


def build_metrics(names: Sequence[str]) -> dict[str, PictureMetric]:
    """One metric a name of `expand`; each takes `update` of `PictureMetric`.

    FileNotFoundError, with what to fetch, where a pretrained network is missing. torch's random numbers go on as if
    nothing had been built.
    """
    import torch

    expanded = expand(names)
    with torch.random.fork_rng(devices=[]):  # networks are built on the CPU
        return {name: _build(name) for name in expanded}


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """The names once each, presets replaced by theirs; ValueError for an unknown one, or for none."""
    expanded = tuple(dict.fromkeys(name for given in names for name in PRESETS.get(given, (given,))))
    for name in expanded:
        if _split(name)[0] not in METRICS:
            raise ValueError(
                f"no metric {name!r}; there is: {', '.join(METRICS)}, each but those of distributions also with "
                f"{' or '.join(f'-{part}' for part in PARTS)}; or one of {', '.join(PRESETS)}, which stand for several"
            )
    if not expanded:
        raise ValueError("metrics [] measure nothing: name some, e.g. [psnr, ssim], or leave out what measures")
    return expanded


def _build(name: str) -> PictureMetric:
    from icd_lightning.metrics.base import PerImage
    from icd_lightning.metrics.reconstruction import Within

    whole, part = _split(name)
    module, maker = METRICS[whole].split(".")
    metric = getattr(import_module(f"icd_lightning.metrics.{module}"), maker)()
    if part is None:
        return metric
    if not isinstance(metric, PerImage) or "images" not in metric.needs:
        raise ValueError(f"metric {name!r}: {whole} is not of single pictures, and so not of parts of them")
    return Within(metric, edited=PARTS[part])


def _split(name: str) -> tuple[str, str | None]:
    """A name and the ending it has, e.g. ("psnr", "unedited")."""
    whole, _, part = name.rpartition("-")
    return (whole, part) if part in PARTS else (name, None)
