"""What `icd generate | invert | edit` share: networks ready to run, files read and written, costs counted."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
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
from icd_lightning.commands.edits import Edit, EditSettings, Size
from icd_lightning.commands.weights import Weights, check_device
from icd_lightning.data.images import read_picture, save_png
from icd_lightning.diffusion import Step
from icd_lightning.editing.baselines.base import Baseline
from icd_lightning.editing.defaults import defaults_of
from icd_lightning.editing.pictures import as_images, as_output
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt
from icd_lightning.evaluation.bench import CPU
from icd_lightning.evaluation.examples import read_blended
from icd_lightning.evaluation.methods import Models, guided_as_told
from icd_lightning.files import write_whole
from icd_lightning.metrics.reconstruction import psnr
from icd_lightning.models.text import unknown_words

log = logging.getLogger(__name__)


@dataclass
class Cost:
    """Network evaluations of one picture, and when they began; as text, with the seconds since."""

    nfe: int = 0
    start: float = field(default_factory=time.perf_counter)

    def count(self, step: Step) -> None:
        """Add the evaluations of one step."""
        self.nfe += step.nfe

    def of(self, pipeline: InvertibleConsistencyPipeline) -> str:
        """With the evaluations of the pipeline's latest call."""
        self.nfe += pipeline.nfe
        return str(self)

    def __str__(self) -> str:
        return f"{self.nfe} evaluations, {time.perf_counter() - self.start:.2f} s"


@dataclass(frozen=True)
class Edited:
    """An edited picture, the settings that made it, and what it cost."""

    image: Image.Image
    about: dict[str, Any]
    cost: str


