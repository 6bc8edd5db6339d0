"""`icd generate | invert | edit`: prompts and pictures in, pictures out."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from icd_lightning.diffusion import Step, StepGuidance
    from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline

log = logging.getLogger(__name__)

BATCH_SIZE = 8
"""Pictures that `icd generate` decodes at once; each depends on its own prompt and seed alone."""


def edit(
    image: str,
    *,
    source: str,
    target: str,
    output: str | None = None,
    guidance_scale: float | None = None,
    tau: float | None = None,
    swap_tau: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Edit a picture: take it to noise with the prompt that describes it, and back with another.

    icd edit photo.jpg --source "a cat on a bench" --target "a dog on a bench"

    Args:
        image: Picture in any format and size; its centre is cut out, as large as the model's pictures are.
        source: What the picture shows.
        target: What it shall show.
        output: PNG file to write, with prompts and settings in its metadata; by default photo-edited.png beside
            photo.jpg.
        guidance_scale: How strongly to follow the target prompt, 1 or more; by default the model's own.
        tau: Guide at times t <= tau T only: less changes more freely, 1 guides throughout; by default the model's own.
        swap_tau: Follow the source prompt while t > swap_tau T, the target from then on: less keeps more of the layout;
            by default as tau.
        seed: Of the slight noise with which the way to noise begins.
        overwrite: Replace an output that exists.
    """
    picture = _read(image)
    path = _free(output, _beside(image, "edited.png"), overwrite=overwrite)
    session = load(**options)
    guidance = session.guidance(guidance_scale, tau)
    swap_tau = guidance.tau if swap_tau is None else swap_tau
    images, run = session.fit(picture, image), Run()
    result = session.pipeline.edit(
        images, [source], [target], guidance=guidance, swap_tau=swap_tau, seed=seed, on_step=run.steps.append
    )
    about = {"image": Path(image).name, "source": source, "target": target, "swap_tau": swap_tau, "seed": seed}
    _save(path, result[0], session.about("edit", guidance, **about))
    log.info("%s: %s", path, run)


