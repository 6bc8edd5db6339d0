"""Which samples make which batch, without end: a pure function of the seed, the number of the batch and the indexes."""

from __future__ import annotations

import random
from bisect import bisect
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Chapter(NamedTuple):
    """Some shards that follow each other in a pass, whose samples are shuffled among each other."""

    shards: NDArray[np.int64]
    start: NDArray[np.int64]  # samples of each form before it, from the beginning of training
    batches: int  # whole ones before it


class Content(NamedTuple):
    """The samples of a chapter as they come, the form of each, and the batches that are filled there.

    Those as (place in the chapter of its last sample, form, number among the batches of that form).
    """

    order: NDArray[np.int64]
    forms: NDArray
    endings: list[tuple[int, int, int]]


class Plan:
    """Batches of one form each, in which every sample comes once a pass.

    In a pass the shards are shuffled, and the samples of as many as hold `window` samples are shuffled among each other
    (0 keeps their order). So each form has a sequence of its own that goes on from pass to pass, and is cut into
    batches without a rest; batches come in the order in which they are filled. A form with fewer samples than a batch
    fills one in several passes.

    Args:
        forms: int (N,), the form of each sample: a number from 0 on for each (height, width).
        bounds: int (S + 1,), where the samples of each of S shards begin and the last ends.
    """

    def __init__(self, forms: NDArray, bounds: NDArray, *, batch_size: int, seed: int, window: int) -> None:
        self.forms, self.bounds, self.batch_size, self.seed, self.window = forms, bounds, batch_size, seed, window
        kinds = int(forms.max(initial=0)) + 1
        self.counts = np.stack([np.bincount(forms[start:stop], minlength=kinds) for start, stop in pairwise(bounds)])
        self.per_pass = self.counts.sum(0)
        self._pass, self._content = lru_cache(8)(self._cut), lru_cache(8)(self._fill)

    @property
    def samples(self) -> int:
        """How many come in a pass."""
        return len(self.forms)

    def batch(self, number: int) -> NDArray[np.int64]:
        """Places of its samples among all, (B,)."""
        one_pass = number * self.batch_size // self.samples  # or a later one, since batches are not whole at its start
        while self._filled((one_pass + 1) * self.per_pass) <= number:
            one_pass += 1
        chapters = self._pass(one_pass)
        place = bisect(chapters, number, key=lambda chapter: chapter.batches) - 1
        _, form, index = self._content(one_pass, place).endings[number - chapters[place].batches]
        return self._members(form, index * self.batch_size, (index + 1) * self.batch_size, one_pass, place)

    def _filled(self, samples: NDArray) -> int:
        return int((samples // self.batch_size).sum())

    def _cut(self, number: int) -> list[Chapter]:
        """The chapters of a pass."""
        order = list(range(len(self.counts)))
        random.Random(f"{self.seed} {number}").shuffle(order)
        ends = self.counts[order].sum(1).cumsum()
        before = np.concatenate([[0], ends[:-1]])
        cuts = np.flatnonzero(np.diff(before // max(1, self.window))) + 1
        start, chapters = number * self.per_pass, []
        for shards in np.split(np.array(order), cuts):
            chapters.append(Chapter(shards, start, self._filled(start)))
            start = start + self.counts[shards].sum(0)
        return chapters

    def _fill(self, one_pass: int, place: int) -> Content:
        """What is in a chapter."""
        shards, start, _ = self._pass(one_pass)[place]
        order = np.concatenate([np.arange(*self.bounds[shard : shard + 2]) for shard in shards])
        if self.window:
            seed = random.Random(f"{self.seed} {one_pass} {place}").getrandbits(64)
            order = np.random.default_rng(seed).permutation(order)
        forms, endings = self.forms[order], []
        for form in np.unique(forms).tolist():
            first, begun = divmod(int(start[form]), self.batch_size)
            ends = np.flatnonzero(forms == form)[self.batch_size - 1 - begun :: self.batch_size].tolist()
            endings += [(end, form, first + index) for index, end in enumerate(ends)]
        return Content(order, forms, sorted(endings))

    def _members(self, form: int, first: int, last: int, one_pass: int, place: int) -> NDArray[np.int64]:
        """Samples `first` to `last` of a form's sequence, of which the last lies in this chapter, and none later."""
        parts: list[NDArray] = []
        while first < last:
            start = int(self._pass(one_pass)[place].start[form])
            if start < last:
                content = self._content(one_pass, place)
                own = content.order[content.forms == form]
                parts.insert(0, own[max(first - start, 0) : last - start])
                last = max(start, first)
            if place == 0:
                one_pass, place = one_pass - 1, len(self._pass(one_pass - 1))
            place -= 1
        return np.concatenate(parts)
