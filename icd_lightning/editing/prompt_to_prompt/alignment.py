"""Which token of the source prompt answers for which of the target's: words are cut at spaces, tokens by the tokenizer.

An alignment is a matrix `mapper` (L, L), source token by target token, and `aligned` (L,), 1 for target tokens that
have a source and 0 for new ones. The target's attention (..., L) comes from the source's by

    aligned * (attention_source @ mapper) + (1 - aligned) * attention_target

Prompt-to-Prompt's two ways (arXiv:2208.01626) differ in nothing else: *replace* pairs the words of two prompts by their
number, *refine* the tokens by the longest common subsequence. L tokens, as many as the text encoder takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import punctuation
from typing import Any

import torch
from torch import Tensor

from icd_lightning.editing.limits import AlignmentKind

ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as its encoder sees it: token ids, special ones included, and the places among them of each word."""

    prompt: str
    ids: tuple[int, ...]
    words: tuple[str, ...]
    places: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, prompt: str, tokenizer: Any) -> PromptTokens:
        """Tokenize; ValueError for a prompt that the encoder would see only a part of."""
        encoded = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        length = tokenizer.model_max_length
        if len(ids) > length:
            cut = prompt[spans[length - 1][0] :]
            raise ValueError(
                f"prompt {prompt!r} is longer than the {length} tokens that the text encoder takes, so that {cut!r} "
                "would be cut and cannot be aligned: shorten it"
            )
        words = list(re.finditer(r"\S+", prompt))
        # special tokens have empty spans, and so belong to no word
        places = [
            tuple(i for i, (start, end) in enumerate(spans) if start < end and word.start() <= start < word.end())
            for word in words
        ]
        return cls(prompt, tuple(ids), tuple(word.group() for word in words), tuple(places))

    def places_of(self, words: str) -> list[int]:
        """Places of the tokens of words, separated by spaces, wherever they occur; ValueError for one that does not.

        Case and punctuation around words do not matter.
        """
        places: list[int] = []
        for wanted in words.split():
            here = [i for i, word in enumerate(self.words) if _bare(word) == _bare(wanted)]
            if not here:
                raise ValueError(f"{wanted!r} is no word of the prompt {self.prompt!r}: name one of its words")
            places += [place for i in here for place in self.places[i]]
        return places


@dataclass(frozen=True, eq=False)
class TokenAlignment:
    """mapper (L, L), source token by target token, and aligned (L,): 1 where a target token has a source, else 0."""

    mapper: Tensor
    aligned: Tensor


def align(source: PromptTokens, target: PromptTokens, length: int, kind: AlignmentKind = "auto") -> TokenAlignment:
    """The alignment of two prompts of `length` tokens, padding included; ValueError if there is none of this kind."""
    same_count = len(source.words) == len(target.words)
    if kind == "replace" and not same_count:
        raise ValueError(
            f"{source.prompt!r} has {len(source.words)} words and {target.prompt!r} {len(target.words)}: words can be "
            "replaced one by one only; write as many, or choose the alignment refine (or auto)"
        )
    by_word = same_count and kind != "refine"
    return replacement(source, target, length) if by_word else refinement(source, target, length)


def replacement(source: PromptTokens, target: PromptTokens, length: int) -> TokenAlignment:
    """Word i of the target looks where word i of the source does, token by token where both have as many tokens.

    Otherwise each of a word's n tokens gets 1/n of the attention of all tokens of the word it replaces.
    """
    mapper = torch.zeros(length, length)
    source_start = target_start = 0  # the first tokens that are not paired yet
    words = zip(source.words, target.words, source.places, target.places, strict=True)
    for old, new in [(old, new) for word, other, old, new in words if word != other and old and new]:
        mapper[source_start : old[0], target_start : new[0]].diagonal().fill_(1)
        pairs = mapper[old[0] : old[-1] + 1, new[0] : new[-1] + 1]
        if len(old) == len(new):
            pairs.diagonal().fill_(1)
        else:
            pairs.fill_(1 / len(new))
        source_start, target_start = old[-1] + 1, new[-1] + 1
    # As published: what follows the last new word is paired by its place in the prompt, also where words of several
    # tokens have shifted it. Released results, and the golden tensors, depend on it.
    mapper.diagonal()[target_start:] = 1
    return TokenAlignment(mapper, torch.ones(length))


