"""The tiny family's tokenizer: a real CLIP tokenizer whose vocabulary is that of the picture world."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

END_OF_WORD = "</w>"


def build_tokenizer(words: Iterable[str], max_length: int) -> CLIPTokenizer:
    """A byte-pair tokenizer in which each of `words` is one token; any other word falls apart into shorter pieces."""
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
    while pairs := [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in merges]:
        best = min(pairs, key=merges.__getitem__)
        at = list(zip(pieces, pieces[1:], strict=False)).index(best)
        pieces[at : at + 2] = ["".join(best)]
    return pieces
