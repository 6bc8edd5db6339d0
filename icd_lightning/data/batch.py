"""The value that travels from the data to the tasks."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """Images (B, 3, H, W) in [-1, 1] with B captions, keys and metadata; or, instead of images, their latents.

    `moments` are what an autoencoder's encoder gave for the images and `LatentAutoencoder.sample` turns into latents:
    (B, 2 C, h, w), or (B, C, h, w) of an autoencoder without posterior. Of images and moments one is None.

    `prompt_embeds` (B, L, D) and, of SDXL, `pooled_prompt_embeds` (B, P) are what text encoders gave for the captions,
    where they were encoded before.

    A sample's metadata is the content of its json file, with `original_size` (h, w) and `crop_top_left` (top, left,
    in the resized image) added: what SDXL is conditioned on.
    """

    images: torch.Tensor | None
    captions: list[str]
    keys: list[str]
    metadata: list[dict]
    moments: torch.Tensor | None = None
    prompt_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
