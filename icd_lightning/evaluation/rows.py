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
from typing import Any

import torch

from icd_lightning.evaluation.examples import Example
from icd_lightning.files import write_whole
from icd_lightning.tiny.scenes import Scene

log = logging.getLogger(__name__)

Row = dict[str, Any]


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


def gather_rows(
    folder: Path,
    examples: Sequence[Example],
    measure: Callable[[Sequence[Example]], list[Row]],
    *,
    batch_size: int,
    ranks: Ranks = ALONE,
) -> list[Row]:
    """The rows that `measure` gives for all examples, in their order; what is in `folder` already is read back."""
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be 1 or more")
    batches = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    files = [folder / f"{index:06d}-{_digest(batch)}.parquet" for index, batch in enumerate(batches)]
    share = list(zip(files, batches, strict=True))[ranks.rank :: ranks.world_size]
    missing = [(file, batch) for file, batch in share if not file.is_file()]
    if len(missing) < len(share):
        log.info("%s: %d of %d batches were measured before", folder, len(share) - len(missing), len(share))
    for file, batch in missing:
        write_rows(file, measure(batch))
    ranks.wait()
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


def _digest(batch: Sequence[Example]) -> str:
    """Of what is in a batch: other examples make other files, and so does what a file now says of them.

    A scene's key says all.
    """
    said = (example.key if isinstance(example.picture, Scene) else repr(example) for example in batch)
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:8]
