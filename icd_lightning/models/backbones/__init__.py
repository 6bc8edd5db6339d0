"""Architectures, a file each."""

from torch import nn

from icd_lightning.models.backbones.base import Backbone
from icd_lightning.models.backbones.flux import Flux
from icd_lightning.models.backbones.flux2 import Flux2
from icd_lightning.models.backbones.sd3 import SD3
from icd_lightning.models.backbones.unet import UNet
from icd_lightning.models.backbones.z_image import ZImage
from icd_lightning.registry import Entry

TRANSFORMERS: dict[str, type[Backbone]] = {one.network_class.__name__: one for one in (Flux, Flux2, SD3, ZImage)}
"""Those of a model's `transformer`, by its class in diffusers."""


def backbone_of(network: nn.Module) -> Backbone:
    """The backbone of a network of one of these classes; ValueError for another."""
    known = {UNet.network_class.__name__: UNet, **TRANSFORMERS}
    for cls in type(network).__mro__:
        if cls.__name__ in known:
            return known[cls.__name__]()
    raise ValueError(
        f"{type(network).__name__} is none of the networks that a pipeline knows ({', '.join(known)}): add a backbone "
        "(CONTRIBUTING.md), and edit by the commands with --backbone"
    )


def named_backbone(class_path: str) -> Backbone:
    """The backbone of a class's path, such as my_backbones.MyTransformer; ValueError if that is none."""
    entry = Entry(class_path)
    cls = entry.load()
    if not (isinstance(cls, type) and issubclass(cls, Backbone)):
        raise ValueError(
            f"backbone {class_path} is no Backbone: derive it from icd_lightning.models.backbones.Backbone"
        )
    return entry.build()


__all__ = ["SD3", "TRANSFORMERS", "Backbone", "Flux", "Flux2", "UNet", "ZImage", "backbone_of", "named_backbone"]
