"""From the bytes of one sample to a picture and its caption, or to the reason why it is left out."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from icd_lightning.data.batch import Batch
from icd_lightning.data.images import resize_and_crop, to_images, to_rgb
from icd_lightning.data.manifest import IMAGE_EXTENSIONS

logger = logging.getLogger(__name__)

REASONS = ("no_image", "no_caption", "too_small", "corrupt_image", "corrupt_json", "corrupt_latents", "wrong_resolution", "broken_shard")
MAX_SKIPPED_IN_A_ROW = 10_000
MOMENTS = "moments.npy"  # the file of a sample that holds an encoder's output instead of a picture


class RejectedError(Exception):
    """A sample cannot be used; `reason` is one of REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class NothingToReadError(ValueError):
    """So many samples were skipped that training would wait forever."""


class Decoded(NamedTuple):
    """One sample: picture uint8 (R, R, 3) or the moments of its latents, the other being None; caption, key, metadata."""

    picture: NDArray[np.uint8] | None
    caption: str
    key: str
    metadata: dict
    moments: NDArray[np.float16] | None = None


@dataclass(frozen=True)
class SampleDecoder:
    """Turns the files of a sample, {"__key__": str, "__url__": str, "jpg": bytes, "txt": bytes}, into a picture.

    The image may have any of IMAGE_EXTENSIONS, and there may be a json file. The short side is resized to `resolution`
    and the centre cut out. The caption is the txt file or, if `caption_field` is given, that field of the json file.
    A short side under `min_size` pixels (`resolution` if not given; 0 allows any enlargement) is rejected.
    """

    resolution: int
    caption_field: str | None = None
    min_size: int | None = None

    def admit(self, raw: dict[str, Any]) -> None:
        """Raise `RejectedError` for whatever can be found wrong without decoding pixels."""
        _read_metadata(raw)
        self._caption(raw)
        if MOMENTS not in raw:
            self._open(raw)

    def decode(self, raw: dict[str, Any]) -> Decoded:
        """Decode to a picture uint8 (R, R, 3) or moments; raise `RejectedError` if the sample cannot be used."""
        metadata, caption = _read_metadata(raw), self._caption(raw)
        if MOMENTS in raw:
            return Decoded(None, caption, raw["__key__"], metadata, self._moments(raw, metadata))
        image = self._open(raw)
        try:
            image = to_rgb(image)
            cut, crop_top_left = resize_and_crop(image, self.resolution)
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for bad files
            raise RejectedError("corrupt_image", f"{_name(raw)}: {error}") from error
        metadata |= {"original_size": (image.height, image.width), "crop_top_left": crop_top_left}
        return Decoded(np.asarray(cut), caption, raw["__key__"], metadata)

    def _open(self, raw: dict[str, Any]) -> Image.Image:
        data = next((raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw), None)
        if data is None:
            found = sorted(name for name in raw if not name.startswith("__"))
            raise RejectedError("no_image", f"{_name(raw)} has {found}, none of {', '.join(IMAGE_EXTENSIONS)}")
        try:
            image = Image.open(BytesIO(data))  # reads the header only
        except Exception as error:
            raise RejectedError("corrupt_image", f"{_name(raw)}: {error}") from error
        min_size = self.resolution if self.min_size is None else self.min_size
        if min(image.size) < min_size:
            size = f"{image.width} x {image.height}"
            raise RejectedError("too_small", f"{_name(raw)} is {size}, its short side under {min_size} pixels")
        return image

    def _moments(self, raw: dict[str, Any], metadata: dict) -> NDArray[np.float16]:
        try:
            moments, resolution = np.load(BytesIO(raw[MOMENTS])), metadata["moments"]["resolution"]
        except (ValueError, EOFError, KeyError, TypeError) as error:
            raise RejectedError("corrupt_latents", f"{_name(raw)}: {error!r}") from error
        if resolution != self.resolution:
            detail = f"{_name(raw)} was encoded at {resolution} pixels, not {self.resolution}"
            raise RejectedError("wrong_resolution", detail)
        return moments

    def _caption(self, raw: dict[str, Any]) -> str:
        if self.caption_field is not None:
            caption, source = _read_metadata(raw).get(self.caption_field), f"json field {self.caption_field!r}"
        else:
            caption, source = raw.get("txt", b"").decode("utf-8", errors="replace"), ".txt file"
        if not isinstance(caption, str) or not caption.strip():
            raise RejectedError("no_caption", f"{_name(raw)} has no {source} with text")
        return caption.strip()


def _name(raw: dict[str, Any]) -> str:
    return f"{raw['__key__']} of {raw['__url__']}"


def _read_metadata(raw: dict[str, Any]) -> dict:
    try:
        metadata = json.loads(raw.get("json", b"{}"))
    except ValueError as error:
        raise RejectedError("corrupt_json", f"{_name(raw)}: {error}") from error
    if not isinstance(metadata, dict):
        raise RejectedError("corrupt_json", f"{_name(raw)}: a {type(metadata).__name__}, not an object with fields")
    return metadata


def collate(samples: Sequence[Decoded]) -> Batch:
    """Join samples into a Batch: images (B, 3, R, R), or moments."""
    pictures, captions, keys, metadata, moments = zip(*samples, strict=True)
    if any(one is None for one in moments):
        if any(one is not None for one in moments):
            raise NothingToReadError("some shards hold pictures and some hold latents: train on one kind at a time")
        return Batch(to_images(pictures), list(captions), list(keys), list(metadata))
    joined = torch.from_numpy(np.stack(moments)).float()
    return Batch(None, list(captions), list(keys), list(metadata), joined)


class Tally:
    """Counts samples that passed and those that were skipped, by reason, over all workers (in shared memory)."""

    def __init__(self, num_workers: int = 1) -> None:
        self._counts = torch.zeros(max(1, num_workers), 1 + len(REASONS), dtype=torch.int64).share_memory_()
        self._skipped_in_a_row = 0
        self._logged: set[str] = set()

    def passed(self, worker: int = 0) -> None:
        self._counts[worker, 0] += 1  # each worker has a row of its own: no two write to one place
        self._skipped_in_a_row = 0

    def skipped(self, reason: str, detail: str, worker: int = 0) -> None:
        """Count a sample (for "broken_shard", a shard); raise NothingToReadError after very many in a row."""
        self._counts[worker, 1 + REASONS.index(reason)] += 1
        self._skipped_in_a_row += 1
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("skipped for %s: %s (from now on only counted)", reason, detail)
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise self.nothing(f"{self._skipped_in_a_row} samples in a row could not be used")

    def counts(self) -> dict[str, int]:
        """How many samples "passed", and how many were skipped for each of REASONS."""
        return dict(zip(("passed", *REASONS), self._counts.sum(0).tolist(), strict=True))

    def nothing(self, what: str) -> NothingToReadError:
        """Make an error that says `what` is wrong and why samples were skipped."""
        skipped = ", ".join(f"{reason} {n}" for reason, n in self.counts().items() if n and reason != "passed")
        return NothingToReadError(f"{what} (skipped: {skipped}); look at the shards with `icd data describe`")
