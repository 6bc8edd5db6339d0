"""Architectures, a file each."""

from icd_lightning.models.backbones.base import Backbone
from icd_lightning.models.backbones.sd3 import SD3
from icd_lightning.models.backbones.unet import UNet

__all__ = ["SD3", "Backbone", "UNet"]
