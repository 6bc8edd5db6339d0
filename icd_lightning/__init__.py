"""icd_lightning: Invertible Consistency Distillation (arXiv:2406.14539) on PyTorch Lightning."""

from typing import TYPE_CHECKING, Any

from icd_lightning import _torchvision

if TYPE_CHECKING:
    from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline

_torchvision.install()

__version__ = "0.1.0"
__all__ = ["InvertibleConsistencyPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """The pipeline, imported when it is asked for: importing the package stays light."""
    if name == "InvertibleConsistencyPipeline":
        from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline

        return InvertibleConsistencyPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
