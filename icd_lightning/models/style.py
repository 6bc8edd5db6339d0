"""A style LoRA, merged into a network for good before students are planted on it: how it is named."""

from __future__ import annotations

import math
from pathlib import Path


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
