"""Stable Diffusion 3 and 3.5: diffusers' `SD3Transformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from icd_lightning.diffusion import guidance_embedding
from icd_lightning.models.backbones.base import Backbone, text_side
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.sources import Source
from icd_lightning.models.text import Conditioner, T5Conditioner

WIDTH = "_guidance_dim"
"""Of the guidance embedding, in the config; diffusers keeps what begins with _ and asks nothing of it."""
T5_LENGTH = 256
"""Tokens of a prompt that T5 reads, as in diffusers' pipeline."""


@dataclass(frozen=True)
class SD3(Backbone):
    """Sigma as time; prompts in the sequence and pooled; w beside the pooled embedding, whose layer is widened for it.

    So a guided network is one of diffusers' own class with a larger `pooled_projection_dim`. The LoRA targets are all
    layers of the blocks, those by which time and the pooled embedding enter among them.
    """

    network_class: ClassVar = SD3Transformer2DModel
    part: ClassVar = "transformer"
    blocks: ClassVar = (JointTransformerBlock,)
    lora_targets: ClassVar = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("norm1.linear", "norm1_context.linear"),
    )
    guidance_weight: ClassVar = "time_text_embed.text_embedder.linear_1.weight"

    def predict(
        self, network: SD3Transformer2DModel, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None
    ) -> Tensor:
        """The velocity (B, C, H, W); ValueError for sides that are not whole patches."""
        dtype, patch = self.weight(network).dtype, network.config.patch_size
        if x.shape[2] % patch or x.shape[3] % patch:
            raise ValueError(f"latents of {x.shape[2]} x {x.shape[3]}: this network takes sides that {patch} divides")
        embeds = {name: part.to(dtype) for name, part in conditioning.embeds().items()}
        pooled = embeds["pooled_prompt_embeds"]
        if w is not None:
            pooled = torch.cat([pooled, guidance_embedding(w, dim=self.guidance_width(network)).to(dtype)], dim=1)
        return network(x.to(dtype), embeds["prompt_embeds"], pooled, t, return_dict=False)[0]

    def guidance_width(self, network: SD3Transformer2DModel) -> int | None:
        """As its config says."""
        return network.config.get(WIDTH)

    def is_guided(self, config: Mapping[str, Any]) -> bool:
        """Whether the embedding is there, as in what stage 1 left."""
        return bool(config.get(WIDTH))

    def width_in(self, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> int:
        """By how much the pooled embedding's layer is wider than in the plain network."""
        layer = weights.get(self.guidance_weight)
        return 0 if layer is None else layer.shape[1] - config["pooled_projection_dim"]

    def config_with_guidance(self, config: dict[str, Any], width: int) -> dict[str, Any]:
        """With a wider pooled embedding."""
        return {**config, "pooled_projection_dim": config["pooled_projection_dim"] + width, WIDTH: width}

    def add_guidance_embedding(self, network: SD3Transformer2DModel, width: int = 512) -> SD3Transformer2DModel:
        """With columns of zeros beside those of the pooled embedding."""
        weights = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
        layer = weights[self.guidance_weight]
        weights[self.guidance_weight] = torch.cat([layer, layer.new_zeros(len(layer), width)], dim=1)
        return self.with_weights(network, weights, **self.config_with_guidance(network.config, width))

    def fold_guidance_embedding(self, network: SD3Transformer2DModel, w: float) -> SD3Transformer2DModel:
        """A copy without guidance embedding that is what the network was at this w: w becomes part of a bias."""
        weights = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
        width, layer = network.config[WIDTH], weights[self.guidance_weight]
        embedding = guidance_embedding(layer.new_full((1,), w), dim=width).to(layer.dtype)[0]
        weights["time_text_embed.text_embedder.linear_1.bias"] += layer[:, -width:] @ embedding
        weights[self.guidance_weight] = layer[:, :-width].contiguous()
        plain = network.config.pooled_projection_dim - width
        return self.with_weights(network, weights, **{"pooled_projection_dim": plain, WIDTH: None})

    def conditioner(self, source: Source, dtype: torch.dtype) -> Conditioner:
        """Both CLIPs, and T5."""
        clips = [text_side(source, number, CLIPTextModelWithProjection, dtype) for number in ("", "_2")]
        return T5Conditioner(clips, text_side(source, "_3", T5EncoderModel, dtype, T5_LENGTH))

    def weight(self, network: SD3Transformer2DModel) -> Tensor:
        """The patches' layer's, which no student adapts."""
        return network.pos_embed.proj.weight
