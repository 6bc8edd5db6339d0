"""Pictures in files and in tensors. A picture is uint8 (H, W, 3), images are float32 (B, 3, H, W) in [-1, 1].

torch is imported where tensors are made: commands refuse a bad picture before they load it.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from icd_lightning.files import write_whole

if TYPE_CHECKING:
    import torch

FORMATS = ("JPEG", "PNG", "WEBP")  # in shards: Pillow's rarer decoders make black pictures of what is cut
FILE_FORMATS = (*FORMATS, "AVIF", "JPEG2000", "BMP", "DIB", "TIFF", "GIF", "ICO", "PPM", "TGA")
"""Of pictures that a user names; others are rare, and EPS would start Ghostscript."""
BAD_EXIF = (SyntaxError, struct.error)  # what Pillow raises for EXIF that is damaged, which then says nothing
MAX_ASPECT_RATIO = 50  # a square cut from anything narrower shows nothing of it, and is slow to make


def read_picture(path: str | Path, *, max_pixels: int | None = None) -> Image.Image:
    """Read a picture file of any of FILE_FORMATS, mode and orientation to RGB.

    Raises ValueError for what is no picture, cannot be decoded, would decode to far too many pixels (by default twice
    Pillow's own limit), or is a mere line.
    """
    path, most = Path(path), 2 * (Image.MAX_IMAGE_PIXELS or 0) if max_pixels is None else max_pixels
    if not path.is_file():
        raise ValueError(f"{path} is a folder, not a picture" if path.is_dir() else f"there is no picture at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large; twice as large is an error
            opened = Image.open(path, formats=FILE_FORMATS)
            if max_pixels is not None and opened.width * opened.height > max_pixels:
                raise Image.DecompressionBombError
            image = to_rgb(opened)
    except Image.DecompressionBombError:
        raise ValueError(f"{path} has more than {most // 1_000_000} million pixels: make it smaller first") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for bad files
        raise ValueError(f"{path} cannot be read as a picture ({error})") from error
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(f"{path}, {image.width} x {image.height} pixels, is too narrow to cut a square out of it")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn upright as EXIF says, put transparent pictures on white, convert to RGB."""
    with suppress(*BAD_EXIF):
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I;16"):  # 16-bit grey: Pillow's conversion would clip instead of scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):  # 32 bits a pixel, and nobody says which of them is white
        raise ValueError("its pixels have 32 bits: save it with 8 or 16")
    return image.convert("RGB")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an opened image once it is turned upright; its pixels are not read."""
    told = image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp"}  # asked of others, a PNG would read its pixels
    turned = False
    with suppress(*BAD_EXIF):
        turned = bool(told) and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return image.size if turned else image.size[::-1]


def resize_and_crop(image: Image.Image, height: int, width: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Resize to cover height x width, by default a square, and cut out the centre; return it and its (top, left)."""
    width = height if width is None else width
    covering = ImageOps.cover(image, (width, height), Image.Resampling.LANCZOS)
    left, top = (covering.width - width) // 2, (covering.height - height) // 2
    return covering.crop((left, top, left + width, top + height)), (top, left)


def to_images(pictures: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    """Stack B pictures, uint8 (H, W, 3), to images (B, 3, H, W), float32 in [-1, 1]."""
    import torch

    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return stacked.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def quantize(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] to the nearest of 0, 1, ..., 255, float32."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round()


def to_pictures(images: torch.Tensor) -> NDArray[np.uint8]:
    """Images (B, 3, H, W) in [-1, 1] to B pictures, uint8 (B, H, W, 3)."""
    import torch

    return quantize(images).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_png(picture: NDArray[np.uint8], path: Path, *, about: Mapping[str, object]) -> None:
    """Write a picture, uint8 (H, W, 3), with `about` as text in the file's metadata, a key each."""
    info = PngInfo()
    for key, value in about.items():
        info.add_text(key, str(value))
    write_whole(path, lambda temporary: Image.fromarray(picture).save(temporary, "PNG", pnginfo=info))
