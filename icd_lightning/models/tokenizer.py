"""A byte-pair tokenizer made of words: for families whose vocabulary is known, and for random ones."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

END_OF_WORD = "</w>"


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