def refinement(source: PromptTokens, target: PromptTokens, length: int) -> TokenAlignment:
    """Tokens that both prompts have, in one order, look where the source's do; the target's other tokens are new."""
    matches = common_subsequence(source.ids, target.ids)
    mapper, aligned = torch.zeros(length, length), torch.ones(length)
    for place, match in enumerate(matches):
        if match is None:
            aligned[place] = 0
        else:
            mapper[match, place] = 1
    mapper.diagonal()[len(matches) :] = 1
    return TokenAlignment(mapper, aligned)


@cache
def stop_words() -> frozenset[str]:
    """English words that say little: the list of the Natural Language Toolkit."""
    return frozenset(Path(__file__).with_name("stop_words.txt").read_text(encoding="utf-8").split())


def changed_words(source: PromptTokens, target: PromptTokens) -> tuple[list[int], list[int]]:
    """Places of the source's words that the target lacks, and of the target's that are new; articles are no news."""
    matches = common_subsequence(source.words, target.words)
    gone = set(range(len(source.words))) - set(matches)
    new = [i for i, match in enumerate(matches) if match is None]
    return _places(source, sorted(gone)), _places(target, new)


def common_subsequence(source: Sequence, target: Sequence) -> list[int | None]:
    """For each element of target its partner in the longest common subsequence with source, or None.

    It is the global alignment with match 1, mismatch -1 and gap 0, where a mismatch never pays.
    """
    score = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i, a in enumerate(source):
        for j, b in enumerate(target):
            score[i + 1][j + 1] = score[i][j] + 1 if a == b else max(score[i][j + 1], score[i + 1][j])
    matches: list[int | None] = [None] * len(target)
    i, j = len(source), len(target)
    while i and j:  # of equal alignments, the one that pairs the earliest elements of target
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            matches[j] = i
    return matches


@dataclass(frozen=True)
class Pair:
    """One edit: its two prompts in tokens, and its settings. L tokens, as many as the text encoder takes."""

    source: PromptTokens
    target: PromptTokens
    settings: Any

    def lent(self, length: int) -> tuple[Tensor, Tensor]:
        """What replaced attention takes of the source's (L, L) and of the target's own (L,)."""
        found, factors = align(self.source, self.target, length, self.settings.alignment), self.factors(length)
        return found.mapper * (found.aligned * factors), (1 - found.aligned) * factors

    def factors(self, length: int) -> Tensor:
        """The factor (L,) of the attention to each of the target's tokens."""
        amplify, factors = self.settings.amplify, torch.ones(length)
        if isinstance(amplify, Mapping):
            for words, factor in amplify.items():
                factors[self.target.places_of(words)] = factor
        elif self.settings.amplified == "blended":
            factors[self.blend_words(length)[1].bool()] = amplify
        else:  # as the reference's script chooses: words that the source lacks by exact spelling, but for stop words
            common = stop_words().union(self.source.words)
            absent = [i for i, word in enumerate(self.target.words) if word not in common]
            factors[[place for i in absent for place in self.target.places[i]]] = amplify
        return factors

    def blend_words(self, length: int) -> Tensor:
        """The tokens (2, L) of source and target that the local blend looks at, 1 or 0; none for no blend."""
        blend, words = self.settings.blend, torch.zeros(2, length)
        if isinstance(blend, bool):
            gone, new = changed_words(self.source, self.target)
            places = (gone, new) if blend and gone else ([], [])
        else:
            places = self.source.places_of(blend[0]), self.target.places_of(blend[1])
        for row, chosen in zip(words, places, strict=True):
            row[chosen] = 1
        return words


def _places(tokens: PromptTokens, words: Sequence[int]) -> list[int]:
    return [place for i in words if _bare(tokens.words[i]) not in ARTICLES for place in tokens.places[i]]


def _bare(word: str) -> str:
    return word.strip(punctuation).casefold() or word
