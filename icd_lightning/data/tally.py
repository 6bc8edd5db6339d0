"""Counts what passes and what is skipped, and ends a run that loses too much: no silent starvation."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)
S, T = TypeVar("S"), TypeVar("T")

REASONS = (
    "no_image",
    "no_caption",
    "bad_caption",
    "too_small",
    "too_narrow",
    "too_large",
    "corrupt_image",
    "corrupt_json",
    "corrupt_latents",
    "wrong_resolution",
    "broken_shard",
)


class RejectedError(Exception):
    """A sample cannot be used; `reason` is one of REASONS, `remedy` what helps where all samples are like it."""

    def __init__(self, reason: str, detail: str, remedy: str = "") -> None:
        assert reason in REASONS
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail
        self.remedy = remedy or "look at local shards with `icd data describe`"


class NothingToReadError(ValueError):
    """So much was skipped that training would wait forever, or would not be on what the user believes."""


MIN_READ = 1000
COLUMNS = ("passed", *REASONS, "read", "lost", "shards")


class Tally:
    """Counts samples that passed and those that were skipped, by reason, over all workers (in shared memory).

    Ends a run, by NothingToReadError, that loses more than the share `max_skipped` of all samples read or of the latest
    (MIN_READ of them at least), or that waits `stall_timeout` seconds for a sample that can be used. `details` has the
    first sample skipped for each reason; a `quiet` one leaves it to others to tell of it.
    """

    def __init__(
        self,
        num_workers: int = 1,
        *,
        max_skipped: float = 1.0,
        stall_timeout: float = math.inf,
        quiet: bool = False,
    ) -> None:
        if not 0 <= max_skipped <= 1:
            raise ValueError(f"max_skipped {max_skipped} must lie between 0 and 1 (1 allows any loss)")
        if not stall_timeout > 0:
            raise ValueError(f"stall_timeout {stall_timeout} must be more than 0 seconds (.inf waits for ever)")
        self.max_skipped, self.stall_timeout, self.worker = max_skipped, stall_timeout, 0
        # each worker has a row of its own, which it says in its copy: no two write to one place
        self._counts = torch.zeros(max(1, num_workers), len(COLUMNS), dtype=torch.int64).share_memory_()
        self._alive = torch.full((max(1, num_workers),), time.monotonic(), dtype=torch.float64).share_memory_()
        self.details: dict[str, str] = {}
        self.quiet = quiet
        self._looked_at = (0, 0)  # how many were read and lost at the beginning of the latest

    def awaited(self) -> None:
        """Begin to wait for samples: silence counts from now."""
        self._alive.numpy()[self.worker] = time.monotonic()

    def silence(self) -> float:
        """For how many seconds no worker has found a sample that can be used."""
        return time.monotonic() - self._alive.max().item()

    def add(self, column: str, count: int = 1) -> None:
        """Count up one of COLUMNS: a shard opened, a sample read (whatever becomes of it), one passed into a batch."""
        self._counts.numpy()[self.worker, COLUMNS.index(column)] += count  # the same memory, at a tenth of the time

    def usable(self, decode: Callable[[S], T], samples: Iterable[S]) -> Iterator[T]:
        """Yield what `decode` makes of samples; those that it rejects are left out and counted."""
        for sample in samples:
            try:
                decoded = decode(sample)
            except RejectedError as error:
                self.skipped(error.reason, error.detail)
            else:
                self.awaited()
                yield decoded

    def skipped(self, reason: str, detail: str, samples: int = 1) -> None:
        """Count what was left out, a sample or a shard of so many; NothingToReadError if that is too much."""
        self.add(reason, 1 if reason == "broken_shard" else samples)
        self.add("lost", samples)
        if reason not in self.details:
            self.details[reason] = detail
            if not self.quiet:
                logger.warning("skipped for %s: %s (from now on only counted)", reason, detail)
        total = self._sum("read"), self._sum("lost")
        recent = total[0] - self._looked_at[0], total[1] - self._looked_at[1]
        for read, lost in (total, recent):
            if read >= MIN_READ and lost > self.max_skipped * read:
                allowed = f"max_skipped {self.max_skipped:g} allows"
                raise self.nothing(f"{lost} of {read} samples could not be used, more than {allowed}")
        if recent[0] >= MIN_READ:
            self._looked_at = total
        if time.monotonic() - self._alive[self.worker].item() > self.stall_timeout:
            raise self.nothing(f"no sample that can be used was found for {self.stall_timeout:g} s")

    def broke(self, detail: str) -> None:
        """Count a shard that cannot be read to its end, and as lost as many samples as others have on average."""
        others = self._sum("shards") - 1
        missing = self._sum("read") // others if others > 0 else 1
        self.add("read", missing)
        self.skipped("broken_shard", detail, missing)

    def counts(self) -> dict[str, int]:
        """How many samples "passed", and how many were skipped for each of REASONS (shards, for "broken_shard")."""
        return {name: self._sum(name) for name in ("passed", *REASONS)}

    def nothing(self, what: str) -> NothingToReadError:
        """An error that says `what` is wrong and why samples were skipped."""
        skipped = left_out(self.counts()) or "none"
        if self.details:
            skipped += f"; for one, {next(iter(self.details.values()))}"
        return NothingToReadError(f"{what} (skipped: {skipped}); look at local shards with `icd data describe`")

    def _sum(self, name: str) -> int:
        return int(self._counts[:, COLUMNS.index(name)].sum())


def left_out(counts: Mapping[str, int]) -> str:
    """What was skipped of `counts`, as text: "no_caption 1, too_small 3"; empty if nothing was."""
    return ", ".join(f"{reason} {counts[reason]}" for reason in REASONS if counts[reason])
