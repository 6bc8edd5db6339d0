"""`icd condense`: of results, what ships with the notebooks."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)


def condense(*, source: str = "outputs", out: str = "notebooks/results") -> None:
    """Copy what the notebooks read of a folder of results: a few MB that git can keep.

    These are the summaries and the rows of each picture, the scalars of each training, and the few pictures that the
    notebooks show.

    Args:
        source: Folder with ablations/ (of `icd ablations`), eval-guidance/ and eval-generation/ (of `icd eval`), or
            some of them.
        out: Folder to copy to, under the same names.
    """
    from icd_lightning.evaluation.shipping import condense as copy

    for folder in copy(Path(source), Path(out)):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        log.info("%s  %.1f MB", folder, size / 1e6)
