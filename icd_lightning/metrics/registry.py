"""Metrics by name. Those with a pretrained network load the real one from disk, or say what to fetch; never another.

Nothing but names is here until a metric is asked for. See docs/metrics.md for what each of them is.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from icd_lightning.registry import Entry, Registry

if TYPE_CHECKING:
    from icd_lightning.metrics.base import PictureMetric

HERE, DINOV2 = "icd_lightning.metrics", "facebook/dinov2-base"
OWN = {
    "psnr": Entry(f"{HERE}.reconstruction.PSNR", "peak signal-to-noise ratio, dB"),
    "ssim": Entry(f"{HERE}.reconstruction.SSIM", "structural similarity"),
    "mse": Entry(f"{HERE}.reconstruction.MSE", "mean squared difference"),
    "lpips": Entry(f"{HERE}.perceptual.LPIPS", "LPIPS with VGG16 at 224 pixels, as the paper has it"),
    "lpips-squeeze": Entry(f"{HERE}.perceptual.SqueezeLPIPS", "LPIPS with SqueezeNet, as PIE-Bench has it"),
    "dinov2": Entry(f"{HERE}.alignment.ImageCosine", "cosine of DinoV2's features", {"repository": DINOV2}),
    "structure-distance": Entry(f"{HERE}.perceptual.StructureDistance", "distance of DINO's self-similarities"),
    "clip-t": Entry(f"{HERE}.alignment.CLIPText", "CLIP's cosine of picture and prompt"),
    "clip-i": Entry(f"{HERE}.alignment.ImageCosine", "CLIP's cosine of picture and reference"),
    "clip-score": Entry(f"{HERE}.alignment.CLIPScore", "100 times CLIP's cosine of picture and prompt, at least 0"),
    "image-reward": Entry(f"{HERE}.image_reward.ImageReward", "ImageReward-v1.0 of picture and prompt"),
    "fid": Entry(f"{HERE}.distribution.FID", "Frechet distance of pictures resized as in pytorch-fid"),
    "fid-tf": Entry(f"{HERE}.distribution.FIDTensorFlow", "Frechet distance of pictures resized as in torch-fidelity"),
    "fid-clean": Entry(f"{HERE}.distribution.FIDClean", "Frechet distance of pictures resized as in clean-fid"),
    "latent-nll": Entry(f"{HERE}.reconstruction.LatentNLL", "negative log-likelihood of inverted latents"),
}
METRICS = Registry("metric", "icd_lightning.metrics", OWN)
PIEBENCH = (
    *("structure-distance", "psnr-unedited", "lpips-squeeze-unedited", "mse-unedited", "ssim-unedited"),
    *("clip-score", "clip-score-edited"),
)
ICD = ("psnr", "lpips", "dinov2", "clip-t", "clip-i", "image-reward", "fid", "latent-nll")
PRESETS = Registry("preset", "icd_lightning.metric_presets", {"icd": ICD, "piebench": PIEBENCH})
"""Names, each for several metrics."""
INPUTS = ("images", "reference", "prompts", "masks", "noise")
"""What there is for a metric to need."""
PARTS = {"unedited": False, "edited": True}
"""Endings of a name: that metric inside or outside of an edit's mask, e.g. `psnr-unedited`."""


def label_of(name: str) -> str:
    """What figures call a metric: the `label` of its very class, or its name."""
    return vars(METRICS.find(name).load()).get("label", name) if name in METRICS else name


def build_metrics(names: Sequence[str]) -> dict[str, PictureMetric]:
    """One metric a name of `expand`; each takes `update` of `PictureMetric`.

    FileNotFoundError, with what to fetch, where a pretrained network is missing. torch's random numbers go on as if
    nothing had been built.
    """
    import torch

    expanded = expand(names)
    with torch.random.fork_rng(devices=[]):  # networks are built on the CPU
        return {name: _build(name) for name in expanded}


def expand(names: Sequence[str], *, told_by: str | None = None) -> tuple[str, ...]:
    """The names once each, presets replaced by theirs; ValueError for an unknown one, or for none.

    told_by: see `Registry.find`.
    """
    presets = PRESETS.entries
    expanded = tuple(dict.fromkeys(name for given in names for name in presets.get(given, (given,))))
    for name in expanded:
        _find(name, told_by=told_by)
    if not expanded:
        raise ValueError("metrics [] measure nothing: name some, e.g. [psnr, ssim], or leave out what measures")
    return expanded


def _find(name: str, *, told_by: str | None = None) -> tuple[Entry, str, str | None]:
    """The entry of a name, the name without its ending, and that ending, e.g. "psnr" and "unedited", if it has one."""
    whole, _, part = name.rpartition("-")
    whole, part = (whole, part) if part in PARTS else (name, None)
    try:
        return METRICS.find(whole, told_by=told_by), whole, part
    except ValueError as error:
        more = "" if "." in name else f"; presets: {', '.join(PRESETS.entries)}; endings: {', '.join(PARTS)}"
        raise ValueError(f"{error}{more}") from error


def _check_stated(name: str, metric: PictureMetric) -> None:
    """ValueError for a direction that is none, and for `values` that would take other inputs than `needs` names."""
    if (best := metric.higher_is_better) not in (True, False, None):
        raise ValueError(f"metric {name!r}: higher_is_better {best!r} is none of True, False and None (neither)")
    taken = inspect.signature(getattr(metric, "values", metric.take)).parameters.values()
    if any(one.kind is one.VAR_POSITIONAL for one in taken):
        return
    named, needs = [one.name for one in taken], list(metric.needs)
    mixed = [one for one, need in zip(named, needs, strict=False) if one in INPUTS and one != need]
    if len(named) != len(needs) or mixed:
        raise ValueError(
            f"metric {name!r}: its values take ({', '.join(named)}), and its needs are ({', '.join(needs)}): name "
            "in `needs` what `values` takes, in that order"
        )


def _build(name: str) -> PictureMetric:
    from icd_lightning.metrics.base import PerImage, PictureMetric
    from icd_lightning.metrics.pretrained import MissingNetworkError
    from icd_lightning.metrics.reconstruction import Within

    entry, whole, part = _find(name)
    cls = entry.load()
    if not (isinstance(cls, type) and issubclass(cls, PictureMetric)):  # before it is built: a file may name any class
        raise ValueError(f"metric {name!r} is no PictureMetric: derive its class from icd_lightning.metrics.base")
    try:
        metric = entry.build()
    except MissingNetworkError as error:
        raise FileNotFoundError(f"metric {whole} lacks its network: {error}") from error
    _check_stated(name, metric)
    if entry.init_args:  # stored values are of these settings
        vars(metric)["version"] = f"{metric.version} {dict(entry.init_args)}"
    if part is None:
        return metric
    if not isinstance(metric, PerImage) or "images" not in metric.needs:
        raise ValueError(f"metric {name!r}: {whole} is not of single pictures, and so not of parts of them")
    return Within(metric, edited=PARTS[part])
