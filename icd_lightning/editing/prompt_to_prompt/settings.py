"""How much a Prompt-to-Prompt edit borrows, and what that means for two prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from icd_lightning.editing.limits import check_factor, check_fraction
from icd_lightning.editing.prompt_to_prompt.alignment import AlignmentKind, PromptTokens, absent_words, changed_words

BlendedWords = tuple[str, str] | Literal[False] | None
"""By which words of source and target an edit blends; False: by none; None: nobody says."""

Amplified = Literal["absent", "blended"]
"""Which of the target's words one factor is for: those that the source lacks, or those that the blend looks at."""


@dataclass(frozen=True)
class PromptToPrompt:
    """How much an edit borrows. The defaults are the paper's for four steps (arXiv:2406.14539).

    Args:
        cross_replace: Fraction of the steps whose cross-attention is the source's: more keeps more of the layout.
        self_replace: Fraction of the steps whose self-attention is the source's: more keeps more of the shapes.
        alignment: Pair words one by one (replace) or tokens by the longest common subsequence (refine); auto replaces
            where both prompts have as many words.
        amplify: Factor of the attention to the target's words that are `amplified` while cross-attention is replaced,
            or factors of named words of the target, e.g. {"lego": 3}; 1 leaves it alone.
        amplified: Words that do not occur in the source, but for stop words, as in the paper's script (absent); or the
            target's word that the blend looks at, as in PIE-Bench's, and none where nothing is blended (blended).
        blend: Keep the source outside of where either prompt's changed words are attended to. By default where words
            were replaced or left out; words that were only added may be a style, which is everywhere. Or the words to
            look at, of source and target, e.g. ("bird", "lego"); False blends nothing.
        blend_threshold: Attended to is what has more than this fraction of the strongest attention.
        blend_from: Fraction of the steps after which blending begins.
    """

    cross_replace: float = 0.3
    self_replace: float = 0.6
    alignment: AlignmentKind = "auto"
    amplify: float | Mapping[str, float] = 4.0
    amplified: Amplified = "absent"
    blend: bool | tuple[str, str] = True
    blend_threshold: float = 0.3
    blend_from: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cross_replace", "self_replace", "blend_threshold", "blend_from"):
            check_fraction(getattr(self, name), name)
        for name, kinds in (("alignment", AlignmentKind), ("amplified", Amplified)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} {getattr(self, name)!r} is none of: {', '.join(get_args(kinds))}")
        if not isinstance(self.blend, bool) and (isinstance(self.blend, str) or len(self.blend) != 2):
            raise ValueError(f"blend {self.blend!r} is neither True, False nor the words of source and target")
        factors = self.amplify.values() if isinstance(self.amplify, Mapping) else [self.amplify]
        for factor in factors:
            check_factor(factor)

    def changed(self, options: Mapping[str, Any]) -> PromptToPrompt:
        """The same with other settings; ValueError for one that does not exist."""
        known = [field.name for field in fields(self)]
        if unknown := options.keys() - set(known):
            raise ValueError(f"edits have no {', '.join(sorted(unknown))}; what they borrow: {', '.join(known)}")
        return replace(self, **options)

    def blending(self, words: BlendedWords) -> PromptToPrompt:
        """With a local blend by these words, unless it has none: they say where to blend, not whether."""
        return self if words is None or self.blend is False else replace(self, blend=words)


@dataclass(frozen=True)
class Pair:
    """One edit: its two prompts in tokens, and its settings. L tokens, as many as the text encoder takes."""

    source: PromptTokens
    target: PromptTokens
    settings: PromptToPrompt

    def factors(self, length: int) -> Tensor:
        """The factor (L,) of the attention to each of the target's tokens."""
        amplify, factors = self.settings.amplify, torch.ones(length)
        if isinstance(amplify, Mapping):
            for words, factor in amplify.items():
                factors[self.target.places_of(words)] = factor
        elif self.settings.amplified == "blended":
            factors[self.blend_words(length)[1].bool()] = amplify
        else:
            factors[absent_words(self.source, self.target)] = amplify
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
