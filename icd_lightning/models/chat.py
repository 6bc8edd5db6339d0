"""Prompts as a message to a language model: Qwen3 in its chat template, which FLUX.2-klein and Z-Image are told by."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import Qwen2Tokenizer

from icd_lightning.models.conditioning import Conditioning, Framing
from icd_lightning.models.text import CLIPConditioner, TextSide
from icd_lightning.models.weights import told_of

PLACE = "{prompt}"
"""Stands for a prompt while the template is taken apart."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""What Qwen3's own template makes of one message."""


def build_chat_tokenizer() -> Qwen2Tokenizer:
    """One that knows bytes and the marks of a chat alone, for random language models."""
    vocab = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    marks = ["<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=marks, chat_template=TEMPLATE)


class ChatConditioner(CLIPConditioner):
    """Hidden states of a language model's layers, side by side, for a prompt as the message of a user.

    The template stands around a prompt as special tokens do: it stays whole where a prompt is cut, which diffusers'
    pipelines cut at its end, and words are looked up in the prompt alone.

    Args:
        side: the language model beside its tokenizer, which is left as it is.
        layers: which hidden states, as transformers numbers them.
        thinking: leave room for thoughts before the answer, `enable_thinking` of the template.
        padded: keep the hidden states of padding; else rows of zeros stand there.
    """

    def __init__(self, side: TextSide, layers: Sequence[int], *, thinking: bool, padded: bool) -> None:
        tokenizer, self.ends = _in_template(side.tokenizer, thinking)
        super().__init__(tokenizer, side.text_encoder.base_model, side.max_length)  # without what predicts words
        self.layers, self.padded = tuple(layers), padded

    def forward(self, prompts: Sequence[str], framing: Framing | None = None) -> Conditioning:
        """Encode B prompts to prompt_embeds (B, L, D of all layers); the framing is not for such a network."""
        told = self.tokenize(prompts).to(next(self.text_encoder.parameters()).device)
        states = self.text_encoder(**told, output_hidden_states=True, use_cache=False).hidden_states
        embeds = torch.cat([states[layer] for layer in self.layers], dim=-1)
        return Conditioning(
            prompt_embeds=embeds if self.padded else embeds.masked_fill(told.attention_mask[..., None] == 0, 0)
        )


def _in_template(tokenizer: Any, thinking: bool) -> tuple[Any, int]:
    """A copy that puts its template around what it reads, and how many tokens of it come behind."""
    with told_of(f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": PLACE}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in text.split(PLACE))
    around = [
        {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}
        for name, ids in (("before", before), ("after", after))
    ]
    tokenizer = deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("before $A after", special_tokens=around)
    return tokenizer, len(after)