def invert(
    image: str,
    *,
    prompt: str,
    output: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Take a picture to noise, write that, and decode it again to show what comes back.

    icd invert photo.jpg --prompt "a cat on a bench"

    Args:
        image: Picture in any format and size; its centre is cut out, as large as the model's pictures are.
        prompt: What the picture shows.
        output: File for the noise, which `icd generate --latents` reads; the reconstruction goes beside it, as .png. By
            default photo-inverted.safetensors and photo-inverted.png beside photo.jpg.
        seed: Of the slight noise with which the way to noise begins.
        overwrite: Replace outputs that exist.
    """
    from safetensors.torch import save_file

    from icd_lightning.data.images import write_whole
    from icd_lightning.editing.method import UNGUIDED
    from icd_lightning.metrics.reconstruction import psnr

    picture = _read(image)
    path = _free(output, _beside(image, "inverted.safetensors"), overwrite=overwrite)
    shown = _free(None, path.with_suffix(".png"), overwrite=overwrite)
    session = load(**options)
    images, run = session.fit(picture, image), Run()
    noise = session.pipeline.invert(images, [prompt], seed=seed, on_step=run.steps.append)
    about = session.about("invert", UNGUIDED, image=Path(image).name, prompt=prompt, seed=seed)
    tensors = {"latents": noise.float().cpu().contiguous()}
    write_whole(path, lambda file: save_file(tensors, file, metadata={k: str(v) for k, v in about.items()}))
    log.info("%s: %s", path, run)
    run = Run()
    result = session.pipeline.generate([prompt], noise, on_step=run.steps.append)
    _save(shown, result[0], about)
    log.info("%s: %s, PSNR %.2f dB to the picture, unguided", shown, run, float(psnr(result, images)))


def generate(
    *prompts: str,
    count: int = 1,
    latents: str | None = None,
    output: str | None = None,
    guidance_scale: float | None = None,
    tau: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Make pictures from prompts, from fresh noise or from that of a picture.

    icd generate "a small red circle on a white background" --count 4

    Args:
        prompts: One or more, each in quotes; with --latents, by default the prompt that they were inverted with.
        count: Pictures of each prompt.
        latents: Begin with the noise that `icd invert` wrote to this file.
        output: PNG file to write, with prompt and settings in its metadata; several are numbered, name-1.png, name-2.png
            and so on. By default generated.png here, or beside the latents.
        guidance_scale: How strongly to follow the prompt, 1 or more; by default the model's own.
        tau: Guide at times t <= tau T only: less is more varied, 1 guides throughout; by default the model's own.
        seed: Of the noise; picture number i has seed + i, and is the same alone.
        overwrite: Replace outputs that exist.
    """
    from icd_lightning.editing.method import seeded_noise

    if count < 1 or (latents is not None and count != 1):
        raise ValueError(f"count {count} must be 1 or more, and is not for --latents, which bring their own noise")
    inverted, found = (None, {}) if latents is None else _read_latents(latents)
    prompts = prompts or ((found["prompt"],) if "prompt" in found else ())
    if not prompts:
        raise ValueError("there is no prompt; write for example: icd generate 'a small red circle'")
    each = count if inverted is None else len(inverted)
    wanted = [prompt for prompt in prompts for _ in range(each)]
    default = Path("generated.png") if latents is None else _beside(latents, "generated.png")
    paths = _numbered(output, default, len(wanted), overwrite=overwrite)
    session = load(**options)
    guidance, pipeline = session.guidance(guidance_scale, tau), session.pipeline
    shape = pipeline.latent_shape(len(wanted), pipeline.resolution, pipeline.resolution)
    if inverted is None:
        noise = seeded_noise(shape, seed)
    elif inverted.shape[1:] == shape[1:]:
        noise = inverted.repeat(len(prompts), 1, 1, 1)
    else:
        raise ValueError(f"{latents} holds latents {tuple(inverted.shape[1:])}; this model's are {shape[1:]}")
    for start in range(0, len(wanted), BATCH_SIZE):
        part, run = slice(start, start + BATCH_SIZE), Run()
        on_device = noise[part].to(session.device)
        results = pipeline.generate(wanted[part], on_device, guidance=guidance, on_step=run.steps.append)
        cost = str(run)
        for i, result in enumerate(results, start):
            drawn = {"seed": seed + i} if latents is None else {"latents": Path(latents).name}
            _save(paths[i], result, session.about("generate", guidance, prompt=wanted[i], **drawn))
            log.info("%s: %s", paths[i], cost)


def load(
    *,
    model: str = "tiny",
    forward: str | None = None,
    reverse: str | None = None,
    boundaries: str | None = None,
    device: str = "auto",
) -> Session:
    """Load a model and its two students.

    Args:
        model: "tiny" (shipped) or a folder in diffusers' layout.
        forward: The forward student, a folder or file of ours or a released one; by default the model's own.
        reverse: The reverse student; by default the model's own.
        boundaries: Ends of the students' segments, e.g. 259,519,779,999; by default what their files say.
        device: auto, cpu, cuda, cuda:1 ...
    """
    from icd_lightning import __version__
    from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
    from icd_lightning.models.family import Family

    place, family = _device(device), Family(model)
    defaults = family.load_defaults()
    pipeline = InvertibleConsistencyPipeline.from_pretrained(
        family, forward=forward, reverse=reverse, boundaries=boundaries
    )
    ends = ",".join(map(str, pipeline.boundaries.boundary_timesteps))
    settings = {"model": model, "forward": forward, "reverse": reverse, "boundaries": ends}
    settings["Software"] = f"icd_lightning {__version__}"
    return Session(pipeline.to(place), place, (defaults.guidance_scale, defaults.tau), settings)


@dataclass(frozen=True)
class Session:
    """Loaded networks, with the guidance scale and tau that suit them, and what was asked for to get them."""

    pipeline: InvertibleConsistencyPipeline
    device: torch.device
    defaults: tuple[float, float]
    settings: dict[str, Any]

    def guidance(self, guidance_scale: float | None, tau: float | None) -> StepGuidance:
        """Dynamic guidance; None is the model's default."""
        from icd_lightning.diffusion import StepGuidance

        scale = self.defaults[0] if guidance_scale is None else guidance_scale
        if not 1 <= scale < float("inf"):
            raise ValueError(f"guidance_scale {scale} must be 1 (unguided) or more")
        return StepGuidance(scale, self.defaults[1] if tau is None else tau)

    def fit(self, picture: Image.Image, name: str) -> torch.Tensor:
        """The picture's centre as an image (1, 3, R, R) on the device."""
        import numpy as np

        from icd_lightning.data.images import resize_and_crop, to_images

        resolution = self.pipeline.resolution
        cut, _ = resize_and_crop(picture, resolution)
        if picture.size != cut.size:
            size = f"{picture.width} x {picture.height}"
            log.info("%s: of %s pixels the centre, resized to %d x %d", name, size, resolution, resolution)
        return to_images([np.asarray(cut)]).to(self.device)

    def about(self, command: str, guidance: StepGuidance, **values: Any) -> dict[str, Any]:
        """What a file's metadata say: all it takes to make the file again."""
        guided = {"guidance_scale": guidance.guidance_scale, "tau": guidance.tau}
        both = {"command": f"icd {command}", **values, **guided, **self.settings}
        return {key: value for key, value in both.items() if value is not None}


@dataclass
class Run:
    """The steps of one run of networks, and when it began."""

    steps: list[Step] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    def __str__(self) -> str:
        return f"{sum(step.nfe for step in self.steps)} evaluations, {time.perf_counter() - self.start:.2f} s"


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); try auto or cpu") from error
    return torch.device(name)


def _read(image: str) -> Image.Image:
    from icd_lightning.data.images import read_picture

    return read_picture(image)


def _read_latents(file: str) -> tuple[torch.Tensor, dict[str, str]]:
    """Noise (B, C, h, w) and its metadata, as `icd invert` wrote them."""
    from safetensors import SafetensorError, safe_open

    if not Path(file).is_file():
        raise ValueError(f"there are no latents at {file}; icd invert writes them")
    try:
        with safe_open(file, framework="pt") as opened:
            found, about = opened.get_tensor("latents"), opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} holds no latents as icd invert writes them ({error})") from error
    return found, about


def _beside(file: str, ending: str) -> Path:
    path = Path(file)
    return path.with_name(f"{path.stem}-{ending}")


def _free(output: str | None, default: Path, *, overwrite: bool) -> Path:
    """Where to write: nothing is replaced unasked, and the name says what the file will be."""
    path = Path(output) if output else default
    if path.suffix.lower() != default.suffix:
        raise ValueError(
            f"output {path} will be a {default.suffix[1:]} file: give it a name that ends in {default.suffix}"
        )
    if path.is_dir() or (path.exists() and not overwrite):
        raise ValueError(f"{path} exists; name another --output, or replace it by --overwrite")
    return path


def _numbered(output: str | None, default: Path, count: int, *, overwrite: bool) -> list[Path]:
    path = Path(output) if output else default
    names = [path] if count == 1 else [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(count)]
    return [_free(str(name), default, overwrite=overwrite) for name in names]


def _save(path: Path, image: torch.Tensor, about: dict[str, Any]) -> None:
    """Write an image (3, H, W) as PNG."""
    from icd_lightning.data.images import save_png, to_pictures

    save_png(to_pictures(image[None])[0], path, about=about)
