"""What a pair must be like to be kept: each stage measures one number of it, which must lie in a range."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from icd_lightning.data.decoding import Sample


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Keeps pairs whose value lies between `least` and `most`, both included; None sets no limit.

    `reason` names what is dropped, in counts and on the report. A stage of your own is a frozen dataclass as well, for
    its fields say whether two runs are the same; raise its `version` when it computes something else.
    """

    least: float | None = None
    most: float | None = None
    reason: str = ""
    default_reason: ClassVar[str] = ""
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        name, limits = type(self).__name__, [limit for limit in (self.least, self.most) if limit is not None]
        if not all(math.isfinite(limit) for limit in limits) or limits != sorted(limits):
            raise ValueError(f"{name}: least {self.least}, most {self.most} must be finite, and least not above most")
        if not limits:
            raise ValueError(f"{name} drops nothing: give least, most or both")
        if not self.name.isidentifier():
            raise ValueError(f"{name}: reason {self.name!r} must consist of letters, digits and _")

    @property
    def name(self) -> str:
        return self.reason or self.default_reason

    def values(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        """One number a sample, whose `picture` is an RGB image; None or NaN for one that has none: it is dropped."""
        raise NotImplementedError

    def keeps(self, value: float) -> bool:
        least, most = -math.inf if self.least is None else self.least, math.inf if self.most is None else self.most
        return least <= value <= most  # NaN is not

    def settings(self) -> dict[str, Any]:
        own = {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "version": self.version}
        return own | {"init_args": asdict(self)}


@dataclass(frozen=True, kw_only=True)
class ShortSide(Stage):
    """Pixels of the short side."""

    default_reason: ClassVar[str] = "short_side"

    def values(self, samples: Sequence[Sample]) -> Sequence[float]:
        return [min(sample.size) for sample in samples]


@dataclass(frozen=True, kw_only=True)
class AspectRatio(Stage):
    """Long side over short side."""

    default_reason: ClassVar[str] = "aspect_ratio"

    def values(self, samples: Sequence[Sample]) -> Sequence[float]:
        return [max(sample.size) / min(sample.size) for sample in samples]


@dataclass(frozen=True, kw_only=True)
class Field(Stage):
    """A number of the json file: CLIP's similarity, an aesthetic score, the probability of a watermark ...

    `fields` are its names in several sets; the first that is there counts. `words` says for which number a text
    stands, such as LAION's NSFW: {UNLIKELY: 0, UNSURE: 0.5, NSFW: 1}. Dropped is what lacks it, unless `missing` says
    its number.
    """

    fields: tuple[str, ...] = ()
    words: Mapping[str, float] = field(default_factory=dict)
    missing: float | None = None

    def __post_init__(self) -> None:
        if not self.fields:
            raise ValueError("Field reads nothing: give fields, e.g. [similarity]")
        super().__post_init__()

    @property
    def name(self) -> str:
        return self.reason or self.fields[0].lower()

    def values(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        return [self._number(sample.metadata) for sample in samples]

    def _number(self, metadata: Mapping[str, Any]) -> float | None:
        found = next((metadata[name] for name in self.fields if metadata.get(name) is not None), self.missing)
        try:
            return self.words[found] if isinstance(found, str) and found in self.words else float(found)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            return None


@dataclass(frozen=True, kw_only=True)
class CaptionWords(Stage):
    """Words of the caption, by spaces."""

    default_reason: ClassVar[str] = "caption_words"

    def values(self, samples: Sequence[Sample]) -> Sequence[float]:
        return [len(sample.caption.split()) for sample in samples]


@dataclass(frozen=True, kw_only=True)
class LatinLetters(Stage):
    """Share of a caption's characters that are unaccented Latin letters or spaces.

    A heuristic of language for encoders that know English alone: other scripts, file names and codes score low.
    """

    default_reason: ClassVar[str] = "latin_letters"

    def values(self, samples: Sequence[Sample]) -> Sequence[float]:
        captions = [sample.caption for sample in samples]
        return [sum(c.isascii() and (c.isalpha() or c.isspace()) for c in text) / len(text) for text in captions]


@dataclass(frozen=True, kw_only=True)
class RepeatedWord(Stage):
    """Share of a caption's words that are its most frequent one: lists of keywords repeat themselves."""

    default_reason: ClassVar[str] = "repeated_word"

    def values(self, samples: Sequence[Sample]) -> Sequence[float]:
        words = [sample.caption.lower().split() for sample in samples]
        return [max(Counter(of_one).values()) / len(of_one) for of_one in words]
