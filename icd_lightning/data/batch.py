"""The value that travels from the data to the tasks."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """Images (B, 3, H, W) in [-1, 1] with B captions, keys and metadata.

    A sample's metadata is the content of its json file, with `original_size` (h, w) and `crop_top_left` (top, left,
    in the resized image) added: what SDXL is conditioned on.
    """

    images: torch.Tensor
    captions: list[str]
    keys: list[str]
    metadata: list[dict]
