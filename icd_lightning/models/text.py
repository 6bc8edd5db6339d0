"""Prompts -> Conditioning. Every difference between the families' text sides ends here.

Beside it, a tokenizer made of words: for families whose vocabulary is known, and for random ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from copy import copy
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import BatchEncoding, CLIPTokenizer, T5Tokenizer

from icd_lightning.models.conditioning import Conditioning, Framing
from icd_lightning.models.weights import fingerprint

log = logging.getLogger(__name__)

END_OF_WORD = "</w>"
MAX_REPORTS = 20
"""Cut prompts that are logged; captions on the web are long, and a training sees millions of them."""


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


def build_t5_tokenizer() -> T5Tokenizer:
    """One that knows the printable characters of ASCII alone, for random T5 encoders."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127))]
    vocab = [(piece, -2.0) for piece in pieces]  # the third is what all others become
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def unknown_words(tokenizer: Any, *prompts: str) -> list[str]:
    """The words that a tokenizer of whole words does not keep whole."""
    words = dict.fromkeys(word for prompt in prompts for word in prompt.lower().split())
    return [word for word in words if len(tokenizer(word).input_ids) > 3]


class TextSide(nn.Module):
    """One text encoder beside its tokenizer.

    Args:
        max_length: tokens that a prompt is cut to; None: as many as the encoder has positions, which T5 does not have.
    """

    ends: int = 1
    """Special tokens behind a prompt."""

    def __init__(self, tokenizer: Any, text_encoder: nn.Module, max_length: int | None = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.max_length = max_length or int(text_encoder.config.max_position_embeddings)
        # what the tokenizer's file says of this may be another number, or none; P2P asks the tokenizer
        tokenizer.model_max_length = self.max_length
        if (special := tokenizer.num_special_tokens_to_add()) >= self.max_length:
            raise ValueError(
                f"prompts of {self.max_length} tokens have no room for words beside {special} that stand around them: "
                "give a greater max_sequence_length"
            )
        last, known = max(tokenizer.get_vocab().values()), text_encoder.config.vocab_size
        if last >= known:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path} gives token ids up to {last}, and the "
                f"{type(text_encoder).__name__} beside it knows those up to {known - 1}: they are of two models; take "
                "the tokenizer's folder of the one that the text encoder is of"
            )
        self.reports_cuts = True
        self._reported: set[str] = set()

    def tokenize(self, prompts: Sequence[str]) -> BatchEncoding:
        """`input_ids` (B, L), padded to L; a prompt that is too long is cut, and what is cut is logged, once."""
        for prompt, ids in zip(prompts, self.tokenizer(list(prompts), verbose=False).input_ids, strict=True):
            if self.reports_cuts and len(ids) > self.max_length:
                self._report(prompt, self.tokenizer.decode(ids[self.max_length - self.ends : -self.ends]))
        return self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )

    def encode(self, prompts: Sequence[str], **options: Any) -> Any:
        """The text encoder's output for B prompts; gradients reach the encoder where it is trainable."""
        device = next(self.text_encoder.parameters()).device
        return self.text_encoder(self.tokenize(prompts).input_ids.to(device), **options)

    def _report(self, prompt: str, lost: str) -> None:
        if prompt in self._reported or len(self._reported) >= MAX_REPORTS:
            return
        self._reported.add(prompt)
        log.warning("prompt %r is longer than %d tokens; cut: %r", prompt, self.max_length, lost)
        if len(self._reported) == MAX_REPORTS:
            log.warning("prompts cut from now on are not reported")


class CLIPConditioner(TextSide):
    """One CLIP text encoder, as in SD1.5 and tiny; the unconditional prompt is the empty one, encoded."""

    @property
    def sides(self) -> list[TextSide]:
        """Its encoders, as diffusers numbers them."""
        return [self]

    @cached_property
    def fingerprint(self) -> str:
        """Tells sets of text encoders apart; the same in any precision."""
        return fingerprint(*(side.text_encoder for side in self.sides))

    def forward(self, prompts: Sequence[str], framing: Framing | None = None) -> Conditioning:
        """Encode B prompts to prompt_embeds (B, L, D); the framing is not for such a network."""
        return Conditioning(prompt_embeds=self.encode(prompts)[0])

    @torch.no_grad()
    def unconditional(self, batch_size: int, framing: Framing | None = None) -> Conditioning:
        """The embeddings that stand for no prompt, (B, L, D)."""
        return self([""]).repeat(batch_size)


class PooledConditioner(CLIPConditioner):
    """The same, and the network is told the pooled embedding too, as tiny_flow."""

    def forward(self, prompts: Sequence[str], framing: Framing | None = None) -> Conditioning:
        """Encode B prompts to prompt_embeds (B, L, D) and pooled ones (B, D); the framing is not for such a network."""
        encoded = self.encode(prompts)
        return Conditioning(prompt_embeds=encoded.last_hidden_state, pooled_prompt_embeds=encoded.pooler_output)


