"""Raw pairs of photographs, and a recipe for them."""

import json
from io import BytesIO

import numpy as np
from matplotlib.cbook import get_sample_data
from PIL import Image

from icd_lightning.data.curation.curate import curate
from icd_lightning.data.curation.duplicates import Duplicates
from icd_lightning.data.curation.engine import Engine
from icd_lightning.data.curation.recipe import Recipe
from icd_lightning.data.curation.stages import Field, ShortSide

HERE = Engine(num_workers=0)
RECIPE = Recipe((ShortSide(least=64), Field(fields=("similarity",), least=0.3)), Duplicates(), resolution=64)


def photograph(number: int, size: int = 96) -> Image.Image:
    """A cutting of a photograph that matplotlib ships; each number has its own."""
    with get_sample_data("grace_hopper.jpg") as file:
        image = Image.open(file).convert("RGB")
    left, top = (int(n) for n in np.random.default_rng(number).integers(0, (image.width - 128, image.height - 128)))
    return image.crop((left, top, left + 128, top + 128)).resize((size, size), Image.Resampling.LANCZOS)


class OddError(OSError):
    """As some libraries have: pickle makes it of its text alone, which it does not take."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}")


def fail_oddly(place: str) -> None:
    raise OddError(place, "gone")


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    stream = BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def pair(number: int, *, similarity: float = 0.4, data: bytes | None = None, **about) -> dict:
    """A sample as img2dataset writes it."""
    text = json.dumps({"similarity": similarity, "url": f"http://x/{number}", **about}).encode()
    jpg = jpeg(photograph(number)) if data is None else data
    return {"__key__": f"{number:09d}", "jpg": jpg, "json": text, "txt": f"picture {number}".encode()}


def curated(inputs, out, recipe=RECIPE, *, shard_size=8, engine=HERE, **options):
    """What `curate` returns for inputs."""
    return curate([str(one) for one in inputs], out, recipe, shard_size=shard_size, engine=engine, **options)


def files_in(folder) -> dict[str, bytes]:
    """All that a folder holds, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
