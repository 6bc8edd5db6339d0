"""Architectures, a file each."""

from icd_lightning.models.backbones.base import Backbone
from icd_lightning.models.backbones.unet import UNet

__all__ = ["Backbone", "UNet"]
