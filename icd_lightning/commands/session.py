"""What `icd generate | invert | edit` share: networks ready to run, files read and written, costs counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from icd_lightning import __version__
from icd_lightning.commands.edits import Edit, EditSettings, Size
from icd_lightning.commands.weights import Weights
from icd_lightning.data.images import read_picture, save_png
from icd_lightning.diffusion import StepGuidance
from icd_lightning.editing.baselines.base import Baseline
from icd_lightning.editing.consistency import AttentionControlled, InvertibleConsistency
from icd_lightning.editing.defaults import defaults_of, edits_by_attention
from icd_lightning.editing.injection import usual_control
from icd_lightning.editing.method import Clock, EditingMethod, seeded_noise
from icd_lightning.editing.methods import class_of
from icd_lightning.editing.pictures import as_images, as_output
from icd_lightning.evaluation.examples import read_blended
from icd_lightning.evaluation.methods import guided_as_told
from icd_lightning.files import write_whole
from icd_lightning.models.diffusion_model import compile_networks
from icd_lightning.models.text import unknown_words
from icd_lightning.texts import check_prompt

log = logging.getLogger(__name__)


BORROWING = (Baseline, AttentionControlled)  # methods that borrow attention, and swap no prompt

Made = tuple[Image.Image, dict[str, Any], str]  # a picture, the settings that made it, and what it cost


class Session:
    """A method on its device; `icd generate` and `icd invert` run on iCD's students as they are."""

    def __init__(self, weights: Weights, method: str = "icd_swap") -> None:
        self.models = weights.models()
        if method == "icd":
            method = "icd_p2p" if edits_by_attention(self.models.family) else "icd_swap"
        self.name, self.method = method, self.models.load(method)
        self._inverted: tuple[object, dict[int, Tensor]] = (None, {})  # the latest picture's noise, by seeds

    def warn_of_unknown_words(self, *prompts: str) -> None:
        """Say which words a family with a closed vocabulary has never seen."""
        for prompt in prompts:
            check_prompt(prompt)
        closed = defaults_of(self.models.family).get("closed_vocabulary")
        if closed and (unknown := unknown_words(self.method.conditioner.tokenizer, *prompts)):
            log.warning("%s does not know: %s; expect nonsense", self.models.family.model, ", ".join(unknown))

    def size(self, wanted: Size) -> tuple[int, int]:
        """Height and width of the pictures, by default the model's own; ValueError for what they cannot have."""
        usual = self.models.family.resolution
        height, width = (side or usual for side in wanted)
        self.method.latent_shape(1, height, width)
        return height, width

    def guidance(self, settings: EditSettings, *, edit: bool = False) -> StepGuidance:
        own = self.models.guidance(self.name, self.method, edit=edit)
        return guided_as_told(own, settings.guidance_scale, settings.tau)

    def edit(self, edit: Edit, settings: Sequence[EditSettings], size: Size) -> Iterator[Made]:
        """One picture, with each of the settings in turn; where it becomes noise, edits of one seed share the way.

        So do those of the next call, if it is of the same pixels and source prompt.
        """
        images = self.images(edit.image, size)
        self.warn_of_unknown_words(edit.source, edit.target)
        prompts = [edit.source], [edit.target]
        if self._inverted[0] != (shown := (images.cpu().numpy().tobytes(), edit.source, size)):
            self._inverted = (shown, {})
        inverted = self._inverted[1]
        for one in settings:
            clock, guidance = Clock(self.models.device), self.guidance(one, edit=True)
            options = self._options(one, edit, guidance)
            about = dict(vars(options["control"]) if "control" in options else options)
            if isinstance(self.method, EditingMethod):
                if one.seed not in inverted:
                    inverted[one.seed] = self.method.invert(images, prompts[0], seed=one.seed, on_step=clock.count)
                options["noise"] = inverted[one.seed]
            options |= {"guidance": guidance, "seed": one.seed, "on_step": clock.count}
            result = self.method.edit(images, *prompts, **options)
            about |= {"method": self.name, "seed": one.seed, **self.about(guidance)}
            yield as_output(result, "pil")[0], about, spent(clock)

    def _options(self, settings: EditSettings, edit: Edit, guidance: StepGuidance) -> dict[str, Any]:
        if not isinstance(self.method, BORROWING):
            return {"swap_tau": guidance.tau if settings.swap_tau is None else settings.swap_tau}
        usual = self.method.control or (usual_control(self.method.network) if settings.control else None)
        if usual is None:
            return {}
        if edit.blended_words is not None:
            words = read_blended(edit.blended_words, edit.source, edit.target, str(edit.image))
            usual = usual.blending(words)
        return {"control": usual.changed(settings.control)}

    def images(self, image: str | Path, size: Size) -> Tensor:
        """A picture (1, 3, height, width) on the device; the log says if it is resized or something is cut off."""
        height, width = self.size(size)
        picture = read_picture(image)
        if picture.size != (width, height):
            log.info("%s: of %d x %d pixels the centre, resized to %d x %d", image, *picture.size, width, height)
        return as_images(picture, height, width).to(self.models.device)

    def invert(self, image: str, prompt: str, seed: int, size: Size) -> tuple[Tensor, str]:
        """A picture to noise (1, C, h, w), and what that cost."""
        images, clock = self.images(image, size), Clock(self.models.device)
        self.warn_of_unknown_words(prompt)
        noise = self.method.invert(images, [prompt], seed=seed, on_step=clock.count)
        return noise, spent(clock)

    def reconstruct(self, image: str, prompt: str, noise: Tensor) -> tuple[Image.Image, str, float]:
        """Noise (1, C, h, w) to a picture, unguided; what that cost, and its PSNR to the one that it was."""
        from icd_lightning.metrics.reconstruction import psnr  # with torchmetrics, which takes a second

        clock = Clock(self.models.device)
        back = self.method.generate([prompt], noise, on_step=clock.count)
        cost, picture = spent(clock), as_output(back, "pil")[0]
        images = as_images(read_picture(image), *back.shape[-2:]).to(back.device)
        return picture, cost, float(psnr(back, images))

    def noise(self, seeds: Sequence[int], size: Size) -> Tensor:
        """Noise (B, C, h, w) of these seeds."""
        return seeded_noise(self.method.latent_shape(len(seeds), *self.size(size)), seeds)

    def generate(self, prompts: list[str], noise: Tensor, settings: EditSettings) -> Iterator[Made]:
        """A picture of each noise (B, C, h, w); what one cost is said of all."""
        clock, guidance = Clock(self.models.device), self.guidance(settings)
        images = self.method.generate(prompts, noise.to(self.models.device), guidance=guidance, on_step=clock.count)
        cost = spent(clock) + (f" for {len(prompts)} at once" if len(prompts) > 1 else "")
        for picture in as_output(images, "pil"):
            yield picture, self.about(guidance), cost

    def about(self, guidance: StepGuidance) -> dict[str, Any]:
        """For a file's metadata: the guidance, and the students' boundaries as `--boundaries` takes them."""
        told: dict[str, Any] = {"guidance_scale": guidance.guidance_scale, "tau": guidance.tau}
        if isinstance(self.method, InvertibleConsistency):
            told["boundaries"] = ",".join(map(str, self.method.boundaries.boundary_timesteps))
        return told


