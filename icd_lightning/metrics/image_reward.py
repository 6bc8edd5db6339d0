"""ImageReward-v1.0 on transformers' BLIP, from its own checkpoint; its package needs a transformers of long ago.

BLIP (ViT-L/16, and BERT that attends to the picture) reads picture and prompt, and five linear layers without anything
between them turn the first token into a reward.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, normalize
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from icd_lightning.metrics.base import PerImage, pillow_squares
from icd_lightning.metrics.pretrained import find_hub_file, frozen, load_part, load_weights

REPOSITORY, FILE, TOKENIZER = "THUDM/ImageReward", "ImageReward.pt", "bert-base-uncased"

VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}  # ViT-L
VISION |= {"image_size": 224, "layer_norm_eps": 1e-6}
TEXT = {"encoder_hidden_size": 1024, "num_attention_heads": 12}
HEAD = (1024, 128, 64, 16, 1)
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the rewards of its training set
MAX_TOKENS = 35

VISION_NAMES = {  # of the checkpoint -> of transformers
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"^norm\.": "post_layernorm.",
}


class ImageReward(PerImage):
    """Mean of ImageReward-v1.0 (arXiv:2304.05977), a reward that people's choices taught, of pictures and prompts.

    weights: the tensors of ImageReward.pt, where they are not those on this machine, with their tokenizer and the sizes
    of the two transformers; RuntimeError if they do not fit.
    """

    needs = ("images", "prompts")
    higher_is_better = True
    label = "ImageReward"

    def __init__(
        self,
        weights: dict[str, Any] | None = None,
        tokenizer: Any = None,
        *,
        vision: dict[str, Any] = VISION,
        text: dict[str, Any] = TEXT,
    ) -> None:
        super().__init__()
        weights = weights or load_weights(find_hub_file(REPOSITORY, FILE))
        self.tokenizer = tokenizer or load_part(TOKENIZER, AutoTokenizer)
        vision_config = BlipVisionConfig(**vision, attn_implementation="eager")
        text_config = BlipTextConfig(**text, attn_implementation="eager")
        with torch.device("meta"):  # every weight is then a loaded one
            self.vision = BlipVisionModel(vision_config)
            self.text = BlipTextModel(text_config, add_pooling_layer=False)
            self.head = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise((text_config.hidden_size, *HEAD))))
        vision_weights = _below("blip.visual_encoder.", weights)
        for pattern, replacement in VISION_NAMES.items():
            vision_weights = {re.sub(pattern, replacement, name): value for name, value in vision_weights.items()}
        self.vision.load_state_dict(vision_weights, assign=True)
        text_weights = _below("blip.text_encoder.", weights)
        text_weights.pop("embeddings.position_ids", None)
        self.text.load_state_dict(text_weights, assign=True)
        layers = sorted({int(name.split(".")[2]) for name in weights if name.startswith("mlp.layers.")})
        for layer, index in zip(self.head, layers, strict=True):  # between them lie layers of dropout
            layer.load_state_dict(_below(f"mlp.layers.{index}.", weights), assign=True)
        self.text.embeddings.position_ids = torch.arange(text_config.max_position_embeddings)[None]
        frozen(self)

    def values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        device = self.head[0].weight.device
        squares = pillow_squares(images, self.vision.config.image_size, InterpolationMode.BICUBIC)
        pixels = normalize(squares / 255, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        seen = self.vision(pixel_values=pixels.to(device)).last_hidden_state
        settings = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **settings).to(device)
        read = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        return (self.head(read[:, 0]).squeeze(1) - MEAN) / STD


def _below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
