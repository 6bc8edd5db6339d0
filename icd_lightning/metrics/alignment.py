"""How well pictures fit texts, and each other, to CLIP, which reads both. Images are (B, 3, H, W) in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icd_lightning.data.images import to_pictures
from icd_lightning.metrics.base import PerImage
from icd_lightning.metrics.pretrained import load_network, load_part

CLIP = "openai/clip-vit-large-patch14"


class _CLIPMetric(PerImage):
    """CLIP with its own processor and tokenizer."""

    higher_is_better = True

    def __init__(self) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        super().__init__()
        self.processor = load_part(CLIP, AutoImageProcessor, backend="pil")
        self.tokenizer = load_part(CLIP, AutoTokenizer)
        self.network = load_network(CLIP, CLIPModel)

    def _embed_images(self, images: Tensor) -> Tensor:
        """Embeddings (B, D)."""
        pixels = self.processor(images=list(to_pictures(images)), return_tensors="pt")["pixel_values"]
        return self.network.get_image_features(pixels.to(images.device)).pooler_output

    def _embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, D); a prompt is cut to what CLIP can read."""
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        return self.network.get_text_features(**tokens.to(self.network.device)).pooler_output


class CLIPText(_CLIPMetric):
    """CLIP-T: mean cosine of pictures and their prompts."""

    needs = ("images", "prompts")
    label = "CLIP-T"

    def values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.cosine_similarity(self._embed_images(images), self._embed_texts(prompts))


class CLIPImage(_CLIPMetric):
    """CLIP-I: mean cosine of pictures and references."""

    def values(self, images: Tensor, reference: Tensor) -> Tensor:
        return torch.cosine_similarity(self._embed_images(images), self._embed_images(reference))


class CLIPScore(CLIPText):
    """CLIPScore as PIE-Bench counts it: 100 times the cosine of picture and prompt, 0 where that is negative."""

    def values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 100 * super().values(images, prompts).clamp(min=0)
