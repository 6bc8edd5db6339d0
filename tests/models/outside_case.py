"""Stable Diffusion 3 as somebody adds it from outside of the package."""

from dataclasses import dataclass
from typing import ClassVar

import icd_lightning  # noqa: F401 (before diffusers: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from transformers import CLIPTextModel

from icd_lightning.diffusion import guidance_embedding
from icd_lightning.models.backbones import Backbone
from icd_lightning.models.text import PooledConditioner

TEXT_WIDTH = 16
POOLED = "time_text_embed.text_embedder.linear_1.weight"


@dataclass(frozen=True)
class SmallSD3(Backbone):
    """w is told beside the pooled embedding, whose layer is widened for it."""

    network_class: ClassVar = SD3Transformer2DModel
    part: ClassVar = "transformer"
    blocks: ClassVar = (JointTransformerBlock,)
    lora_targets: ClassVar = ("to_q", "to_k", "to_v", "to_out.0")
    guidance_weight: ClassVar = POOLED

    def predict(self, network, x, t, conditioning, w):
        pooled = conditioning.tensors["pooled_prompt_embeds"]
        if w is not None:
            pooled = torch.cat([pooled, guidance_embedding(w, dim=self.guidance_width(network))], dim=1)
        return network(x, conditioning.tensors["prompt_embeds"], pooled, t, return_dict=False)[0]

    def guidance_width(self, network):
        return network.config.pooled_projection_dim - TEXT_WIDTH or None

    def config_with_guidance(self, config, width):
        return {**config, "pooled_projection_dim": TEXT_WIDTH + width}

    def add_guidance_embedding(self, network, width=512):
        weights = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
        weights[POOLED] = torch.cat([weights[POOLED], weights[POOLED].new_zeros(len(weights[POOLED]), width)], dim=1)
        return self.with_weights(network, weights, pooled_projection_dim=TEXT_WIDTH + width)

    def conditioner(self, source, dtype):
        encoder = source.network("text_encoder", CLIPTextModel, dtype).requires_grad_(False).eval()
        return PooledConditioner(source.tokenizer("tokenizer"), encoder)

    def weight(self, network):
        return network.pos_embed.proj.weight
