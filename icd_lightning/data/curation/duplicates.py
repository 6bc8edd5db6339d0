"""Which pictures are there twice, or are a benchmark's: by a perceptual hash, an index of hashes, and a closer look."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, count, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BITS, SIDE = 64, 8
LOOK = SIDE * SIDE * 3
COSINES = np.cos(math.pi / 32 * (np.arange(32) + 0.5) * np.arange(SIDE)[:, None])  # of the discrete cosine transform
REASONS = ("", "duplicate", "near_duplicate", "leaked")
KEPT, DUPLICATE, NEAR, LEAKED = range(4)


class Prints(NamedTuple):
    """Of N pictures: `digest` uint64 (N,) of their files, `hash` uint64 (N,), `look` uint8 (N, 8 * 8 * 3)."""

    digest: NDArray[np.uint64]
    hash: NDArray[np.uint64]
    look: NDArray[np.uint8]

    @classmethod
    def of(cls, data: bytes, image: Image.Image) -> Prints:
        """Of one picture, (1, ...): its file and what it shows, RGB."""
        digest = np.frombuffer(hashlib.blake2b(data, digest_size=8).digest(), np.uint64)
        look = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)).reshape(1, -1)
        return cls(digest, perceptual_hash(image)[None], look)

    @classmethod
    def none(cls, number: int = 1) -> Prints:
        """In the place of those of pictures that are dropped already."""
        return cls(np.zeros(number, np.uint64), np.zeros(number, np.uint64), np.zeros((number, LOOK), np.uint8))

    @classmethod
    def join(cls, parts: Iterable[Prints]) -> Prints:
        return cls(*map(np.concatenate, zip(cls.none(0), *parts, strict=True)))

    def take(self, rows: NDArray) -> Prints:
        return Prints(*(array[rows] for array in self))


@dataclass(frozen=True)
class Duplicates:
    """What is the same picture: hashes that differ in `radius` bits at most, and no place that differs by more.

    After the brightness of one is brought to the other's, the pictures at 8 x 8 pixels may differ by `difference` of
    255 levels anywhere. `among` drops what is in the set twice, the smaller or else the later one; `benchmarks` name
    folders of pictures that the set must not hold.
    """

    radius: int = 8
    difference: float = 16.0
    among: bool = True
    benchmarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.radius <= 16:
            raise ValueError(f"radius {self.radius} must lie between 0 and 16 of the hash's {BITS} bits")
        if not 0 <= self.difference <= 255:
            raise ValueError(f"difference {self.difference} must lie between 0 and 255 levels")

    def verdicts(self, prints: Prints, benchmark: int) -> NDArray[np.int8]:
        """For pictures in the order of who is kept, the first `benchmark` of them a benchmark's: KEPT, DUPLICATE ...

        int8 (N,). A picture is dropped if it is that of a benchmark, or one that is kept and comes before it.
        """
        verdicts = np.zeros(len(prints.hash), np.int8)
        _, first, group = np.unique(prints.digest, return_index=True, return_inverse=True)
        copies = np.flatnonzero(first[group] < np.arange(len(group)))
        verdicts[copies] = np.where(first[group[copies]] < benchmark, LEAKED, DUPLICATE if self.among else KEPT)
        verdicts[:benchmark] = KEPT
        rest = np.flatnonzero(verdicts == KEPT)
        kept: defaultdict[int, list[int]] = defaultdict(list)  # by hash, which are to be held against others
        for row, near in self._candidates(prints.hash[rest]):
            row = int(rest[row])
            if row >= benchmark and (others := [other for hash_ in near for other in kept[hash_]]):
                alike = np.array(others)[differences(prints.look[row], prints.look[others]) <= self.difference]
                if len(alike):
                    verdicts[row] = LEAKED if alike.min() < benchmark else NEAR
                    continue
            if row < benchmark or self.among:
                kept[near[0]].append(row)
        return verdicts

    def _candidates(self, hashes: NDArray[np.uint64]) -> Iterator[tuple[int, list[int]]]:
        """Rows whose hash others are near to, in order: the number of that hash, and of those near to it."""
        unique, group, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        near = {number: [number] for number in np.flatnonzero(counts > 1).tolist()}
        for one, other in near_pairs(unique, self.radius).tolist():
            near.setdefault(one, [one]).append(other)
            near.setdefault(other, [other]).append(one)
        return ((row, near[number]) for row, number in enumerate(group.tolist()) if number in near)


def perceptual_hash(image: Image.Image) -> np.uint64:
    """64 bits: which of the 8 x 8 lowest frequencies of the grey picture at 32 x 32 are above their median.

    As `imagehash.phash` computes it.
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    frequencies = (COSINES @ grey @ COSINES.T).round(6)  # a flat picture has but one, and no noise in the others
    return np.packbits(frequencies > np.median(frequencies)).view(">u8")[0].astype(np.uint64)


def near_pairs(hashes: NDArray[np.uint64], radius: int) -> NDArray[np.int64]:
    """All pairs i < j of hashes (N,) that differ in `radius` bits at most, (P, 2), in order.

    The bits are cut into radius + chosen blocks. Two such hashes agree in at least `chosen` of the blocks, so they are
    neighbours in one of the tables sorted by a choice of that many (Manku et al., Detecting near-duplicates for web
    crawling, WWW 2007, section 3).
    """
    chosen = min(range(1, 9), key=lambda chosen: _cost(len(hashes), radius, chosen))
    edges = np.linspace(0, BITS, radius + chosen + 1).astype(int).tolist()
    blocks = [sum(1 << bit for bit in range(*ends)) for ends in pairwise(edges)]
    found = [np.empty((0, 2), np.int64)]
    for table in combinations(blocks, chosen):
        found += _in_table(hashes, np.uint64(sum(table)), radius)
    return np.unique(np.concatenate(found), axis=0)


def _cost(number: int, radius: int, chosen: int) -> float:
    """Comparisons in all tables: sorting costs as much as some 30 a hash, then come those that agree by chance."""
    agreeing = number**2 / 2 ** (1 + BITS * chosen / (radius + chosen))
    return math.comb(radius + chosen, chosen) * (30 * number + agreeing)


def _in_table(hashes: NDArray[np.uint64], mask: np.uint64, radius: int) -> Iterator[NDArray[np.int64]]:
    """Pairs (P, 2) that agree in the bits of `mask` and are near."""
    order = np.argsort(hashes & mask, kind="stable")
    keys = (hashes & mask)[order]
    left = np.arange(len(keys))
    for shift in count(1):
        left = left[left + shift < len(keys)]
        left = left[keys[left] == keys[left + shift]]  # a group of m is left m - 1 times, so all work is on pairs
        if not len(left):
            return
        pairs = np.stack([order[left], order[left + shift]], 1)
        near = np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]) <= radius
        yield np.sort(pairs[near], 1)


def differences(look: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Largest difference of a picture (D,) and each of others (N, D), (N,), one made as bright as the other."""
    a, b = look + 1e-9, others + 1e-9
    product = b @ a
    to_others = np.abs(np.minimum(np.outer(product / (a @ a), a), 255) - b).max(1)
    to_look = np.abs(np.minimum((product / np.square(b).sum(1))[:, None] * b, 255) - a).max(1)
    return np.minimum(to_others, to_look)
