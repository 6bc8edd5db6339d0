"""icd_lightning: Invertible Consistency Distillation (arXiv:2406.14539) on PyTorch Lightning."""

from icd_lightning import _torchvision

_torchvision.install()

__version__ = "0.1.0"
