"""What settings of an edit may be. The standard library only: commands refuse a bad value before torch is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args

Settings = TypeVar("Settings", bound="Control")
SHORT_NAMES = {"cross": "cross_replace", "self": "self_replace"}
"""What commands also call these settings of `PromptToPrompt`."""


def check_guidance_scale(value: float, name: str = "guidance_scale") -> float:
    """w: 1 is unguided, and less was never trained."""
    if not 1 <= value < math.inf:
        raise ValueError(f"{name} {value} must be 1 (unguided) or more, and finite")
    return value


def check_fraction(value: float, name: str) -> float:
    """A share of the time axis, or of the steps."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value} is no fraction: choose between 0 and 1")
    return value


def check_seed(value: int) -> int:
    """What a generator of torch's can be seeded with."""
    if not 0 <= value < 2**63:
        raise ValueError(f"seed {value} must be 0 or more, and less than 2^63")
    return value


AlignmentKind = Literal["auto", "replace", "refine"]
"""How prompts are aligned; auto replaces where both have as many words, and refines otherwise."""

BlendedWords = tuple[str, str] | Literal[False] | None
"""By which words of source and target an edit blends; False: by none; None: nobody says."""

Amplified = Literal["absent", "blended"]
"""Which of the target's words one factor is for: those that the source lacks, or those that the blend looks at."""


class Control:
    """What an edit borrows of its source's attention: the settings of a frozen dataclass, with a local blend."""

    blend: bool | tuple[str, str]

    def changed(self: Settings, options: Mapping[str, Any]) -> Settings:
        """The same with other settings; ValueError for one that does not exist."""
        known = [field.name for field in fields(self)]
        if unknown := options.keys() - set(known):
            raise ValueError(f"edits have no {', '.join(sorted(unknown))}; what they borrow: {', '.join(known)}")
        return replace(self, **options)

    def blending(self: Settings, words: BlendedWords) -> Settings:
        """With a local blend by these words, unless it has none: they say where to blend, not whether."""
        return self if words is None or self.blend is False else replace(self, blend=words)

    def _check(self, *fractions: str) -> None:
        for name in fractions:
            check_fraction(getattr(self, name), name)
        if not isinstance(self.blend, bool) and (isinstance(self.blend, str) or len(self.blend) != 2):
            raise ValueError(f"blend {self.blend!r} is neither True, False nor the words of source and target")


@dataclass(frozen=True)
class PromptToPrompt(Control):
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
        self._check("cross_replace", "self_replace", "blend_threshold", "blend_from")
        for name, kinds in (("alignment", AlignmentKind), ("amplified", Amplified)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} {getattr(self, name)!r} is none of: {', '.join(get_args(kinds))}")
        factors = self.amplify.values() if isinstance(self.amplify, Mapping) else [self.amplify]
        for factor in factors:
            if not 0 <= factor < math.inf:
                raise ValueError(f"amplify {factor} must be 0 or more: 1 leaves attention alone, 0 takes it away")


@dataclass(frozen=True)
class Injection(Control):
    """How much an edit by a transformer borrows, whose attention is joint, of text and picture at once.

    Args:
        inject: Fraction of the steps in which values are the source's: more keeps more of the picture.
        blocks_from, blocks_to: Between which fractions of the network's depth, from its first block to its last.
        keys: With the values their keys, so that the target attends to the source's picture; else values alone.
        text: The prompt's tokens too; else the picture's alone.
        blend, blend_threshold, blend_from: As of `PromptToPrompt`, by the picture's attention to the words' tokens.
    """

    inject: float = 0.5
    blocks_from: float = 0.0
    blocks_to: float = 1.0
    keys: bool = True
    text: bool = False
    blend: bool | tuple[str, str] = True
    blend_threshold: float = 0.3
    blend_from: float = 0.0

    def __post_init__(self) -> None:
        self._check("inject", "blocks_from", "blocks_to", "blend_threshold", "blend_from")
        if not self.blocks_from < self.blocks_to:
            raise ValueError(f"blocks_from {self.blocks_from} must be less than blocks_to {self.blocks_to}")


def for_each(
    settings: Settings | Sequence[Settings],
    count: int,
    options: Mapping[str, Any],
    blended_words: Sequence[BlendedWords] | None,
) -> list[Settings]:
    """Settings of each of `count` edits: for all or for each, with options in their place, blended by these words."""
    each = [settings] * count if isinstance(settings, Control) else settings
    return [
        one.changed(options).blending(words) for one, words in zip(each, blended_words or [None] * count, strict=True)
    ]


def read_blend(text: str) -> tuple[str, ...] | Literal[False]:
    """Two words, "cat dog", or none; ValueError for anything else."""
    words = tuple(text.split())
    if text != "none" and len(words) != 2:
        raise ValueError(f"blend {text!r} must be a word of the source and one of the target, or none")
    return words if text != "none" else False


def read_factors(text: float | str) -> float | dict[str, float]:
    """A factor of attention, 4 or "4", or those of words, "lego=3 red=0"; ValueError for anything else."""
    try:
        if isinstance(text, float) or "=" not in text:
            return float(text)
        words = [pair.rpartition("=") for pair in text.split()]
        if all(word for word, _, _ in words):
            return {word: float(factor) for word, _, factor in words}
    except ValueError:
        pass
    raise ValueError(f"amplify {text!r} must be a number, or words with numbers, as in 'lego=3 red=0'")
