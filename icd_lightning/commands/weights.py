"""Which weights a command is to run, where: named and checked before torch is loaded.

Nothing that loads torch is imported here, for type checkers neither: jsonargparse would follow them.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from icd_lightning.models.released import SHIPPED, located

DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")


@dataclass(frozen=True)
class Weights:
    """Which model and students to load, and where; ValueError for what cannot exist.

    Args:
        model: "tiny" or "tiny_flow" (shipped), a released one such as icd-sd15 (`icd models`), a folder in diffusers'
            layout, a single .safetensors or .ckpt file, or a hub id.
        guided_unet: The guidance-distilled UNet, a folder, a file, or a released one such as sd15-cfg-distill; by
            default the model's own.
        vae: Another autoencoder, a folder or hub id; by default the model's own.
        forward: The forward student, of a released model, a folder or file of ours or peft's; by default the model's.
        reverse: The reverse student; by default the model's own.
        boundaries: Ends of the students' segments, e.g. 259,519,779,999; by default what their files say.
        lora_alpha: Alpha of students whose files do not say it, as casts and conversions lose it.
        precision: Of the weights.
        device: auto, cpu, cuda, cuda:1 ...
        variant: Of the model's files, e.g. fp16 for diffusion_pytorch_model.fp16.safetensors.
        prediction_type: What the UNet predicts, where the model's scheduler config is wrong or a single file has none.
        config: A folder in diffusers' layout, or a hub id, whose configs and tokenizer a single file is read with.
        style: A style LoRA to merge into the network beneath the students, FILE or FILE:SCALE.
        trained_at: Pixels of a side of the pictures that students were trained on, if other than the model's own.
        backbone: The class of an architecture of yours, e.g. my_backbones.MyTransformer.
    """

    model: str = "tiny"
    guided_unet: str | None = None
    vae: str | None = None
    forward: str | None = None
    reverse: str | None = None
    boundaries: str | None = None
    lora_alpha: float | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    variant: str | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    config: str | None = None
    style: str | None = None
    trained_at: int | None = None
    backbone: str | None = None

    def __post_init__(self) -> None:
        named = self.model in SHIPPED or re.match(r"random:|[\w.-]+/[\w.-]+$", self.model)
        if not named and not Path(located(self.model)).exists():
            raise ValueError(
                f"no model at {self.model!r}: name a folder in diffusers' layout, a file, a hub id, "
                f"{', '.join(SHIPPED)}, or one of `icd models`"
            )
        located(self.guided_unet or "")
        for path in (self.forward, self.reverse):
            if path is not None and not Path(located(path)).exists():
                raise ValueError(f"no student at {path}: give a folder of ours or peft's, or a .safetensors file")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha {self.lora_alpha} must be a positive number: released students have 8")
        check_device(self.device)

    @property
    def about(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(Weights)}

    def family(self) -> Any:
        """The model, a `Family`; this loads torch."""
        from icd_lightning.models.backbones import named_backbone
        from icd_lightning.models.family import Family

        names = ("guided_unet", "vae", "precision", "variant", "prediction_type", "config", "style", "trained_at")
        told = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return Family(self.model, backbone=self.backbone and named_backbone(self.backbone), **told)

    def models(self) -> Any:
        """The model and the students on the device, a `Models`; this loads torch."""
        from icd_lightning.evaluation.methods import Models

        students = {name: getattr(self, name) for name in ("forward", "reverse", "boundaries", "lora_alpha")}
        return Models(self.family(), **students, device=find_device(self.device))


@dataclass(frozen=True)
class EncoderWeights:
    """An autoencoder, and perhaps the model whose text encoders are to be used; each process loads its own, once."""

    vae: str
    text: str | None
    device: str

    @cached_property
    def autoencoder(self) -> Any:
        from icd_lightning.models.family import load_autoencoder

        return load_autoencoder(self.vae).to(find_device(self.device))

    @cached_property
    def conditioner(self) -> Any:
        from icd_lightning.models.family import Family

        return Family(self.text).load_conditioner().to(find_device(self.device))

    def encoders(self) -> Any:
        from icd_lightning.data.latents import Encoders

        text = (self.conditioner.fingerprint, self.embeds) if self.text else ()
        return Encoders(self.autoencoder.fingerprint, self.moments, *text)

    def moments(self, images: Any) -> Any:
        """Of images (B, 3, H, W) in [-1, 1]."""
        return self.autoencoder.moments(images.to(find_device(self.device)))

    def embeds(self, captions: list[str]) -> Any:
        return self.conditioner(captions).embeds()

    def __getstate__(self) -> dict[str, Any]:
        return asdict(self)


def check_device(name: str) -> str:
    """A device's name; whether it is there shows when it is used."""
    if not DEVICE.fullmatch(name):
        raise ValueError(f"device {name!r} cannot be used here: choose auto, cpu, cuda, cuda:1 or mps")
    return name


def find_device(name: str) -> Any:
    """The torch.device of this name, tried out; ValueError if it cannot be used.

    "auto" is a GPU where there is one, and under torchrun that of this rank.
    """
    import torch

    if check_device(name) == "auto":
        rank = os.environ.get("LOCAL_RANK", 0)
        return torch.device(f"cuda:{rank}" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        from icd_lightning.models.weights import first_line

        reason = first_line(error).split(". ")[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); try auto or cpu") from error
    return torch.device(name)
