"""Checkpoint files that are whole or not there, on any file system."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from icd_lightning.files import write_whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, syncs it to the disk, renames it, and keeps the one before it.

    Lightning writes into the temporary folder and moves the file. Between two file systems that is a copy over the only
    checkpoint: a process that is killed, or a disk that is full, leaves half a file and nothing to go on from.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `path`, and leave what was there at `before(path)`. OSError if it cannot be written, nothing lost."""
        place = Path(path)
        for left in place.parent.glob(f".{place.name}-*.tmp"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # torch.save by itself would not say why a write failed
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if place.exists():
                _keep(place, before(place))

        try:
            write_whole(place, write)
        except (OSError, RuntimeError) as error:
            # torch's writer, told of a full disk, fails once more when it wants to end the file
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            there = next((file for file in (place, before(place)) if file.exists()), None)
            rest = f"{there} is as it was" if there else "nothing is saved"
            raise OSError(
                f"the checkpoint {place} cannot be written ({cause.strerror or cause}); {rest}: make room or give "
                "another trainer.default_root_dir, and start the same command again"
            ) from error
        _sync_folder(place.parent)


def before(place: Path) -> Path:
    """Where the checkpoint before `place` is kept; a name that begins with "last" Lightning would take for the last."""
    return place.with_name(f"before-{place.name}")


def _keep(place: Path, kept: Path) -> None:
    """Let `kept` be the file at `place`, which is nowhere missing in between if the file system has hard links."""
    link = kept.with_name(f".{kept.name}-link.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(place, link)
    except OSError:
        os.replace(place, kept)
    else:
        os.replace(link, kept)  # which does nothing where both are one file already
        link.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Let the rename survive a power cut, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
