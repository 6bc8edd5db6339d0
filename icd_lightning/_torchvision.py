"""Lets a torchvision that was built for CUDA be imported beside a CPU build of torch.

The registry's torchvision carries compiled operators linked against CUDA. Beside a CPU torch they do not load, and
torchvision then fails on import with `operator torchvision::nms does not exist`, which takes transformers, diffusers,
peft and lpips down with it. Nothing here uses those operators, so it is enough that their names exist.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType


class _DeclareOpsBeforeImport(MetaPathFinder):
    """Steps in at the first `import torchvision`, so that importing icd_lightning itself stays light."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            spec = PathFinder.find_spec(fullname)
            if spec and spec.submodule_search_locations:
                declare_missing_ops(Path(spec.submodule_search_locations[0]))


def install() -> None:
    """Arrange for the missing operators to be declared at the first `import torchvision`; safe to call twice."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _DeclareOpsBeforeImport) for f in sys.meta_path):
        sys.meta_path.insert(0, _DeclareOpsBeforeImport())


def declare_missing_ops(torchvision_folder: Path) -> None:
    """Declare the operators only where torchvision's own libraries, beside this torch, do not bring them."""
    import torch

    for library in [*torchvision_folder.glob("_C*.so"), *torchvision_folder.glob("_C*.pyd")]:
        with contextlib.suppress(OSError):  # linked against a CUDA runtime that is not here
            torch.ops.load_library(str(library))
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
