"""Prompts -> Conditioning. Every difference between the families' text sides ends here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from icd_lightning.models.conditioning import Conditioning

log = logging.getLogger(__name__)


MAX_REPORTS = 20
"""Cut prompts that are logged; captions on the web are long, and a training sees millions of them."""


class CLIPConditioner(nn.Module):
    """One CLIP text encoder, as in SD1.5 and tiny; the unconditional prompt is the empty one, encoded."""

    def __init__(self, tokenizer: Any, text_encoder: nn.Module) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self._reported: set[str] = set()

    @property
    def max_length(self) -> int:
        return int(self.text_encoder.config.max_position_embeddings)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, L), padded to L; a prompt that is too long is cut, and what is cut is logged, once."""
        for prompt, ids in zip(prompts, self.tokenizer(list(prompts), verbose=False).input_ids, strict=True):
            if len(ids) > self.max_length:
                self._report(prompt, self.tokenizer.decode(ids[self.max_length - 1 : -1]))
        padded = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        return padded.input_ids

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts to prompt_embeds (B, L, D); gradients reach the encoder where it is trainable."""
        device = next(self.text_encoder.parameters()).device
        return Conditioning(self.text_encoder(self.tokenize(prompts).to(device))[0])

    @torch.no_grad()
    def unconditional(self, batch_size: int) -> Conditioning:
        """The embeddings that stand for no prompt, (B, L, D)."""
        return self([""]).repeat(batch_size)

    def _report(self, prompt: str, lost: str) -> None:
        if prompt in self._reported or len(self._reported) >= MAX_REPORTS:
            return
        self._reported.add(prompt)
        log.warning("prompt %r is longer than %d tokens; cut: %r", prompt, self.max_length, lost)
        if len(self._reported) == MAX_REPORTS:
            log.warning("prompts cut from now on are not reported")
