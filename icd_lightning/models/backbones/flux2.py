"""FLUX.2-klein-base: diffusers' `Flux2Transformer2DModel`, to which stage 1 adds the w that FLUX.2-dev is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
from torch import Tensor
from transformers import Qwen3Model

from icd_lightning.diffusion import Boundaries
from icd_lightning.models.backbones.base import Backbone, text_side
from icd_lightning.models.backbones.flux import Flux, positions
from icd_lightning.models.chat import ChatConditioner
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.sources import Source

MISTRAL = 15360
"""Width of prompts in FLUX.2-dev."""


@dataclass(frozen=True)
class Flux2(Flux):
    """As FLUX.1, but for a single sequence of prompts, and latents that are the autoencoder's patches.

    The LoRA targets are all layers of its blocks, with those by which time and w enter all blocks.

    Args:
        max_sequence_length: tokens of a prompt that the language model reads, its chat template among them.
    """

    network_class: ClassVar = Flux2Transformer2DModel
    blocks: ClassVar = (Flux2TransformerBlock, Flux2SingleTransformerBlock)
    lora_targets: ClassVar = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        *("attn.to_qkv_mlp_proj", "attn.to_out", "single_stream_modulation.linear"),
        *("double_stream_modulation_img.linear", "double_stream_modulation_txt.linear"),
    )
    guidance_weight: ClassVar = "time_guidance_embed.guidance_embedder.linear_1.weight"
    sample_size: ClassVar = 64  # 1024 pixels, as diffusers' pipeline has it

    def predict(
        self, network: Flux2Transformer2DModel, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None
    ) -> Tensor:
        """The velocity (B, C, H, W)."""
        dtype, (rows, columns) = self.weight(network).dtype, x.shape[2:]
        prompts = conditioning.embeds()["prompt_embeds"].to(dtype)
        output = network(
            x.to(dtype).flatten(2).mT,
            prompts,
            t / 1000,  # it multiplies again
            img_ids=positions(1, rows, columns, 1, device=x.device),
            txt_ids=positions(1, 1, 1, prompts.shape[1], device=x.device),
            guidance=w,
            return_dict=False,
        )[0]
        return output.mT.unflatten(2, (rows, columns))

    def check_teacher(self, config: dict[str, Any]) -> None:
        """Refuse FLUX.2-dev, whose prompts a Mistral reads."""
        if config.get("joint_attention_dim", MISTRAL) == MISTRAL:
            raise ValueError(
                "the transformer has the shape of FLUX.2-dev, whose prompts a Mistral reads, and that is not supported "
                "here: take FLUX.2-klein-base-4B or FLUX.2-klein-base-9B"
            )

    def scheduler(self, config: dict[str, Any], tokens: int) -> dict[str, Any]:
        """With the shift of diffusers' pipeline, which depends on the number of steps too: the solver's, 50."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu  # which imports a Mistral

        mu = compute_empirical_mu(tokens, Boundaries.num_solver_steps)
        return {**config, "base_shift": mu, "max_shift": mu}

    def conditioner(self, source: Source, dtype: torch.dtype) -> ChatConditioner:
        """Qwen3 after a quarter, a half and three quarters of its layers."""
        side = text_side(source, "", Qwen3Model, dtype, self.max_sequence_length)
        return ChatConditioner(side, (9, 18, 27), thinking=False, padded=True)

    latent_channels = Backbone.latent_channels