def open_editor(settings: EditSettings, *, compiled: bool = False) -> Session:
    """A session of the settings' method, its networks compiled or not; ValueError for settings that it has not."""
    family = settings.family()
    borrows = issubclass(class_of(settings.method, family), BORROWING)
    if borrows and settings.swap_tau is not None:
        raise ValueError(f"method {settings.method} swaps no prompt: leave out swap_tau, or take icd_swap")
    if not borrows and settings.control:
        given = ", ".join(settings.control)
        raise ValueError(f"method {settings.method} borrows no attention: leave out {given}, or take icd_p2p")
    if settings.control:
        usual_control(family.hollow_network()).changed(settings.control)
    session = Session(settings, settings.method)
    if compiled:
        compile_networks(session.method.networks(), session.models.device)
    return session


def spent(clock: Clock) -> str:
    return f"{clock.nfe} evaluations, {clock.seconds():.2f} s"


def save_result(
    path: Path, result: Image.Image | Tensor, command: str, weights: Weights, values: dict[str, Any]
) -> None:
    """Write a picture as PNG, or latents (B, C, h, w) as safetensors, with all it takes to make the file again."""
    about = {"command": f"icd {command}", **weights.about, **values}
    about["Software"] = f"icd_lightning {__version__}"  # a keyword that the PNG specification knows
    about = {key: str(value) for key, value in about.items() if value is not None}
    if isinstance(result, Image.Image):
        save_png(np.asarray(result), path, about=about)
        return
    data = save({"latents": result.float().cpu().contiguous()}, metadata=about)
    write_whole(path, lambda temporary: temporary.write_bytes(data))  # safetensors' own writer ignores the umask


def read_latents(file: str) -> tuple[Tensor, dict[str, str]]:
    """Latents (B, C, h, w) and what `save_result` wrote about them."""
    try:
        with safe_open(file, framework="pt") as opened:
            latents, about = opened.get_tensor("latents"), opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} holds no latents as icd invert writes them ({error})") from error
    if latents.ndim != 4 or not latents.numel() or not latents.isfinite().all():
        raise ValueError(f"{file} holds no latents as icd invert writes them ({tuple(latents.shape)}): invert again")
    return latents, about
