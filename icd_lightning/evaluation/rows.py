"""One row a picture, gathered batch by batch: a killed run goes on, several ranks share the batches.

The list of examples is cut into batches once and for all; rank r of n takes every n-th batch from the r-th on, and what
a batch gave is a small Parquet file of its own, there or not there. So a run that was killed and started again, or
shared among ranks, puts together the very rows of an unbroken one.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch

from icd_lightning.evaluation.examples import Example
from icd_lightning.files import write_whole
from icd_lightning.progress import progress

log = logging.getLogger(__name__)

Row = dict[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """As torchrun says; alone without it."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def wait(self) -> None:
        """Until all ranks have come here."""
        if self.world_size == 1:
            return
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        torch.distributed.barrier()


ALONE = Ranks()


def batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Cut into runs of `size`; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass(frozen=True)
class Gathering:
    """Of which examples rows are gathered, in batches of how many, by which ranks."""

    examples: Sequence[Example]
    batch_size: int
    ranks: Ranks = ALONE

    def rows(
        self,
        folder: Path,
        measure: Callable[[Sequence[Example]], list[Row]],
        *,
        label: str = "",
        version: str = "",
        is_whole: Callable[[pd.DataFrame, Sequence[Example]], bool] = lambda rows, batch: True,
    ) -> pd.DataFrame:
        """The rows that `measure` gives for all examples, in their order; what is in `folder` already is read back.

        Rows of another version are measured again, and so are those that are not whole any more. The progress bar has
        the label.
        """
        parts = {}
        for index, batch in enumerate(batches(self.examples, self.batch_size)):
            text = "\n".join((version, *(example.identity for example in batch)))  # other examples make other files
            parts[folder / f"{index:06d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.parquet"] = batch
        share = list(parts.items())[self.ranks.rank :: self.ranks.world_size]
        missing = [
            (file, part) for file, part in share if not (file.is_file() and is_whole(pd.read_parquet(file), part))
        ]
        if len(missing) < len(share):
            log.info("%s: %d of %d batches were measured before", folder, len(share) - len(missing), len(share))
        for file, batch in progress(missing, label, len(missing)):
            write_whole(file, pd.DataFrame(measure(batch)).to_parquet)
        self.ranks.wait()
        return pd.concat(map(pd.read_parquet, parts), ignore_index=True)
