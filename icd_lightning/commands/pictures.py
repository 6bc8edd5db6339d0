"""`icd generate | invert | edit`: prompts and pictures in, pictures out.

Importing this module is light, for the sake of `--help`: torch and all that needs it is imported inside the functions,
and not for type checkers either, because jsonargparse would follow them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

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

    icd edit star.png --source "a red star on a blue background" --target "a yellow star on a blue background"

    Args:
        image: Picture of any format and size; its centre is cut out, as large as the model's pictures are.
        source: What the picture shows.
        target: What it shall show.
        output: PNG file to write, with prompts and settings in its metadata; by default photo-edited.png beside
            photo.jpg.
        guidance_scale: How strongly to follow the target prompt, 1 or more; by default the model's own.
        tau: Guide at times t <= tau T only: less keeps more of the picture, 1 guides throughout; by default the
            model's own.
        swap_tau: Follow the source prompt while t > swap_tau T, the target from then on: less keeps more of the layout;
            by default as tau.
        seed: Of the slight noise with which the way to noise begins.
        overwrite: Replace an output that exists.
    """
    from icd_lightning.commands.session import Run, save_image
    from icd_lightning.data.images import read_picture

    picture = read_picture(image)
    path = free(output, beside(image, "edited.png"), overwrite=overwrite)
    session = load(**options)
    session.warn_of_unknown_words(source, target)
    guidance = session.guidance(guidance_scale, tau)
    swap_tau = guidance.tau if swap_tau is None else swap_tau
    images, run = session.fit(picture, image), Run()
    result = session.pipeline.edit(
        images, [source], [target], guidance=guidance, swap_tau=swap_tau, seed=seed, on_step=run.steps.append
    )
    about = {"image": Path(image).name, "source": source, "target": target, "swap_tau": swap_tau, "seed": seed}
    save_image(path, result[0], session.about("edit", guidance, **about))
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

    icd invert star.png --prompt "a large red star on a blue background"

    Args:
        image: Picture of any format and size; its centre is cut out, as large as the model's pictures are.
        prompt: What the picture shows.
        output: File for the noise, which `icd generate --latents` reads, name.safetensors; what comes back goes to
            name-reconstructed.png. By default photo-inverted.safetensors and photo-reconstructed.png beside photo.jpg.
        seed: Of the slight noise with which the way to noise begins.
        overwrite: Replace outputs that exist.
    """
    from icd_lightning.commands.session import Run, save_image, save_latents
    from icd_lightning.data.images import read_picture
    from icd_lightning.editing.method import UNGUIDED
    from icd_lightning.metrics.reconstruction import psnr

    picture = read_picture(image)
    path = free(output, beside(image, "inverted.safetensors"), overwrite=overwrite)
    shown = free(None, beside(output or image, "reconstructed.png"), overwrite=overwrite)
    session = load(**options)
    session.warn_of_unknown_words(prompt)
    about = session.about("invert", UNGUIDED, image=Path(image).name, prompt=prompt, seed=seed)
    images, run = session.fit(picture, image), Run()
    noise = session.pipeline.invert(images, [prompt], seed=seed, on_step=run.steps.append)
    save_latents(path, noise, about)
    log.info("%s: %s", path, run)
    run = Run()
    result = session.pipeline.generate([prompt], noise, on_step=run.steps.append)
    save_image(shown, result[0], about)
    log.info("%s: %s, unguided; PSNR %.2f dB to the picture", shown, run, float(psnr(result, images)))


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
    """Make pictures from prompts, out of fresh noise or that of a picture.

    icd generate "a small red circle on a white background" --count 4

    Args:
        prompts: One or more, each in quotes; by default the one that --latents were inverted with.
        count: Pictures of each prompt.
        latents: Begin with the noise that `icd invert` wrote to this file.
        output: PNG file to write, with prompt and settings in its metadata; several are numbered: name-1.png,
            name-2.png and so on. By default generated.png here, or beside the latents.
        guidance_scale: How strongly to follow the prompt, 1 or more; by default the model's own.
        tau: Guide at times t <= tau T only, 1 guides throughout; by default the model's own.
        seed: Of the noise: picture number i (from 0) has seed + i, and with that seed is the same alone.
        overwrite: Replace outputs that exist.
    """
    from icd_lightning.commands.session import Run, read_latents, save_image
    from icd_lightning.editing.method import seeded_noise

    if count < 1 or (latents is not None and count != 1):
        raise ValueError(f"count {count} must be 1 or more, and cannot be given with --latents, one picture each")
    noise, found = (None, {}) if latents is None else read_latents(latents)
    prompts = prompts or tuple(found[key] for key in ("prompt",) if key in found)
    if not prompts:
        raise ValueError("there is no prompt; write for example: icd generate 'a small red circle'")
    wanted = [prompt for prompt in prompts for _ in range(count if noise is None else len(noise))]
    default = Path("generated.png") if latents is None else beside(latents, "generated.png")
    paths = free_numbered(output, default, len(wanted), overwrite=overwrite)
    session = load(**options)
    session.warn_of_unknown_words(*prompts)
    guidance, shape = session.guidance(guidance_scale, tau), session.noise_shape(len(wanted))
    if noise is not None and noise.shape[1:] != shape[1:]:
        raise ValueError(f"{latents} holds latents of shape {tuple(noise.shape[1:])}; this model's are {shape[1:]}")
    noise = seeded_noise(shape, seed) if noise is None else noise.repeat(len(prompts), 1, 1, 1)
    for start in range(0, len(wanted), BATCH_SIZE):
        part, run = slice(start, start + BATCH_SIZE), Run()
        images = session.pipeline.generate(
            wanted[part], noise[part].to(session.device), guidance=guidance, on_step=run.steps.append
        )
        cost = str(run)
        for i, image in enumerate(images, start):
            drawn = {"seed": seed + i} if latents is None else {"latents": Path(latents).name}
            save_image(paths[i], image, session.about("generate", guidance, prompt=wanted[i], **drawn))
            log.info("%s: %s%s", paths[i], cost, f" for {len(images)} at once" if len(images) > 1 else "")


def load(
    *,
    model: str = "tiny",
    forward: str | None = None,
    reverse: str | None = None,
    boundaries: str | None = None,
    device: str = "auto",
) -> Any:
    """Load a model and its two students.

    Args:
        model: "tiny" (shipped) or a folder in diffusers' layout.
        forward: The forward student, a folder or file of ours or a released one; by default the model's own.
        reverse: The reverse student; by default the model's own.
        boundaries: Ends of the students' segments, e.g. 259,519,779,999; by default what their files say.
        device: auto, cpu, cuda, cuda:1 ...
    """
    from icd_lightning.commands.session import Session

    return Session.open(model, device, forward=forward, reverse=reverse, boundaries=boundaries)


def beside(file: str, ending: str) -> Path:
    """The name of a file made from another: photo.jpg, photo-edited.png."""
    path = Path(file)
    return path.with_name(f"{path.stem}-{ending}")


def free(output: str | None, default: Path, *, overwrite: bool) -> Path:
    """Where to write: nothing is replaced unasked, and the name must say what the file will be."""
    path, suffix = Path(output) if output else default, default.suffix
    if path.suffix.lower() != suffix:
        raise ValueError(f"output {path} will be a {suffix[1:]} file: give it a name that ends in {suffix}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise ValueError(f"{path} exists; name another --output, or replace it by --overwrite")
    return path


def free_numbered(output: str | None, default: Path, count: int, *, overwrite: bool) -> list[Path]:
    """As `free`, for `count` files: one keeps its name, several are numbered from 1."""
    path = Path(output) if output else default
    names = [path] if count == 1 else [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(count)]
    return [free(str(name), default, overwrite=overwrite) for name in names]
