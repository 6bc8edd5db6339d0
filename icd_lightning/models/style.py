"""A style LoRA, merged into a network for good before students are planted on it."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

log = logging.getLogger(__name__)


def merge_style(network: nn.Module, style: str) -> None:
    """Merge the LoRA of `FILE`, or `FILE:SCALE`, a .safetensors file as diffusers or kohya's scripts write it.

    Raises ValueError for a file that fits no layer. What it holds for text encoders is left out, with a warning.
    """
    file, scale = parse_style(style)
    if not isinstance(network, UNet2DConditionModel):
        raise ValueError(f"style {file} cannot be merged: styles are of UNets, this is a {type(network).__name__}")
    options = {"weight_name": file.name, "local_files_only": True, "unet_config": network.config}
    try:
        weights, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
            str(file.parent), return_lora_metadata=True, **options
        )
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(weights, alphas, network, "style", metadata=metadata)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"{file} is no LoRA of this network ({' '.join(str(error).split())[:200]})") from error
    if not any(isinstance(module, BaseTunerLayer) for module in network.modules()):
        raise ValueError(f"{file} is no LoRA of this network: none of its weights is of a layer of the UNet")
    if any(name.startswith("text_encoder") for name in weights):
        log.warning("%s also changes the text encoder, which is left as it is", file)
    network.fuse_lora(lora_scale=scale)
    network.unload_lora()


def parse_style(style: str) -> tuple[Path, float]:
    """The file and the scale, by default 1, of `FILE:SCALE`; ValueError where there is no file, or no such scale."""
    name, _, text = style.rpartition(":")
    try:
        file, scale = (Path(style), 1.0) if not name or Path(style).is_file() else (Path(name), float(text))
    except ValueError:
        raise ValueError(f"style {style!r} must be FILE or FILE:SCALE, SCALE a number") from None
    if not file.is_file() or file.suffix != ".safetensors":
        raise ValueError(f"style {style!r}: there is no .safetensors file {file}")
    if not math.isfinite(scale):
        raise ValueError(f"style {style!r}: scale {scale} is not finite")
    return file, scale
