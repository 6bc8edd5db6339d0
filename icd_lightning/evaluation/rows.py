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
    """How to gather rows: in batches, by these ranks; `label` is what the progress bar says."""

    batch_size: int
    ranks: Ranks = ALONE
    label: str = ""


def gather_rows(
    folder: Path,
    examples: Sequence[Example],
    measure: Callable[[Sequence[Example]], list[Row]],
    how: Gathering,
    *,
    version: str = "",
    is_whole: Callable[[Sequence[Row], Sequence[Example]], bool] = lambda rows, batch: True,
) -> list[Row]:
    """The rows that `measure` gives for all examples, in their order; what is in `folder` already is read back.

    Rows of another version are measured again, and so are those that are not whole any more.
    """
    parts = batches(examples, how.batch_size)
    files = [folder / f"{index:06d}-{_digest(batch, version)}.parquet" for index, batch in enumerate(parts)]
    share = list(zip(files, parts, strict=True))[how.ranks.rank :: how.ranks.world_size]
    missing = [(file, part) for file, part in share if not (file.is_file() and is_whole(read_rows(file), part))]
    if len(missing) < len(share):
        log.info("%s: %d of %d batches were measured before", folder, len(share) - len(missing), len(share))
    for file, batch in progress(missing, how.label, len(missing)):
        write_rows(file, measure(batch))
    how.ranks.wait()
    return [row for file in files for row in read_rows(file)]


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write rows as Parquet, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(rows))
    write_whole(file, lambda temporary: pyarrow.parquet.write_table(table, temporary))


def read_rows(file: Path) -> list[Row]:
    """The rows of a Parquet file."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(file).to_pylist()


def _digest(batch: Sequence[Example], version: str) -> str:
    """Of what is in a batch, and of what measures it: other examples make other files."""
    return hashlib.sha256("\n".join((version, *(one.identity for one in batch))).encode()).hexdigest()[:8]
