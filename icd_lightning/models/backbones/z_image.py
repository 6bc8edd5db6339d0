"""Z-Image: diffusers' `ZImageTransformer2DModel`, told of time from noise to data, which it also predicts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from torch import Tensor, nn
from transformers import Qwen3Model

from icd_lightning.models.backbones.base import Widened, check_patches, text_side
from icd_lightning.models.chat import ChatConditioner
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.sources import Source

PATCHES = "2-1"
"""Of 2 x 2 latents in 1 frame, as diffusers names their layers."""


@dataclass(frozen=True)
class ZImage(Widened):
    """1 - sigma as time; prompts of as many tokens as they have; w beside each token of the prompt.

    Rows of zeros stand behind a prompt's tokens. A norm divides each token by its root mean square: what is told of w
    has the token's own, so that the norm divides by the same number as without it. The LoRA targets are all layers of
    the blocks, those by which time enters among them.

    Args:
        max_sequence_length: tokens of a prompt that the language model reads, its chat template among them.
    """

    max_sequence_length: int = 512

    network_class: ClassVar = ZImageTransformer2DModel
    part: ClassVar = "transformer"
    blocks: ClassVar = (ZImageTransformerBlock,)
    lora_targets: ClassVar = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"),
    )
    guidance_weight: ClassVar = "cap_embedder.1.weight"
    scale_weight: ClassVar = "cap_embedder.0.weight"
    width_key: ClassVar = "cap_feat_dim"
    sample_size: ClassVar = 128  # 1024 pixels, as diffusers' pipeline has it

    def predict(
        self, network: ZImageTransformer2DModel, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None
    ) -> Tensor:
        """The velocity (B, C, H, W); ValueError for sides that are not whole patches."""
        check_patches(x, 2)
        dtype = self.weight(network).dtype
        prompts = conditioning.embeds()["prompt_embeds"].to(dtype)
        lengths = prompts.any(-1).sum(1).tolist()  # the network's own code asks for numbers, and waits for the device
        if w is not None:
            size = prompts.float().square().mean(-1, keepdim=True).sqrt().to(dtype)
            prompts = torch.cat([prompts, size * self.entering(network, w)[:, None]], dim=-1)
        prompts = [tokens[:length] for tokens, length in zip(prompts, lengths, strict=True)]
        outputs = network(list(x.to(dtype)[:, :, None]), 1 - t / 1000, prompts, return_dict=False)[0]
        return -torch.stack(outputs)[:, :, 0]

    def entering(self, network: nn.Module, w: Tensor) -> Tensor:
        """Of a root mean square of 1, which sines and cosines have divided by that of 2, (B, W)."""
        return 2**0.5 * super().entering(network, w)

    def conditioner(self, source: Source, dtype: torch.dtype) -> ChatConditioner:
        """Qwen3 before its last layer."""
        side = text_side(source, "", Qwen3Model, dtype, self.max_sequence_length)
        return ChatConditioner(side, (-2,), thinking=True, padded=False)

    def weight(self, network: ZImageTransformer2DModel) -> Tensor:
        """The patches' layer's, which no student adapts."""
        return network.all_x_embedder[PATCHES].weight
