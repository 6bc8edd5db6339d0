"""From the bytes of one sample to a picture and its caption, or to the reason why it is left out."""

from __future__ import annotations

import json
import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load

from icd_lightning.data.batch import Batch
from icd_lightning.data.images import FORMATS, MAX_ASPECT_RATIO, resize_and_crop, to_images, to_rgb, upright_size
from icd_lightning.data.tally import NothingToReadError, RejectedError
from icd_lightning.data.tars import IMAGE_EXTENSIONS, LARGE, MOMENTS, MOST_BYTES, TEXT, Raw, explain_dots, text_caption
from icd_lightning.texts import printable, wrong_with

EMBEDS = ("prompt_embeds", "pooled_prompt_embeds")  # in TEXT, the second for SDXL alone
MIXED = (
    "some shards hold pictures and some hold latents, or some hold text embeddings and some none: train on one kind at "
    "a time"
)
MOST_PIXELS = 1 << 16  # of a side
PLACES = ("original_size", "crop_top_left")  # metadata (h, w) and (top, left) of every sample


def require(*, at_least: int, **values: int) -> None:
    """ValueError for the first of these that is less."""
    for name, value in values.items():
        if value < at_least:
            raise ValueError(f"{name} {value} must be at least {at_least}")


class Sample(NamedTuple):
    """One sample: a picture uint8 (H, W, 3) or the moments (C, h, w) of its latents, the other being None.

    `size` is its (height, width) in a batch; `name` is what messages call it. `text` holds the embeddings of the
    caption, by name, if they were kept beside the moments. Before it is finished, a picture is an image whose pixels
    are not read yet, and `text` the content of its file.
    """

    name: str
    key: str
    caption: str
    metadata: dict
    size: tuple[int, int] = (0, 0)
    picture: NDArray[np.uint8] | Image.Image | None = None
    moments: NDArray[np.float16] | None = None
    text: dict[str, NDArray[np.float16]] | bytes | None = None


