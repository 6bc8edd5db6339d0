"""What people give and get: pictures of every form, to images (B, 3, H, W) in [-1, 1] and back; prompts, as texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from icd_lightning.data.images import read_picture, resize_and_crop, to_images, to_pictures, to_rgb

Pictures = str | Path | Image.Image | np.ndarray | Tensor | Sequence
"""One picture or several: files, PIL images, arrays (H, W, 3) uint8 or in [0, 1], tensors (B, 3, H, W) in [0, 1]."""

NOT_FINITE_REMEDY = "take a smaller guidance_scale or amplify, or precision float32"

OutputType = Literal["pil", "np", "pt", "latent"]


def as_images(pictures: Pictures, height: int, width: int) -> Tensor:
    """Images (B, 3, height, width) in [-1, 1], float32.

    Files, PIL images and arrays of uint8 are turned upright, put on white, resized to cover height x width, and the
    centre is cut out. Tensors, and arrays in [0, 1], must be of that size.
    """
    if isinstance(pictures, (list, tuple)):
        if not pictures:
            raise ValueError("there is no picture: give at least one")
        return torch.cat([as_images(one, height, width) for one in pictures])
    if isinstance(pictures, np.ndarray) and pictures.dtype.kind == "f":
        pictures = torch.from_numpy(pictures).movedim(-1, -3)
    if isinstance(pictures, Tensor):
        return _from_unit(pictures if pictures.ndim == 4 else pictures[None], height, width)
    if isinstance(pictures, np.ndarray) and pictures.ndim == 4:
        return as_images(list(pictures), height, width)
    return to_images([np.asarray(resize_and_crop(_opened(pictures), height, width)[0])])


def as_output(images: Tensor, output_type: OutputType) -> list[Image.Image] | np.ndarray | Tensor:
    """Images (B, 3, H, W) in [-1, 1] as PIL images, or as an array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1]."""
    if not images.isfinite().all():
        raise ValueError(f"the result is not finite: {NOT_FINITE_REMEDY}")
    if output_type == "pil":
        return [Image.fromarray(picture) for picture in to_pictures(images)]
    unit = images.float() / 2 + 0.5
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()


def as_texts(prompt: str | Sequence[str], name: str) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} {prompt!r} must be text, or a list of texts")
    return texts


def batch_size(**parts: Sequence | Tensor | None) -> int:
    """How many pictures these make: each part is of one, or of B."""
    counts = {name: len(part) for name, part in parts.items() if part is not None}
    most = max(counts.values())
    if set(counts.values()) - {1, most}:
        given = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise ValueError(f"{given} do not go together: give one, or as many of each")
    return most


def repeated(part: Any, count: int) -> Any:
    if len(part) == count:
        return part
    return part.repeat(count, 1, 1, 1) if isinstance(part, Tensor) else part * count


def _opened(picture: str | Path | Image.Image | np.ndarray) -> Image.Image:
    if isinstance(picture, (str, Path)):
        return read_picture(picture)
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8:
        picture = Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    kind = f"an array of {picture.dtype}" if isinstance(picture, np.ndarray) else type(picture).__name__
    raise ValueError(f"{kind} is no picture: give a file, a PIL image, an array of uint8, or a tensor in [0, 1]")


def _from_unit(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[1:] != (3, height, width):
        size = " x ".join(map(str, images.shape[1:]))
        raise ValueError(f"images are {size}, not 3 x {height} x {width}: give height and width, or resize them")
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"images lie between {float(images.min()):g} and {float(images.max()):g}: bring them to [0, 1], "
            "as output_type 'pt' and 'np' have them"
        )
    return images.float() * 2 - 1
