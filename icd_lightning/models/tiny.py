"""New, untrained parts of the tiny family: of the same classes as SD1.5's, with a tokenizer for the picture world."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusers import AutoencoderDC, DDIMScheduler, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from icd_lightning.models.text import CLIPConditioner

END_OF_WORD = "</w>"


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


def build_tokenizer(words: Iterable[str], max_length: int) -> CLIPTokenizer:
    """A byte-pair tokenizer in which each of `words` (of lower-case ASCII letters) is one token.

    Any other word falls apart into shorter pieces, down to bytes. Prompts are cut to max_length tokens.
    """
    merges: dict[tuple[str, str], int] = {}  # pair -> rank
    for word in sorted(set(words)):
        pieces = _split(word, merges)
        while len(pieces) > 1:  # of lower rank than all merges before, so that no earlier word changes
            merges[pieces[0], pieces[1]] = len(merges)
            pieces[:2] = [pieces[0] + pieces[1]]
    letters = sorted(ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *map("".join, merges), *special]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=max_length)


def _split(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """Cut a word as byte-pair encoding does: join the pair of the lowest rank until none is left."""
    pieces = [*word[:-1], word[-1] + END_OF_WORD]
    while known := [(merges[pair], at) for at, pair in enumerate(pairwise(pieces)) if pair in merges]:
        _, at = min(known)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces
