"""The second pass: what was chosen is read again, brought to its resolution and written to shards of one size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from icd_lightning.data.curation.looking import Looking, Record, open_pair
from icd_lightning.data.curation.sources import Unit, read_unit
from icd_lightning.data.decoding import Sample
from icd_lightning.data.manifest import write_recorded
from icd_lightning.data.shards import encode_sample
from icd_lightning.data.tally import RejectedError
from icd_lightning.data.tars import IMAGE_EXTENSIONS, Raw


@dataclass(frozen=True)
class Piece:
    """A shard to write: its name, and which rows of which units it holds."""

    name: str
    parts: tuple[tuple[Unit, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Writing:
    """Writes a shard, whole or not at all, and then its record.

    Pictures whose short side is over `resolution` are resized to it, their form kept, and encoded as JPEG; all others
    stay as they are, byte for byte. The json file of each holds its `original_size` (h, w), what the stages measured,
    and where it came from.
    """

    looking: Looking
    resolution: int | None
    folder: Path

    def __call__(self, piece: Piece) -> str:
        write_recorded(self._samples(piece), self.folder, piece.name)
        return piece.name

    def _samples(self, piece: Piece) -> Iterator[dict[str, Any]]:
        number = 0
        for unit, rows in piece.parts:
            record, wanted, damage = Record.load(self.looking.path(unit)), iter(rows), list[str]()
            row = next(wanted)
            for index, raw in enumerate(read_unit(unit, damage)):
                if index != row:
                    continue
                if raw["__key__"] != record.key[row]:
                    break
                measured = {name: round(float(value[row]), 6) for name, value in record.values.items()}
                key = f"{piece.name.removesuffix('.tar')}{number:06d}"
                yield self._sample(key, raw, {"from": f"{unit.name}/{record.key[row]}", "measured": measured})
                number += 1
                if (row := next(wanted, None)) is None:
                    break
            if row is not None:
                raise OSError(f"{unit.url} reads otherwise than before: see that it is whole, and call again")

    def _sample(self, key: str, raw: Raw, about: Mapping[str, Any]) -> dict[str, Any]:
        try:
            sample = open_pair(raw, self.looking.caption_field)
        except RejectedError as error:
            raise OSError(f"{error.detail}: it could be read before; see that it is whole, and call again") from error
        metadata = {**sample.metadata, "original_size": sample.size, **about}
        if self.resolution is not None and min(sample.size) > self.resolution:
            return encode_sample(key, self._resized(sample), sample.caption, metadata, format="jpg")
        extension = next(extension for extension in IMAGE_EXTENSIONS if extension in raw)
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
        return {"__key__": key, extension: raw[extension], "json": text.encode(), "txt": sample.caption.encode()}

    def _resized(self, sample: Sample) -> np.ndarray:
        scale = self.resolution / min(sample.size)
        height, width = (max(self.resolution, round(side * scale)) for side in sample.size)
        return np.asarray(sample.picture.resize((width, height), Image.Resampling.LANCZOS))
