"""The two passes over units: each pair is measured, and a record says what came of it; what was chosen is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet

from icd_lightning.data.curation.duplicates import LOOK, Prints
from icd_lightning.data.curation.sources import Unit, read_unit
from icd_lightning.data.curation.stages import Stage
from icd_lightning.data.decoding import Sample, SampleDecoder
from icd_lightning.data.images import to_rgb
from icd_lightning.data.manifest import write_recorded
from icd_lightning.data.shards import encode_sample
from icd_lightning.data.tally import RejectedError
from icd_lightning.data.tars import IMAGE_EXTENSIONS, Raw
from icd_lightning.files import write_whole

VERSION = 2  # of what records say; raised when pictures are opened or hashed otherwise
BATCH = 16  # pairs that a stage is given at once, whose pictures are in memory at full size


def open_pair(raw: Raw, caption_field: str | None) -> Sample:
    """A sample whose picture is an RGB image, and its `size` that of it; RejectedError for one that cannot be used."""
    sample = SampleDecoder(1, caption_field, 0).open(raw)
    if sample.picture is None:
        raise RejectedError("no_image", f"{sample.name} holds latents")
    try:
        return sample._replace(picture=to_rgb(sample.picture))
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for bad files
        raise RejectedError("corrupt_image", f"{sample.name}: {error}") from error


@dataclass(frozen=True)
class Record:
    """What came of the pairs of a unit, in order. `reason` is empty where a pair is fit; `damage` is of the unit.

    `pixels` int64 (N,) are those of a picture, `values` float32 (N,) by stage, NaN where it was not asked.
    """

    key: list[str]
    reason: NDArray[np.str_]
    pixels: NDArray[np.int64]
    prints: Prints
    values: dict[str, NDArray[np.float32]]
    damage: str = ""

    def save(self, path: Path) -> None:
        columns = {"key": self.key, "reason": self.reason, "pixels": self.pixels, "digest": self.prints.digest}
        columns |= {"hash": self.prints.hash, "look": [look.tobytes() for look in self.prints.look]}
        columns |= {f"value_{name}": value for name, value in self.values.items()}
        table = pyarrow.table(columns).replace_schema_metadata({"damage": self.damage})
        write_whole(path, lambda temporary: parquet.write_table(table, temporary, compression="zstd"))

    @classmethod
    def load(cls, path: Path) -> Record:
        if not path.is_file():
            raise FileNotFoundError(f"{path}, a record of this curation, is gone: curate again, with --overwrite")
        try:
            table = parquet.read_table(path)
            arrays = {name: column.to_numpy() for name, column in zip(table.column_names, table.columns, strict=True)}
            look = np.frombuffer(b"".join(arrays["look"]), np.uint8).reshape(-1, LOOK)
            prints = Prints(arrays["digest"], arrays["hash"], look)
            values = {name[6:]: array for name, array in arrays.items() if name.startswith("value_")}
            key, reason, damage = arrays["key"].tolist(), arrays["reason"].astype(str), table.schema.metadata[b"damage"]
            return cls(key, reason, arrays["pixels"], prints, values, damage.decode())
        except (pyarrow.ArrowException, KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is no record of a curation ({error!r}): curate again, with --overwrite"
            ) from error


@dataclass
class _Pair:
    key: str
    sample: Sample | None = None
    reason: str = ""
    print: Prints = field(default_factory=Prints.none)
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Looking:
    """Measures the pairs of a unit by the stages, one after the other: what one drops, the next is not asked about."""

    stages: tuple[Stage, ...]
    hashed: bool
    caption_field: str | None
    folder: Path

    def path(self, unit: Unit) -> Path:
        """Where the record of a unit is kept: its name says all that it depends on."""
        settings = [VERSION, self.hashed, self.caption_field, *(stage.settings() for stage in self.stages)]
        same = json.loads(json.dumps(settings), parse_int=float)  # as a file has them, and as Python may
        return self.folder / f"{unit.digest(same)}.parquet"

    def __call__(self, unit: Unit) -> str:
        damage: list[str] = []
        pairs = list(self._looked(read_unit(unit, damage)))
        values = {
            stage.name: np.array([pair.values.get(stage.name, np.nan) for pair in pairs], np.float32)
            for stage in self.stages
        }
        pixels = [pair.sample.size[0] * pair.sample.size[1] if pair.sample else 0 for pair in pairs]
        reasons = np.array([pair.reason for pair in pairs], str)
        prints = Prints.join([pair.print for pair in pairs])
        record = Record([p.key for p in pairs], reasons, np.array(pixels, np.int64), prints, values, "; ".join(damage))
        record.save(self.path(unit))
        return record.damage

    def _looked(self, raws: Iterator[Raw]) -> Iterator[_Pair]:
        while batch := list(islice(raws, BATCH)):
            pairs = [self._opened(raw) for raw in batch]
            for stage in self.stages:
                _judge(stage, [pair for pair in pairs if not pair.reason])
            for pair, raw in zip(pairs, batch, strict=True):
                if self.hashed and not pair.reason:
                    file = next(raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw)
                    pair.print = Prints.of(file, pair.sample.picture)
                if pair.sample:
                    pair.sample = pair.sample._replace(picture=None)
                yield pair

    def _opened(self, raw: Raw) -> _Pair:
        try:
            return _Pair(raw["__key__"], open_pair(raw, self.caption_field))
        except RejectedError as error:
            return _Pair(raw["__key__"], reason=error.reason)


def _judge(stage: Stage, pairs: Sequence[_Pair]) -> None:
    values = stage.values([pair.sample for pair in pairs]) if pairs else []
    for pair, value in zip(pairs, values, strict=True):
        pair.values[stage.name] = value = float("nan") if value is None else float(value)
        pair.reason = "" if stage.keeps(value) else stage.name


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
