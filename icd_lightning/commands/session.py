"""What `icd generate | invert | edit` share: networks ready to run, files read and written, costs counted."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from icd_lightning import __version__
from icd_lightning.data.images import resize_and_crop, save_png, to_images, to_pictures, write_whole
from icd_lightning.diffusion import Step, StepGuidance
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.models.family import EditingDefaults, Family

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A pipeline on its device, how its family is best guided, and the settings that it came from."""

    pipeline: InvertibleConsistencyPipeline
    device: torch.device
    defaults: EditingDefaults
    settings: dict[str, Any]

    @classmethod
    def open(cls, model: str, device: str, **students: str | None) -> Session:
        """Load a family and its students (see `InvertibleConsistencyPipeline.from_pretrained`)."""
        place, family = find_device(device), Family(model)
        defaults = family.load_defaults()
        pipeline = InvertibleConsistencyPipeline.from_pretrained(family, **students).to(place)
        ends = ",".join(map(str, pipeline.boundaries.boundary_timesteps))
        return cls(pipeline, place, defaults, {"model": model, **students, "boundaries": ends})

    def warn_of_unknown_words(self, *prompts: str) -> None:
        """Say which words a family with a closed vocabulary has never seen: what they do to a picture is arbitrary."""
        if not self.defaults.closed_vocabulary:
            return
        words = dict.fromkeys(word for prompt in prompts for word in prompt.lower().split())
        unknown = [word for word in words if len(self.pipeline.conditioner.tokenizer(word).input_ids) > 3]
        if unknown:
            log.warning("%s does not know: %s; expect nonsense", self.settings["model"], ", ".join(unknown))

    def guidance(self, guidance_scale: float | None, tau: float | None) -> StepGuidance:
        """Dynamic guidance; None is the family's default."""
        scale = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        if not 1 <= scale < float("inf"):
            raise ValueError(f"guidance_scale {scale} must be 1 (unguided) or more")
        return StepGuidance(scale, self.defaults.tau if tau is None else tau)

    def noise_shape(self, count: int) -> tuple[int, int, int, int]:
        """Shape of the latents of `count` pictures."""
        return self.pipeline.latent_shape(count, self.pipeline.resolution, self.pipeline.resolution)

    def fit(self, picture: Image.Image, name: str) -> Tensor:
        """The centre of an RGB picture as an image (1, 3, R, R) on the device."""
        resolution = self.pipeline.resolution
        cut, _ = resize_and_crop(picture, resolution)
        if picture.size != cut.size:
            size = f"{picture.width} x {picture.height}"
            log.info("%s: of %s pixels the centre, resized to %d x %d", name, size, resolution, resolution)
        return to_images([np.asarray(cut)]).to(self.device)

    def about(self, command: str, guidance: StepGuidance, **values: Any) -> dict[str, str]:
        """What a file's metadata say: all it takes to make the file again."""
        guided = {"guidance_scale": guidance.guidance_scale, "tau": guidance.tau}
        made = {"command": f"icd {command}", **values, **guided, **self.settings}
        made["Software"] = f"icd_lightning {__version__}"  # a keyword that the PNG specification knows
        return {key: str(value) for key, value in made.items() if value is not None}


@dataclass
class Run:
    """The steps of one run of networks, and when it began; as text, what it cost."""

    steps: list[Step] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    def __str__(self) -> str:
        return f"{sum(step.nfe for step in self.steps)} evaluations, {time.perf_counter() - self.start:.2f} s"


def find_device(name: str) -> torch.device:
    """The device of this name, tried out; "auto" is a GPU where there is one. ValueError if it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); try auto or cpu") from error
    return torch.device(name)


def save_image(path: Path, image: Tensor, about: dict[str, str]) -> None:
    """Write an image (3, H, W) as PNG."""
    save_png(to_pictures(image[None])[0], path, about=about)


def save_latents(path: Path, latents: Tensor, about: dict[str, str]) -> None:
    """Write latents (B, C, h, w) as safetensors, whole or not at all."""
    data = save({"latents": latents.float().cpu().contiguous()}, metadata=about)
    write_whole(path, lambda temporary: temporary.write_bytes(data))  # safetensors' own writer ignores the umask


def read_latents(file: str) -> tuple[Tensor, dict[str, str]]:
    """Latents (B, C, h, w) and what `save_latents` wrote about them."""
    if not Path(file).is_file():
        raise ValueError(f"there are no latents at {file}; icd invert writes them")
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor("latents"), opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} holds no latents as icd invert writes them ({error})") from error