@dataclass(frozen=True)
class SampleDecoder:
    """Turns the files of a sample, {"__key__": str, "__url__": str, "jpg": bytes, "txt": bytes}, into a picture.

    The image may have any of IMAGE_EXTENSIONS, and there may be a json file. The picture is resized to cover a square
    of `resolution` pixels, or with `buckets` the nearest of `bucket_sizes(resolution)`, and the centre cut out. The
    caption is the txt or else the caption file or, if `caption_field` is given, that field of the json file. Rejected
    is a short side under `min_size` pixels; if that is not given, a picture that would have to be enlarged (0 allows
    any enlargement).

    Instead of the image there may be MOMENTS, which must have been made with the same resolution and buckets, and TEXT
    beside them.
    """

    resolution: int
    caption_field: str | None = None
    min_size: int | None = None
    buckets: bool = False

    def __post_init__(self) -> None:
        require(resolution=self.resolution, at_least=1)
        require(min_size=self.min_size or 0, at_least=0)

    def decode(self, raw: Raw) -> Sample:
        """Decode to a picture uint8 (H, W, 3) or moments; raise `RejectedError` if the sample cannot be used."""
        return self.finish(self.admit(raw))

    def admit(self, raw: Raw) -> Sample:
        """Check all but pixels and embeddings; raise `RejectedError` for what is wrong."""
        return self.fit(self.open(raw))

    def open(self, raw: Raw) -> Sample:
        """Check what no resolution changes, reading no more of an image than its header.

        An image may come as an open file. The sample has the size of its picture, upright, or of its moments.
        """
        name = printable(f"{raw['__key__']} of {raw['__url__']}")
        if large := [extension for extension, data in raw.items() if data is LARGE]:
            raise RejectedError("too_large", f"{name}: {large[0]} has more than {MOST_BYTES >> 20} MB")
        try:
            metadata = json.loads(raw.get("json", b"{}"))
        except (ValueError, RecursionError) as error:
            raise RejectedError("corrupt_json", f"{name}: {error}") from error
        if not isinstance(metadata, dict):
            raise RejectedError("corrupt_json", f"{name}: a {type(metadata).__name__}, not an object with fields")
        try:
            caption, source = text_caption(raw), ".txt or .caption file"
        except ValueError as error:
            remedy = "save captions as UTF-8"
            raise RejectedError("bad_caption", f"{name}: its caption is not UTF-8 ({error})", remedy) from error
        if self.caption_field is not None:
            caption, source = metadata.get(self.caption_field), f"json field {self.caption_field!r}"
        if not isinstance(caption, str) or not caption.strip():
            raise RejectedError("no_caption", f"{name} has no {source} with text", self._caption_remedy(raw, metadata))
        if wrong := wrong_with(caption):
            raise RejectedError("bad_caption", f"{name}: its caption {wrong}")
        sample = Sample(name, raw["__key__"], caption.strip(), metadata)
        return self._with_moments(sample, raw) if MOMENTS in raw else _with_image(sample, raw)

    def fit(self, sample: Sample) -> Sample:
        """Give an opened sample its size in a batch; raise `RejectedError` if it can have none."""
        if sample.moments is None:
            return sample._replace(size=self.size_in_batch(*sample.size, sample.name))
        settings = sample.metadata["moments"]
        made, wanted = (settings["resolution"], settings.get("buckets", False)), (self.resolution, self.buckets)
        if made != wanted:
            encoded, wanted = (f"{side} pixels{' in buckets' * many}" for side, many in (made, wanted))
            remedy = "give the resolution and buckets that their latents were made with, or make them again"
            raise RejectedError("wrong_resolution", f"{sample.name} was encoded at {encoded}, not {wanted}", remedy)
        return sample

    def size_in_batch(self, height: int, width: int, name: str = "one") -> tuple[int, int]:
        """The (height, width) to which a picture is brought; raise `RejectedError` for one too narrow or too small."""
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise RejectedError("too_narrow", f"{name} is {width} x {height}")
        size = (self.resolution, self.resolution)
        if self.buckets:
            size = nearest_bucket(height, width, self.resolution)
        too_small = min(height / size[0], width / size[1]) < 1
        if too_small if self.min_size is None else min(height, width) < self.min_size:
            wanted = f"{size[1]} x {size[0]} pixels" if self.min_size is None else f"{self.min_size} pixels a side"
            option = "resolution" if self.min_size is None else "min_size"
            remedy = f"lower {option}, or give min_size=0 to enlarge them"
            raise RejectedError("too_small", f"{name} is {width} x {height}, less than {wanted}", remedy)
        return size

    def finish(self, sample: Sample) -> Sample:
        """Read pixels or embeddings; raise `RejectedError` if they are corrupt."""
        if sample.text is not None:
            try:
                text = load(sample.text)
            except (SafetensorError, KeyError) as error:
                raise RejectedError("corrupt_latents", f"{sample.name}: {error!r}") from error
            if EMBEDS[0] not in text or not text.keys() <= set(EMBEDS):
                raise RejectedError("corrupt_latents", f"{sample.name}: {TEXT} holds {sorted(text)}, not {EMBEDS}")
            for (name, values), axes in zip(sorted(text.items(), reverse=True), (2, 1), strict=False):
                if values.ndim != axes or not _fits_half(values):
                    what = f"{name} {values.dtype} {values.shape}"
                    raise RejectedError("corrupt_latents", f"{sample.name}: {what} are no finite embeddings")
            return sample._replace(text=text)
        if sample.picture is None:
            return sample
        try:
            original_size = _stated_size(sample.metadata) or upright_size(sample.picture)
            # a JPEG is decoded no larger than twice the size that it is brought to, which takes half the time or less
            sample.picture.draft(sample.picture.mode, (2 * max(sample.size),) * 2)
            cut, crop_top_left = resize_and_crop(to_rgb(sample.picture), *sample.size)
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for bad files
            raise RejectedError("corrupt_image", f"{sample.name}: {error}") from error
        place = {"original_size": original_size, "crop_top_left": crop_top_left}
        return sample._replace(picture=np.asarray(cut), metadata=sample.metadata | place)

    def _with_moments(self, sample: Sample, raw: Raw) -> Sample:
        """Read moments (C, h, w), and turn into tuples what json has made lists of."""
        try:
            moments, settings = _array(raw[MOMENTS]), sample.metadata["moments"]
            made = (settings["resolution"], settings.get("buckets", False))
            encoders = [settings["autoencoder"], *([settings["text_encoder"]] if TEXT in raw else [])]
            known = (*map(type, made), *map(type, encoders)) == (int, bool, *[str] * len(encoders))
            if not (known and 0 < made[0] <= MOST_PIXELS):
                raise ValueError(f"moments made as {settings!r:.200}")
            places = {place: _pixels(sample.metadata[place]) for place in PLACES}
            _, height, width = moments.shape
            sizes = bucket_sizes(made[0]) if made[1] else ((made[0], made[0]),)
            if not any((height << halved, width << halved) in sizes for halved in range(8)):
                raise ValueError(f"{height} x {width}, as no picture's are")
        except Exception as error:  # numpy reads a header by Python's own parser, with all its errors
            raise RejectedError("corrupt_latents", f"{sample.name}: {error!r}") from error
        if TEXT in raw and sample.caption != text_caption(raw):
            raise NothingToReadError(
                f"{sample.name} has embeddings of {text_caption(raw)!r}, not of {sample.caption!r} as caption_field "
                f"{self.caption_field!r} has it: leave that out, or cache latents and text again with it"
            )
        metadata = sample.metadata | places
        return sample._replace(size=(height, width), metadata=metadata, moments=moments, text=raw.get(TEXT))

    def _caption_remedy(self, raw: Raw, metadata: dict) -> str:
        if dots := explain_dots(raw):
            return dots
        if fields := [name for name, value in metadata.items() if isinstance(value, str)]:
            return f"give a caption_field that their json files have ({', '.join(fields)})"
        if self.caption_field is not None:
            return "leave out caption_field to take captions from txt or caption files"
        return (
            "give each a txt or caption file of the same key, next to it: a tar must be sorted by name "
            "(`tar --sort=name`)"
        )


