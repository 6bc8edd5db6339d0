"""New, untrained parts of the tiny family: of the same classes as SD1.5's, with a tokenizer for the picture world."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers import AutoencoderDC, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from icd_lightning.models.text import CLIPConditioner, build_tokenizer


def build_autoencoder(config: dict[str, Any]) -> AutoencoderDC:
    """An autoencoder with random weights, from its diffusers config."""
    return AutoencoderDC.from_config(config)


def build_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """A UNet with random weights, from its diffusers config."""
    return UNet2DConditionModel.from_config(config)


def build_conditioner(words: Iterable[str], config: dict[str, Any]) -> CLIPConditioner:
    """A text encoder with random weights, from its transformers config, and a tokenizer of whole `words` for it."""
    tokenizer = build_tokenizer(words, config["max_position_embeddings"])
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPConditioner(tokenizer, CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **special, **config)))


def save_teacher(
    folder: Path, unet: UNet2DConditionModel, conditioner: CLIPConditioner, scheduler: dict[str, Any]
) -> None:
    """Write UNet, text encoder, tokenizer and scheduler in diffusers' layout."""
    unet.save_pretrained(folder / "unet")
    conditioner.text_encoder.save_pretrained(folder / "text_encoder")
    conditioner.tokenizer.save_pretrained(folder / "tokenizer")
    DDIMScheduler.from_config(scheduler).save_pretrained(folder / "scheduler")
