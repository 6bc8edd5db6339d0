"""Architectures, a file each."""

from icd_lightning.models.backbones.base import Backbone
from icd_lightning.models.backbones.flux import Flux
from icd_lightning.models.backbones.sd3 import SD3
from icd_lightning.models.backbones.unet import UNet

TRANSFORMERS: dict[str, type[Backbone]] = {one.network_class.__name__: one for one in (Flux, SD3)}
"""Those of a model's `transformer`, by its class in diffusers."""

__all__ = ["SD3", "TRANSFORMERS", "Backbone", "Flux", "UNet"]
