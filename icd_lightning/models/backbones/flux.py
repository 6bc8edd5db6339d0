"""FLUX.1 and tiny_flow: diffusers' `FluxTransformer2DModel`, which is told w in an input of its own."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any, ClassVar

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import CLIPTextModel, T5EncoderModel

from icd_lightning.models.backbones.base import Backbone, check_patches, text_side
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.sources import Source
from icd_lightning.models.text import Conditioner, PooledConditioner, T5Conditioner

CHANNELS = 16
"""Of the latents of every FLUX.1 autoencoder, and of tiny's."""
SCHNELL = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": False}


@dataclass(frozen=True)
class Flux(Backbone):
    """Sigma as time; prompts as a sequence and pooled; w as it is, beside the time embedding.

    A network whose input has more channels than the latents sees patches of them, 2 x 2 in FLUX.1, in diffusers' order.
    The LoRA targets are all layers of its blocks, with those by which time, w and the pooled prompt enter.

    Args:
        max_sequence_length: tokens of a prompt that T5 reads.
    """

    max_sequence_length: int = 512

    network_class: ClassVar = FluxTransformer2DModel
    part: ClassVar = "transformer"
    blocks: ClassVar = (FluxTransformerBlock, FluxSingleTransformerBlock)
    lora_targets: ClassVar = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
        *("norm.linear", "norm1.linear", "norm1_context.linear"),
    )
    guidance_weight: ClassVar = "time_text_embed.guidance_embedder.linear_1.weight"
    sample_size: ClassVar = 128  # as diffusers' FluxPipeline has it

    def predict(
        self, network: FluxTransformer2DModel, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None
    ) -> Tensor:
        """The velocity (B, C, H, W); ValueError for sides that are not whole patches."""
        dtype, patch = self.weight(network).dtype, isqrt(network.config.in_channels // x.shape[1])
        check_patches(x, patch)
        packed = pixel_unshuffle(x.to(dtype), patch)
        rows, columns = packed.shape[-2:]
        embeds = {name: part.to(dtype) for name, part in conditioning.embeds().items()}
        output = network(
            packed.flatten(2).mT,
            embeds["prompt_embeds"],
            embeds["pooled_prompt_embeds"],
            t / 1000,  # it multiplies again
            img_ids=positions(1, rows, columns, device=x.device),
            txt_ids=x.new_zeros(embeds["prompt_embeds"].shape[1], 3),
            guidance=w,
            return_dict=False,
        )[0]
        return pixel_shuffle(output.mT.unflatten(2, (rows, columns)), patch)

    def guidance_width(self, network: FluxTransformer2DModel) -> int | None:
        """256, if the network takes w."""
        return (
            network.get_submodule(self.guidance_weight.removesuffix(".weight")).in_features
            if network.config.guidance_embeds
            else None
        )

    def is_guided(self, config: dict[str, Any]) -> bool:
        """As `guidance_embeds` of its config says: FLUX.1-dev was guidance-distilled by its makers."""
        return config.get("guidance_embeds") is True

    def check_teacher(self, config: dict[str, Any]) -> None:
        """Refuse FLUX.1-schnell, which differs from FLUX.1-dev in its lack of w."""
        if all(config.get(key) == value for key, value in SCHNELL.items()):
            raise ValueError(
                "the transformer has the shape of FLUX.1-schnell, whose few steps match a distribution and follow no "
                "probability flow: students cannot be distilled from it; take FLUX.1-dev"
            )

    def config_with_guidance(self, config: dict[str, Any], width: int) -> dict[str, Any]:
        """With `guidance_embeds`; how wide is not to be chosen."""
        return {**config, "guidance_embeds": True}

    def add_guidance_embedding(self, network: FluxTransformer2DModel, width: int = 256) -> FluxTransformer2DModel:
        """With an embedding that begins as the time's does, but for zeros in its last layer."""
        weights = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
        for name in [name for name in weights if ".timestep_embedder." in name]:
            like = weights[name].clone()
            weights[name.replace("timestep", "guidance")] = like.zero_() if "linear_2" in name else like
        return self.with_weights(network, weights, guidance_embeds=True)

    def conditioner(self, source: Source, dtype: torch.dtype) -> Conditioner:
        """CLIP's pooled embedding beside T5's sequence, or beside its own where the model has no T5."""
        clip = text_side(source, "", CLIPTextModel, dtype)
        if source.has("text_encoder_2"):
            return T5Conditioner([clip], text_side(source, "_2", T5EncoderModel, dtype, self.max_sequence_length))
        return PooledConditioner(clip.tokenizer, clip.text_encoder)

    def weight(self, network: FluxTransformer2DModel) -> Tensor:
        """The first layer's, which no student adapts."""
        return network.x_embedder.weight

    def latent_channels(self, network: FluxTransformer2DModel) -> int:
        """What is left of the input's channels when they are taken apart into patches."""
        packed = network.config.in_channels
        return packed // max(1, isqrt(packed // CHANNELS)) ** 2


def positions(*counts: int, device: torch.device) -> Tensor:
    """Of every token of a grid with so many along each axis, (tokens, axes)."""
    return torch.cartesian_prod(*(torch.arange(count, device=device) for count in counts)).float()
