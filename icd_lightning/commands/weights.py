"""Which weights a command is to run, where: named and checked before torch is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icd_lightning.models.family import Family

DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")


@dataclass(frozen=True)
class Weights:
    """A model, its two students (by default its own), and the device; ValueError for what cannot exist."""

    model: str = "tiny"
    guided_unet: str | None = None
    vae: str | None = None
    forward: str | None = None
    reverse: str | None = None
    boundaries: str | None = None
    lora_alpha: float | None = None
    precision: str = "float32"
    device: str = "auto"
    variant: str | None = None
    prediction_type: str | None = None
    config: str | None = None
    style: str | None = None

    def __post_init__(self) -> None:
        named = self.model == "tiny" or re.match(r"random:|[\w.-]+/[\w.-]+$", self.model)
        if not named and not Path(self.model).exists():
            raise ValueError(
                f"no model at {self.model!r}: name a folder in diffusers' layout, a file, a hub id, or tiny"
            )
        for path in (self.forward, self.reverse):
            if path is not None and not Path(path).exists():
                raise ValueError(f"no student at {path}: give a folder of ours or peft's, or a .safetensors file")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha {self.lora_alpha} must be a positive number: released students have 8")
        check_device(self.device)

    @property
    def students(self) -> dict[str, Any]:
        """As `InvertibleConsistency.from_pretrained` takes them."""
        return {name: getattr(self, name) for name in ("forward", "reverse", "boundaries", "lora_alpha")}

    def family(self) -> Family:
        """The model; this loads torch."""
        from icd_lightning.models.family import Family

        names = ("guided_unet", "vae", "precision", "variant", "prediction_type", "config", "style")
        options = {name: getattr(self, name) for name in names}
        return Family(self.model, **{name: value for name, value in options.items() if value is not None})


def check_device(name: str) -> str:
    """A device's name; whether it is there shows when it is used."""
    if not DEVICE.fullmatch(name):
        raise ValueError(f"device {name!r} cannot be used here: choose auto, cpu, cuda, cuda:1 or mps")
    return name