class DualCLIPConditioner(nn.Module):
    """Two CLIP text encoders side by side, and the sizes of the pictures, as in SDXL; no prompt is zeros.

    Args:
        first, second: the encoders; the second one's has a projection (`CLIPTextModelWithProjection`).
        resolution: pixels of a side of a picture of unknown framing, where it is not yet told by `for_size`.
    """

    def __init__(self, first: TextSide, second: TextSide, resolution: int = 1024) -> None:
        super().__init__()
        self.first, self.second, self.size = first, second, (resolution, resolution)
        self.tokenizer = first.tokenizer  # the second differs in its padding alone
        second.reports_cuts = False  # both cut a prompt alike

    def for_size(self, height: int, width: int) -> DualCLIPConditioner:
        """The same encoders for pictures of another size, where no framing is given."""
        other = copy(self)
        other.size = (height, width)
        return other

    fingerprint = CLIPConditioner.fingerprint

    @property
    def sides(self) -> list[TextSide]:
        """Its encoders, as diffusers numbers them."""
        return [self.first, self.second]

    def forward(self, prompts: Sequence[str], framing: Framing | None = None) -> Conditioning:
        """Encode B prompts to prompt_embeds (B, L, D1 + D2) and pooled ones (B, P); an empty prompt is all zeros.

        Without framing the pictures are whole, and of the usual size.
        """
        first, second = (side.encode(prompts, output_hidden_states=True) for side in (self.first, self.second))
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        given = torch.tensor([prompt != "" for prompt in prompts], device=embeds.device)
        ids = self._time_ids(len(prompts), framing)
        return Conditioning(
            prompt_embeds=embeds * given[:, None, None],
            pooled_prompt_embeds=second.text_embeds * given[:, None],
            time_ids=ids,
        )

    def unconditional(self, batch_size: int, framing: Framing | None = None) -> Conditioning:
        """What an empty prompt becomes, without the work, beside pictures of the same framing."""
        first, second = self.first.text_encoder.config, self.second.text_encoder.config
        like = next(self.second.parameters())
        embeds = like.new_zeros(batch_size, self.first.max_length, first.hidden_size + second.hidden_size)
        pooled = like.new_zeros(batch_size, second.projection_dim)
        ids = self._time_ids(batch_size, framing)
        return Conditioning(prompt_embeds=embeds, pooled_prompt_embeds=pooled, time_ids=ids)

    def _time_ids(self, batch_size: int, framing: Framing | None) -> Tensor:
        framing = framing or Framing.whole(batch_size, self.size)
        return framing.time_ids().to(next(self.second.parameters()).device)


class T5Conditioner(nn.Module):
    """T5 for the sequence and CLIP for the pooled embedding, as in FLUX; no prompt is the empty one, encoded.

    With more than one CLIP, as in SD3, their sequences come first, side by side and padded to T5's width, and the
    pooled embeddings are side by side. Then the encoders are `CLIPTextModelWithProjection`, else `CLIPTextModel`.
    """

    def __init__(self, clips: Sequence[TextSide], t5: TextSide) -> None:
        super().__init__()
        self.clips, self.t5 = nn.ModuleList(clips), t5
        # of the sequence's first tokens: words are looked up there
        self.tokenizer = clips[0].tokenizer if len(clips) > 1 else t5.tokenizer
        for side in clips:
            side.reports_cuts = False  # T5 reads on

    fingerprint = CLIPConditioner.fingerprint

    @property
    def sides(self) -> list[TextSide]:
        """Its encoders, as diffusers numbers them."""
        return [*self.clips, self.t5]

    def forward(self, prompts: Sequence[str], framing: Framing | None = None) -> Conditioning:
        """Encode B prompts to prompt_embeds (B, L, D) and pooled ones (B, P); the framing is not for such a network."""
        sequence = self.t5.encode(prompts)[0]
        if len(self.clips) == 1:
            return Conditioning(
                prompt_embeds=sequence, pooled_prompt_embeds=self.clips[0].encode(prompts).pooler_output
            )
        encoded = [side.encode(prompts, output_hidden_states=True) for side in self.clips]
        joined = torch.cat([one.hidden_states[-2] for one in encoded], dim=-1)
        padded = nn.functional.pad(joined, (0, sequence.shape[-1] - joined.shape[-1]))
        return Conditioning(
            prompt_embeds=torch.cat([padded, sequence], dim=1),
            pooled_prompt_embeds=torch.cat([one.text_embeds for one in encoded], dim=-1),
        )

    unconditional = CLIPConditioner.unconditional


Conditioner = CLIPConditioner | DualCLIPConditioner | T5Conditioner
"""Prompts to `Conditioning`; the text side of a family."""
