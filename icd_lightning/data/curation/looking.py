"""The first pass over a unit: each pair is opened and measured, and a record says what came of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from icd_lightning.data.curation.duplicates import LOOK, Prints
from icd_lightning.data.curation.sources import Unit, read_unit
from icd_lightning.data.curation.stages import Stage
from icd_lightning.data.decoding import Sample, SampleDecoder
from icd_lightning.data.images import to_rgb
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
        import pyarrow
        from pyarrow import parquet

        columns = {"key": self.key, "reason": self.reason, "pixels": self.pixels, "digest": self.prints.digest}
        columns |= {"hash": self.prints.hash, "look": [look.tobytes() for look in self.prints.look]}
        columns |= {f"value_{name}": value for name, value in self.values.items()}
        table = pyarrow.table(columns).replace_schema_metadata({"damage": self.damage})
        write_whole(path, lambda temporary: parquet.write_table(table, temporary, compression="zstd"))

    @classmethod
    def load(cls, path: Path) -> Record:
        import pyarrow
        from pyarrow import parquet

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
