"""How well pictures fit texts, and each other, to networks that embed them. Images are (B, 3, H, W) in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from icd_lightning.data.images import to_pictures
from icd_lightning.metrics.base import PerImage, where_finite
from icd_lightning.metrics.pretrained import load_network, load_part

CLIP = "openai/clip-vit-large-patch14"


class ImageCosine(PerImage):
    """Mean cosine of pictures and references, as a network of the hub embeds what its own processor makes of them."""

    higher_is_better = True

    def __init__(self, repository: str = CLIP) -> None:
        super().__init__()
        self.processor = load_part(repository, AutoImageProcessor, backend="pil")
        self.network = load_network(repository)

    def values(self, images: Tensor, reference: Tensor) -> Tensor:
        return torch.cosine_similarity(self.embed(images), self.embed(reference))

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (B, D)."""
        pixels = self.processor(images=list(to_pictures(images)), return_tensors="pt")["pixel_values"]
        outputs = getattr(self.network, "get_image_features", self.network)  # CLIP reads texts, too
        return where_finite(outputs(pixels.to(images.device)).pooler_output, images)


class CLIPText(ImageCosine):
    """CLIP-T: mean cosine of pictures and their prompts; a prompt is cut to what CLIP can read."""

    needs = ("images", "prompts")
    label = "CLIP-T"

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = load_part(CLIP, AutoTokenizer)

    def values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        texts = self.network.get_text_features(**tokens.to(self.network.device)).pooler_output
        return torch.cosine_similarity(self.embed(images), texts)


class CLIPScore(CLIPText):
    """CLIPScore as PIE-Bench counts it: 100 times the cosine of picture and prompt, 0 where that is negative."""

    def values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 100 * super().values(images, prompts).clamp(min=0)
