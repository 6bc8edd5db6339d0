"""`icd generate | invert | edit`: prompts and pictures in, pictures out.

Importing this module is light, for the sake of `--help`: torch and all that needs it is imported inside the functions,
after all that can be refused without it, and not for type checkers either, because jsonargparse would follow them.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from icd_lightning.commands.edits import Edit, EditSettings, Size, check_size, parse_grid, several_edits, variants
from icd_lightning.commands.weights import Weights
from icd_lightning.editing.limits import check_seed
from icd_lightning.editing.methods import METHODS
from icd_lightning.files import check_place

log = logging.getLogger(__name__)

MOST_PICTURES = 1_000_000  # of one call
OPTIONAL = ("bitsandbytes", "scipy", "sklearn", "torchao", "torchvision")
BATCH_SIZE = 8  # pictures that `icd generate` decodes at once; each depends on its own prompt and seed alone


def edit(
    image: str,
    *,
    source: str | None = None,
    target: str | None = None,
    output: str | None = None,
    grid: list[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    overwrite: bool = False,
    compile: bool = False,
    **options: Any,
) -> None:
    """Edit a picture, or many: take it to noise with the prompt that describes it, and back with another.

    icd edit star.png --source "a red star on a blue background" --target "a yellow star on a blue background"
    icd edit cat.jpg --source "a cat on a bench" --target "a dog on a bench" -o dog.png --model SD15_FOLDER \\
      --guided_unet sd15_cfg_distill.pt --forward iCD-SD15-forward_19_259_519_779.safetensors \\
      --reverse iCD-SD15-reverse_259_519_779_999.safetensors
    icd edit cat.jpg --source "a cat" --target "a dog" --method icd_p2p --cross 0.4 --self 0.6 --blend "cat dog"
    icd edit cat.jpg --source "a cat" --target "a dog" --grid tau=0.6,0.7,0.8 cross=0.2,0.4
    icd edit edits.csv -o results       a row for each edit: image, source, target and, if you like, output
    icd edit photos --source "a photo" --target "a watercolour painting"

    Of many, those whose outputs exist are left out, and one that fails stops no other: call it again to go on.

    Args:
        image: Picture of any format and size, a folder of pictures, or a CSV file with columns image, source and target
            (and output, and blended_words), or the table of edits of the paper's code. The centre of a picture is cut
            out, as large as the model's pictures are.
        source: What the picture shows; sdedit needs none.
        target: What it shall show.
        output: (-o) PNG file to write, with prompts and settings in its metadata; by default photo-edited.png beside
            photo.jpg, or photo-grid.png. Of many edits a folder; by default NAME-edited beside folder or file.
        grid: Try values, all combinations, and draw them as a sheet with labels, as in tau=0.6,0.8 cross=0.2,0.4.
        height: Pixels of the result; by default the model's.
        width: Pixels of the result; by default the model's.
        overwrite: Replace outputs that exist.
        compile: Run the networks through torch.compile: minutes for the first edit of each kind and size. For many
            edits on a GPU.
    """
    from icd_lightning.data.images import read_picture

    settings, size, place = EditSettings(**options), check_size(height, width), Path(image)
    if place.is_dir() or place.suffix.lower() == ".csv":
        if grid:
            raise ValueError("grid is of one picture: leave it out, or name a picture")
        edit_many(several_edits(place, source, target, output), settings, size, overwrite=overwrite, compiled=compile)
        return
    values = parse_grid(grid or [])
    cells = variants(settings, values)
    original = read_picture(place)
    (path,) = free(output, beside(image, "grid.png" if grid else "edited.png"), overwrite=overwrite)
    one = Edit(place, source or "", target or "", path)
    one.check(cells[0])
    with light(settings.method):
        from icd_lightning.commands.session import open_editor, save_result

        editor = open_editor(cells[0], compiled=compile)
    results, abouts, costs = zip(*editor.edit(one, cells, size), strict=True)
    about = {**one.about, **abouts[0]}
    if not grid:
        save_result(path, results[0], "edit", settings, about)
        log.info("%s: %s", path, costs[0])
        return
    from icd_lightning.evaluation.report.sheet import contact_sheet

    sheet = contact_sheet(original, (one.source, one.target), values, results, name=place.name)
    save_result(path, sheet, "edit", settings, {**about, "grid": " ".join(grid)})
    for cell, cost in zip(cells, costs, strict=True):
        log.info("%s: %s", ", ".join(f"{key} {getattr(cell, key):g}" for key in values), cost)
    log.info("%s", path)


def edit_many(edits: list[Edit], settings: EditSettings, size: Size, *, overwrite: bool, compiled: bool) -> None:
    """Make the edits whose outputs are not there; report those that fail, and raise ValueError at the end."""
    todo = [edit for edit in edits if overwrite or not edit.output.exists()]
    if len(todo) < len(edits):
        log.info("%d of %d outputs are there and kept; --overwrite replaces them", len(edits) - len(todo), len(edits))
    failures: list[str] = []
    fitting = []
    for number, edit in enumerate(todo, 1):
        with reported(f"{number}/{len(todo)} {edit.image}", failures):
            edit.check(settings)
            fitting.append((f"{number}/{len(todo)}", edit))
    if fitting:
        with light(settings.method):
            from icd_lightning.commands.session import open_editor, save_result

            editor = open_editor(settings, compiled=compiled)
        for number, edit in fitting:
            with reported(f"{number} {edit.image}", failures):
                result, about, cost = next(editor.edit(edit, [settings], size))
                save_result(edit.output, result, "edit", settings, {**edit.about, **about})
                log.info("%s %s: %s", number, edit.output, cost)
    if failures:
        raise ValueError(f"{len(failures)} of {len(todo)} edits failed, the first: {failures[0]}")


@contextmanager
def reported(name: str, failures: list[str]) -> Iterator[None]:
    """Log what is wrong with one of many, and go on with the next."""
    try:
        yield
    except (ValueError, OSError) as error:
        failures.append(str(error))
        log.error("%s: %s", name, error)


def invert(
    image: str,
    *,
    prompt: str,
    output: str | None = None,
    height: int | None = None,
    width: int | None = None,
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
        height: Pixels of the picture; by default the model's.
        width: Pixels of the picture; by default the model's.
        seed: Of the slight noise with which the way to noise begins.
        overwrite: Replace outputs that exist.
    """
    from icd_lightning.data.images import read_picture

    check_seed(seed)
    size, weights = check_size(height, width), Weights(**options)
    read_picture(image)
    (path,) = free(output, beside(image, "inverted.safetensors"), overwrite=overwrite)
    (shown,) = free(None, beside(output or image, "reconstructed.png"), overwrite=overwrite)
    with light():
        from icd_lightning.commands.session import Session, save_result
        from icd_lightning.editing.method import UNGUIDED

        session = Session(weights)
    about = {"image": Path(image).name, "prompt": prompt, "seed": seed, **session.about(UNGUIDED)}
    noise, cost = session.invert(image, prompt, seed, size)
    save_result(path, noise, "invert", weights, about)
    log.info("%s: %s", path, cost)
    back, cost, quality = session.reconstruct(image, prompt, noise)
    save_result(shown, back, "invert", weights, about)
    log.info("%s: %s, unguided; PSNR %.2f dB to the picture", shown, cost, quality)


