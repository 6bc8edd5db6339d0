"""Stable Diffusion 3 and 3.5: diffusers' `SD3Transformer2DModel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from icd_lightning.models.backbones.base import Widened, check_patches, text_side
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.sources import Source
from icd_lightning.models.text import Conditioner, T5Conditioner

T5_LENGTH = 256
"""Tokens of a prompt that T5 reads, as in diffusers' pipeline."""


@dataclass(frozen=True)
class SD3(Widened):
    """Sigma as time; prompts in the sequence and pooled; w beside the pooled embedding, whose layer is widened for it.

    The LoRA targets are all layers of the blocks, those by which time and the pooled embedding enter among them.
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
    width_key: ClassVar = "pooled_projection_dim"

    def predict(
        self, network: SD3Transformer2DModel, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None
    ) -> Tensor:
        """The velocity (B, C, H, W); ValueError for sides that are not whole patches."""
        check_patches(x, network.config.patch_size)
        dtype = self.weight(network).dtype
        embeds = {name: part.to(dtype) for name, part in conditioning.embeds().items()}
        pooled = embeds["pooled_prompt_embeds"]
        if w is not None:
            pooled = torch.cat([pooled, self.entering(network, w)], dim=1)
        return network(x.to(dtype), embeds["prompt_embeds"], pooled, t, return_dict=False)[0]

    def conditioner(self, source: Source, dtype: torch.dtype) -> Conditioner:
        """Both CLIPs, and T5."""
        clips = [text_side(source, number, CLIPTextModelWithProjection, dtype) for number in ("", "_2")]
        return T5Conditioner(clips, text_side(source, "_3", T5EncoderModel, dtype, T5_LENGTH))

    def weight(self, network: SD3Transformer2DModel) -> Tensor:
        """The patches' layer's, which no student adapts."""
        return network.pos_embed.proj.weight