@dataclass(frozen=True)
class Session:
    """A pipeline on its device, and the weights that it came from."""

    pipeline: InvertibleConsistencyPipeline
    weights: Weights

    @classmethod
    def open(cls, weights: Weights) -> Session:
        """Load a model and its students, after a look at the device."""
        device = find_device(weights.device)
        pipeline = InvertibleConsistencyPipeline.from_pretrained(weights.family(), **weights.students).to(device)
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, weights)

    def warn_of_unknown_words(self, *prompts: str) -> None:
        """Say which words a family with a closed vocabulary has never seen."""
        warn_of(self.pipeline.unknown_words(*prompts), self.weights.model)

    def size(self, wanted: Size) -> tuple[int, int]:
        """Height and width of the pictures."""
        return wanted.height or self.pipeline.resolution, wanted.width or self.pipeline.resolution

    def edit(self, edit: Edit, settings: Sequence[EditSettings], size: Size) -> Iterator[Edited]:
        """One picture, with each of the settings in turn; those of one seed share the way to noise."""
        pipe, (height, width) = self.pipeline, self.size(size)
        picture = opened(edit.image, height, width)
        self.warn_of_unknown_words(edit.source, edit.target)
        noises: dict[int, Tensor] = {}
        for one in settings:
            cost, seed = Cost(), one.seed
            if seed not in noises:
                noises[seed] = pipe.invert(picture, edit.source, seed=seed, height=height, width=width)
                cost.nfe += pipe.nfe
            options, about = self._options(one, edit)
            result = pipe.edit(None, edit.source, edit.target, latents=noises[seed], **options)
            about |= {"seed": seed, "boundaries": self.boundaries}
            yield Edited(result.images[0], about, cost.of(pipe))

    def _options(self, settings: EditSettings, edit: Edit) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of the pipeline's `edit`, none left to defaults, and the same for a file's metadata."""
        config = self.pipeline.config
        tau = config.tau if settings.tau is None else settings.tau
        family_way = settings.method == "icd" and settings.swap_tau is None and config.attention_control
        if settings.method == "icd_p2p" or settings.control or family_way:
            control, usual = borrowed(PromptToPrompt(), settings, edit), config.edit_guidance_scale
            options: dict[str, Any] = {"control": control}
            about: dict[str, Any] = {"method": "icd_p2p", **vars(control)}
        else:
            usual = config.guidance_scale
            options = {"control": None, "swap_tau": tau if settings.swap_tau is None else settings.swap_tau}
            about = {"method": "icd_swap", "swap_tau": options["swap_tau"]}
        guidance = {"guidance_scale": usual if settings.guidance_scale is None else settings.guidance_scale, "tau": tau}
        return {**options, **guidance}, {**about, **guidance}

    def invert(self, image: str, prompt: str, seed: int, size: Size) -> tuple[Tensor, str]:
        """A picture to noise (1, C, h, w), and what that cost."""
        height, width = self.size(size)
        picture, cost = opened(image, height, width), Cost()
        self.warn_of_unknown_words(prompt)
        noise = self.pipeline.invert(picture, prompt, seed=seed, height=height, width=width)
        return noise, cost.of(self.pipeline)

    def reconstruct(self, image: str, prompt: str, noise: Tensor) -> tuple[Image.Image, str, float]:
        """Noise (1, C, h, w) to a picture, unguided; what that cost, and its PSNR to the one that it was."""
        cost = Cost()
        back = self.pipeline.generate(prompt, latents=noise, guidance_scale=1.0, output_type="pt").images * 2 - 1
        spent, picture = cost.of(self.pipeline), as_output(back, "pil")[0]
        images = as_images(read_picture(image), *back.shape[-2:]).to(back.device)
        return picture, spent, float(psnr(back, images))

    def generate(
        self, prompts: list[str], guidance_scale: float | None, tau: float | None, size: Size, begin: dict[str, Any]
    ) -> tuple[list[Image.Image], dict[str, Any], str]:
        """Pictures from prompts, the guidance they were made with, and what they cost; they `begin` as told."""
        config, cost = self.pipeline.config, Cost()
        guidance = {
            "guidance_scale": config.guidance_scale if guidance_scale is None else guidance_scale,
            "tau": config.tau if tau is None else tau,
        }
        result = self.pipeline.generate(prompts, **guidance, **begin, height=size.height, width=size.width)
        return result.images, {**guidance, "boundaries": self.boundaries}, cost.of(self.pipeline)

    @property
    def boundaries(self) -> str:
        """As `--boundaries` takes them."""
        return ",".join(map(str, self.pipeline.boundaries.boundary_timesteps))


class BaselineSession:
    """A training-free method on its device."""

    def __init__(self, weights: Weights, settings: EditSettings) -> None:
        self.name = settings.method
        self.models = Models(weights.family(), **weights.students, device=find_device(weights.device))
        self.method = self.models.load(self.name)
        self._check(settings)

    def edit(self, edit: Edit, settings: Sequence[EditSettings], size: Size) -> Iterator[Edited]:
        """As of a `Session`."""
        resolution = self.models.resolution(self.method)
        height, width = size.height or resolution, size.width or resolution
        images = as_images(opened(edit.image, height, width), height, width).to(self.models.device)
        if defaults_of(self.models.family).get("closed_vocabulary"):
            unknown = unknown_words(self.method.conditioner.tokenizer, edit.source, edit.target)
            warn_of(unknown, self.models.family.model)
        for one in settings:
            cost, guidance = (
                Cost(),
                guided_as_told(self.models.guidance(self.name, self.method), one.guidance_scale, one.tau),
            )
            options = self._options(one, edit, guidance.tau)
            result = self.method.edit(
                images,
                [edit.source],
                [edit.target],
                guidance=guidance,
                seed=one.seed,
                on_step=cost.count,
                **options,
            )
            control = options.pop("control", None)
            about = {"method": self.name, **options, **({} if control is None else vars(control)), "seed": one.seed}
            about |= {"guidance_scale": guidance.guidance_scale, "tau": guidance.tau}
            yield Edited(as_output(result, "pil")[0], about, str(cost))

    def _check(self, settings: EditSettings) -> None:
        """ValueError for settings that the method has not."""
        borrows = isinstance(self.method, Baseline)
        if borrows and settings.swap_tau is not None:
            raise ValueError(f"method {self.name} swaps no prompt: leave out swap_tau")
        if not borrows and settings.control:
            raise ValueError(f"method {self.name} borrows no attention: leave out {', '.join(settings.control)}")

    def _options(self, settings: EditSettings, edit: Edit, tau: float) -> dict[str, Any]:
        """How the method goes about an edit, beside its guidance."""
        if not isinstance(self.method, Baseline):
            return {"swap_tau": tau if settings.swap_tau is None else settings.swap_tau}
        usual = self.method.control or (PromptToPrompt() if settings.control else None)
        return {"control": None if usual is None else borrowed(usual, settings, edit)}


def open_editor(weights: Weights, settings: EditSettings) -> Session | BaselineSession:
    """What edits by the method of these settings."""
    by_pipeline = settings.method in ("icd", "icd_p2p", "icd_swap")
    return Session.open(weights) if by_pipeline else BaselineSession(weights, settings)


def borrowed(usual: PromptToPrompt, settings: EditSettings, edit: Edit) -> PromptToPrompt:
    """What an edit borrows of attention: as usual, by the words that its table names, and before these as told."""
    words = None
    if edit.blended_words is not None:
        words = read_blended(edit.blended_words, edit.source, edit.target, str(edit.image))
    return usual.blending(words).changed(settings.control)


def warn_of(unknown: Sequence[str], model: str) -> None:
    """Say which words the model has never seen, if any."""
    if unknown:
        log.warning("%s does not know: %s; expect nonsense", model, ", ".join(unknown))


def opened(path: str | Path, height: int, width: int) -> Image.Image:
    """A picture, and a line in the log if the pipeline will resize it or cut something off."""
    picture = read_picture(path)
    if picture.size != (width, height):
        size = f"{picture.width} x {picture.height}"
        log.info("%s: of %s pixels the centre, resized to %d x %d", path, size, width, height)
    return picture


def described(command: str, weights: Weights, values: dict[str, Any]) -> dict[str, str]:
    """What a file's metadata say: all it takes to make the file again."""
    about = {"command": f"icd {command}", **vars(weights), **values}
    about["Software"] = f"icd_lightning {__version__}"  # a keyword that the PNG specification knows
    return {key: str(value) for key, value in about.items() if value is not None}


def find_device(name: str) -> torch.device:
    """The device of this name, tried out; ValueError if it cannot be used.

    "auto" is a GPU where there is one, and under torchrun that of this rank.
    """
    if check_device(name) == "auto":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else CPU
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); try auto or cpu") from error
    return torch.device(name)


def save_picture(path: Path, picture: Image.Image, command: str, weights: Weights, values: dict[str, Any]) -> None:
    """Write a PNG that says how it was made."""
    save_png(np.asarray(picture), path, about=described(command, weights, values))


def save_latents(path: Path, latents: Tensor, about: dict[str, str]) -> None:
    """Write latents (B, C, h, w) as safetensors, whole or not at all."""
    data = save({"latents": latents.float().cpu().contiguous()}, metadata=about)
    write_whole(path, lambda temporary: temporary.write_bytes(data))  # safetensors' own writer ignores the umask


def read_latents(file: str) -> tuple[Tensor, dict[str, str]]:
    """Latents (B, C, h, w) and what `save_latents` wrote about them."""
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor("latents"), opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} holds no latents as icd invert writes them ({error})") from error