def generate(
    *prompts: str,
    count: int = 1,
    latents: str | None = None,
    output: str | None = None,
    guidance_scale: float | None = None,
    tau: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Make pictures from prompts, out of fresh noise or that of a picture.

    icd generate "a small red circle on a white background" --count 4
    icd generate "a dog on a bench" --latents cat-inverted.safetensors -o dog.png

    Args:
        prompts: One or more, each in quotes; by default the one that --latents were inverted with.
        count: Pictures of each prompt.
        latents: Begin with the noise that `icd invert` wrote to this file.
        output: PNG file to write, with prompt and settings in its metadata; several are numbered: name-1.png,
            name-2.png and so on. By default generated.png here, or beside the latents.
        guidance_scale: How strongly to follow the prompt, 1 or more; by default the model's own.
        tau: Guide at times t <= tau T only, 1 guides throughout; by default the model's own.
        height: Pixels of the picture; by default the model's. Not with latents, which have a size.
        width: Pixels of the picture; by default the model's.
        seed: Of the noise, by default 0: picture number i (from 0) has seed + i, and with that seed is the same alone.
            Not with latents, which are the noise.
        overwrite: Replace outputs that exist.
    """
    settings = EditSettings(guidance_scale=guidance_scale, tau=tau, seed=seed or 0)
    size, weights = check_size(height, width), Weights(**options)
    if count < 1 or (latents is not None and count != 1):
        raise ValueError(f"count {count} must be 1 or more, and cannot be given with --latents, one picture each")
    if latents is None and not prompts:
        raise ValueError("there is no prompt; write for example: icd generate 'a small red circle'")
    if latents is not None and not Path(latents).is_file():
        raise ValueError(f"there are no latents at {latents}; icd invert writes them")
    if latents is not None and (height or width or seed is not None):
        raise ValueError("latents are noise of one size: leave out height, width and seed")
    inverted, default = None, Path("generated.png")
    if latents is not None:
        with light():
            from icd_lightning.commands.session import read_latents
        inverted, written = read_latents(latents)
        prompts = prompts or tuple(filter(None, [written.get("prompt")]))
        if not prompts:
            raise ValueError(f"{latents} does not say its prompt: give one")
        count, default = len(inverted), beside(latents, "generated.png")
    if count * len(prompts) > MOST_PICTURES:
        raise ValueError(f"count {count} makes more than {MOST_PICTURES:,} pictures: give a smaller one")
    wanted = [prompt for prompt in prompts for _ in range(count)]
    paths = free(output, default, len(wanted), overwrite=overwrite)
    with light():
        from icd_lightning.commands.session import Session, save_result

        session = Session(weights)
    session.warn_of_unknown_words(*prompts)
    for start in range(0, len(wanted), BATCH_SIZE):
        numbers = range(start, min(start + BATCH_SIZE, len(wanted)))
        seeds = [settings.seed + i for i in numbers]
        noise = session.noise(seeds, size) if inverted is None else inverted[[i % count for i in numbers]]
        made = session.generate([wanted[i] for i in numbers], noise, settings)
        for i, (picture, about, cost) in zip(numbers, made, strict=True):
            drawn = {"seed": settings.seed + i} if latents is None else {"latents": Path(latents).name}
            save_result(paths[i], picture, "generate", weights, {"prompt": wanted[i], **drawn, **about})
            log.info("%s: %s", paths[i], cost)


@contextmanager
def light(method: str = "icd") -> Iterator[None]:
    """Import, and load a method of ours, as if what our libraries use only where it is installed were not.

    They load all of it with themselves, for seconds, and no method of ours needs it. Nor is garbage looked for among
    what is imported, now or at the process's end, since it stays: that is a quarter of the time of a small edit.
    """
    hidden = [name for name in OPTIONAL if name not in sys.modules and method in METHODS.own]
    collects, imported = gc.isenabled(), len(sys.modules)
    sys.modules.update(dict.fromkeys(hidden))  # None: not to be found
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        for name in hidden:
            del sys.modules[name]
        if len(sys.modules) > imported:  # else a later call's garbage would be kept for good
            gc.freeze()


def beside(file: str, ending: str) -> Path:
    """The name of a file made from another: photo.jpg, photo-edited.png."""
    path = Path(file)
    return path.with_name(f"{path.stem}-{ending}")


def free(output: str | None, default: Path, count: int = 1, *, overwrite: bool) -> list[Path]:
    """Where to write: nothing is replaced unasked, and the name must say what the file will be.

    One file keeps its name, several are numbered from 1.
    """
    path, suffix = Path(output) if output else default, default.suffix
    if path.suffix.lower() != suffix:
        raise ValueError(f"output {path} will be a {suffix[1:]} file: give it a name that ends in {suffix}")
    paths = [path] if count == 1 else [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(count)]
    if taken := next((path for path in paths if path.is_dir() or (path.exists() and not overwrite)), None):
        raise ValueError(f"{taken} exists; name another --output, or replace it by --overwrite")
    check_place(path)
    return paths
