"""Stable Diffusion's UNets, 1.5, 2 and XL, and tiny: diffusers' `UNet2DConditionModel`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from icd_lightning.diffusion import guidance_embedding
from icd_lightning.models.backbones.base import Backbone, text_side
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.sources import Source
from icd_lightning.models.text import CLIPConditioner, Conditioner, DualCLIPConditioner

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UNet(Backbone):
    """Timesteps as they are; prompts by cross-attention; w beside the time embedding, as `timestep_cond`.

    The LoRA targets are those of the released students.
    """

    network_class: ClassVar = UNet2DConditionModel
    part: ClassVar = "unet"
    blocks: ClassVar = (ResnetBlock2D, BasicTransformerBlock)
    lora_targets: ClassVar = (
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    )
    guidance_weight: ClassVar = "time_embedding.cond_proj.weight"

    def predict(
        self, network: UNet2DConditionModel, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None
    ) -> Tensor:
        """eps or v (B, C, H, W); SDXL is also told the pooled embeddings and the time ids."""
        dtype = self.weight(network).dtype
        embeds = {name: part.to(dtype) for name, part in conditioning.embeds().items()}
        added = None
        if "pooled_prompt_embeds" in embeds:  # time ids stay float32: 1023 is no bfloat16 number
            added = {"text_embeds": embeds["pooled_prompt_embeds"], "time_ids": conditioning.tensors["time_ids"]}
        return network(
            x.to(dtype),
            t,
            encoder_hidden_states=embeds["prompt_embeds"],
            timestep_cond=None if w is None else guidance_embedding(w, dim=self.guidance_width(network)).to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def guidance_width(self, network: UNet2DConditionModel) -> int | None:
        """`time_cond_proj_dim` of its config."""
        return network.config.time_cond_proj_dim

    def config_with_guidance(self, config: dict[str, Any], width: int) -> dict[str, Any]:
        """With `time_cond_proj_dim`."""
        return {**config, "time_cond_proj_dim": width}

    def add_guidance_embedding(self, network: UNet2DConditionModel, width: int = 512) -> UNet2DConditionModel:
        """With a bias-free linear layer of zeros beside the time embedding's input."""
        weights = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
        first = weights["time_embedding.linear_1.weight"]
        weights[self.guidance_weight] = first.new_zeros(first.shape[1], width)
        return self.with_weights(network, weights, time_cond_proj_dim=width)

    def fold_guidance_embedding(self, network: UNet2DConditionModel, w: float) -> UNet2DConditionModel:
        """A copy without guidance embedding that is what the network was at this w: w becomes part of a bias."""
        weights = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
        projection = weights.pop(self.guidance_weight)
        embedding = guidance_embedding(projection.new_full((1,), w), dim=projection.shape[1]).to(projection.dtype)[0]
        weights["time_embedding.linear_1.bias"] += weights["time_embedding.linear_1.weight"] @ (projection @ embedding)
        return self.with_weights(network, weights, time_cond_proj_dim=None)

    def conditioner(self, source: Source, dtype: torch.dtype) -> Conditioner:
        """CLIP, once or twice, as the model has it."""
        first = text_side(source, "", CLIPTextModel, dtype)
        if not source.has("text_encoder_2"):
            return CLIPConditioner(first.tokenizer, first.text_encoder)
        return DualCLIPConditioner(first, text_side(source, "_2", CLIPTextModelWithProjection, dtype))

    def merge_lora(self, network: UNet2DConditionModel, file: Path, scale: float) -> None:
        """By diffusers, whose own or kohya's scripts wrote it; what it holds for text encoders is left out."""
        options = {"weight_name": file.name, "local_files_only": True, "unet_config": network.config}
        try:
            weights, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
                str(file.parent), return_lora_metadata=True, **options
            )
            StableDiffusionLoraLoaderMixin.load_lora_into_unet(weights, alphas, network, "style", metadata=metadata)
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            raise ValueError(f"{file} is no LoRA of this network ({' '.join(str(error).split())[:200]})") from error
        if not any(".lora_A." in name for name, _ in network.named_parameters()):
            raise ValueError(f"{file} is no LoRA of this network: none of its weights is of a layer of the UNet")
        if any(name.startswith("text_encoder") for name in weights):
            log.warning("%s also changes the text encoder, which is left as it is", file)
        network.fuse_lora(lora_scale=scale)
        network.unload_lora()

    def weight(self, network: UNet2DConditionModel) -> Tensor:
        """The first convolution's, which no student adapts."""
        return network.conv_in.weight

    def require_guidance(self, network: UNet2DConditionModel) -> None:
        """diffusers runs a UNet without its guidance embedding in silence, unguided."""
        network.time_embedding.register_forward_pre_hook(_refuse_missing_guidance)


def _refuse_missing_guidance(module: nn.Module, args: tuple) -> None:
    if len(args) < 2 or args[1] is None:
        raise ValueError("this UNet was called without timestep_cond, its guidance embedding: call Students.predict")