def _with_image(sample: Sample, raw: Raw) -> Sample:
    data = next((raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw), None)
    if data is None:
        extensions = [name for name in raw if not name.startswith("__")][:10]
        lacks = f"{sample.name} has {extensions}, none of {', '.join(IMAGE_EXTENSIONS)}"
        raise RejectedError("no_image", lacks, explain_dots(raw))
    try:
        image = Image.open(BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS)
        return sample._replace(size=upright_size(image), picture=image)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for bad files
        raise RejectedError("corrupt_image", f"{sample.name}: {error}") from error


def _array(data: bytes) -> NDArray[np.float16]:
    """The array of a .npy file, whose header numpy would believe; ValueError if it is none of finite numbers."""
    file = BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("a .npy file of another version than 1.0")
    shape, transposed, kind = np.lib.format.read_array_header_1_0(file)
    if kind.kind != "f" or transposed or math.prod(shape) * kind.itemsize != len(data) - file.tell():
        raise ValueError(f"{kind} {shape} in {len(data)} bytes are no moments")
    array = np.frombuffer(data, kind, offset=file.tell()).reshape(shape)
    if not _fits_half(array):
        raise ValueError(f"{kind} {shape} are no finite moments")
    return array.copy()


def _fits_half(values: NDArray) -> bool:
    """Whether these are numbers that float16, in which they are kept, can hold; none of them is not a number."""
    known = values.dtype in (np.float16, np.float32, np.float64)
    return bool(known and values.size and (np.abs(values) <= np.finfo(np.float16).max).all())


def _pixels(pair: Any) -> tuple[int, int]:
    if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and 0 <= n < 1 << 31 for n in pair)):
        raise ValueError(f"{pair!r:.80} are no two numbers of pixels")
    return pair[0], pair[1]


def _stated_size(metadata: dict) -> tuple[int, int] | None:
    """The (height, width) that a picture had before whoever wrote the shard resized it, if the json file says so."""
    try:
        height, width = _pixels(metadata.get(PLACES[0]))
    except ValueError:
        return None
    return (height, width) if min(height, width) else None


def collate(samples: Sequence[Sample]) -> Batch:
    """Join samples of one size into a Batch: images (B, 3, H, W), or moments and perhaps embeddings."""
    if len({(one.picture is None, *sorted(one.text or ())) for one in samples}) > 1:
        raise NothingToReadError(MIXED)
    _, keys, captions, metadata, _, pictures, moments, texts = map(list, zip(*samples, strict=True))
    if moments[0] is None:
        return Batch(to_images(pictures), captions, keys, metadata)
    embeds = {name: _joined([text[name] for text in texts]) for name in texts[0] or ()}
    return Batch(None, captions, keys, metadata, _joined(moments), **embeds)


def _joined(arrays: Sequence[NDArray[np.float16]]) -> torch.Tensor:
    if len(shapes := {array.shape for array in arrays}) > 1:
        raise NothingToReadError(
            f"some latents or embeddings are {min(shapes)}, some {max(shapes)}: they are of several encoders, cache "
            "them again with one"
        )
    return torch.from_numpy(np.stack(arrays)).float()


# --- sizes of pictures that are not square, as SDXL is trained (arXiv:2307.01952, appendix I) -------------------------


@lru_cache
def bucket_sizes(resolution: int) -> tuple[tuple[int, int], ...]:
    """All (height, width) of nearly resolution^2 pixels and not more, from 1:4 to 4:1, in steps of up to 64 pixels."""
    step = bucket_step(resolution)
    sides = range(resolution // 2, 2 * resolution + 1, step)
    sizes = {(side, resolution * resolution // side // step * step) for side in sides}
    return tuple(sorted(sizes | {(width, height) for height, width in sizes}))


def nearest_bucket(height: int, width: int, resolution: int) -> tuple[int, int]:
    """The bucket (height, width) whose form is nearest to a picture's."""
    forms, sizes = _sorted_buckets(resolution)
    form = math.log(height / width)
    place = bisect(forms, form)
    return min(sizes[max(0, place - 1) : place + 1], key=lambda size: abs(form - math.log(size[0] / size[1])))


@lru_cache
def _sorted_buckets(resolution: int) -> tuple[list[float], list[tuple[int, int]]]:
    sizes = sorted(bucket_sizes(resolution), key=lambda size: size[0] / size[1])
    return [math.log(height / width) for height, width in sizes], sizes


def bucket_step(resolution: int) -> int:
    """The largest power of two up to an eighth of the resolution, from 8 to 64: latents have whole sides."""
    return 1 << (min(512, max(64, resolution)).bit_length() - 4)
