"""What `icd edit` is asked for, read and checked before torch is loaded: a mistake is answered at once."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from icd_lightning.commands.weights import Weights
from icd_lightning.editing.limits import (
    SHORT_NAMES,
    Injection,
    PromptToPrompt,
    check_fraction,
    check_guidance_scale,
    check_seed,
    read_blend,
    read_factors,
)
from icd_lightning.editing.methods import METHODS, class_of
from icd_lightning.files import check_place
from icd_lightning.texts import csv_rows

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class EditSettings(Weights):
    """How to edit, and with which weights; ValueError for what contradicts itself.

    Args:
        method: How: icd; icd_p2p or icd_swap, by Prompt-to-Prompt or by swapping the prompt, whatever the model's
            default is; one of the baselines ddim, ddim_dynamic, ddim_p2p, nti, nti_pie, npi, npi_pie, pnp_inversion,
            edit_friendly, infedit, renoise_turbo, renoise_sdxl, renoise_lcm, sdedit; of flow models flowedit,
            rf_solver_edit, fireflow, rf_inversion, uniedit_flow; one of them otherwise set, by a YAML file as in
            conf/method; or the path of a class, my_package.MyBaseline.
        guidance_scale: How strongly to follow the target prompt, 1 or more; by default the model's own.
        tau: Guide at times t <= tau T only: less keeps more of the picture, 1 guides throughout; by default the
            model's own.
        swap_tau: Follow the source prompt while t > swap_tau T, the target from then on: less keeps more of the layout;
            by default as tau. Of edits without attention control.
        cross_replace: (--cross) Share of the steps with the source's cross-attention: more keeps more of the layout.
            This and the next six ask for attention control.
        self_replace: (--self) Share of the steps with the source's self-attention: more keeps more of the shapes.
        amplify: Factor of the attention to the target's new words, 1 leaves it alone; or those of any of its words, as
            in "lego=3 red=0".
        blend: Keep the picture outside of these two words' attention, one of the source and one of the target, as in
            "cat dog"; none blends nothing. By default the words that differ.
        alignment: Pair words one by one (replace) or by what the prompts have in common (refine); auto replaces where
            both have as many words.
        blend_threshold: Attended to is what has more than this share of the strongest attention.
        blend_from: Share of the steps after which blending begins.
        inject: Share of the steps with the source's keys and values, where the network is a transformer (FLUX, SD3):
            more keeps more of the picture. This and the next two ask for attention control.
        blocks_from: These are shared in blocks from this part of the transformer's depth, 0 to 1, on.
        blocks_to: And up to this one.
        seed: Of the slight noise with which the way to noise begins.
    """

    method: str = "icd"
    guidance_scale: float | None = None
    tau: float | None = None
    swap_tau: float | None = None
    cross_replace: float | None = None
    self_replace: float | None = None
    amplify: float | str | None = None
    blend: str | None = None
    alignment: str | None = None
    blend_threshold: float | None = None
    blend_from: float | None = None
    inject: float | None = None
    blocks_from: float | None = None
    blocks_to: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_scale is not None:
            check_guidance_scale(self.guidance_scale)
        for name in ("tau", "swap_tau"):
            if (value := getattr(self, name)) is not None:
                check_fraction(value, name)
        check_seed(self.seed)
        given = self.control
        check_control(given)
        if given and self.swap_tau is not None:
            raise ValueError(f"swap_tau is of edits without {', '.join(given)}: leave out one or the other")
        named = self.method.lower().replace("-", "_")
        if named == "icd" and (given or self.swap_tau is not None):
            named = "icd_p2p" if given else "icd_swap"  # they ask for this way
        if named in METHODS:
            object.__setattr__(self, "method", named)
        METHODS.find(self.method)

    @property
    def control(self) -> dict[str, Any]:
        names = {field.name: None for kind in (PromptToPrompt, Injection) for field in fields(kind)}
        given = {name: value for name in names if (value := getattr(self, name, None)) is not None}
        readers = {"amplify": read_factors, "blend": read_blend}
        return {name: readers[name](value) if name in readers else value for name, value in given.items()}


def check_control(told: dict[str, Any]) -> None:
    """ValueError for settings that no attention control has together, or for values that it cannot have."""
    kinds = [kind for kind in (PromptToPrompt, Injection) if told.keys() <= {field.name for field in fields(kind)}]
    if not kinds:
        raise ValueError(f"{', '.join(told)}: some are for a UNet's attention, some for a transformer's; give one kind")
    kinds[0](**told)


MOST_PIXELS = 1 << 16  # of a side

Size = tuple[int | None, int | None]  # height and width of the result in pixels; None is the model's own


def check_size(height: int | None, width: int | None) -> Size:
    """The size, or ValueError."""
    for name, value in (("height", height), ("width", width)):
        if value is not None and not 1 <= value <= MOST_PIXELS:
            raise ValueError(f"{name} {value} must be 1 or more, and at most {MOST_PIXELS}")
    return height, width


GRID_KEYS = {"w": "guidance_scale", **SHORT_NAMES} | {
    field.name: field.name
    for field in fields(EditSettings)[len(fields(Weights)) :]
    if field.name not in ("method", "blend", "alignment")
}
"""What a grid may vary, by its names on the command line."""


def parse_grid(words: Sequence[str]) -> dict[str, list[float]]:
    """Read `tau=0.6,0.7 cross=0.2,0.4`; ValueError for what is no setting or no number."""
    grid: dict[str, list[float]] = {}
    for word in words:
        key, _, values = word.partition("=")
        name = GRID_KEYS.get(key.replace("-", "_"))
        if name is None:
            raise ValueError(f"grid {word!r} must be NAME=VALUE,VALUE ..., NAME one of {', '.join(GRID_KEYS)}")
        if name in grid:
            raise ValueError(f"grid varies {key} twice: give all its values at once")
        try:
            grid[name] = [int(value) if name == "seed" else float(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"grid {word!r}: {values!r} are not numbers separated by commas") from None
    return grid


def variants(settings: EditSettings, grid: dict[str, list[float]]) -> list[EditSettings]:
    keys = list(grid)[::-1]
    cells = itertools.product(*(grid[key] for key in keys))
    return [replace(settings, **dict(zip(keys, cell, strict=True))) for cell in cells]


@dataclass(frozen=True)
class Edit:
    """One picture to edit: what it shows, what it shall show, where that goes.

    blended_words: by which words of both prompts it blends, as a table says it, "" for none; None: nobody says.
    """

    image: Path
    source: str
    target: str
    output: Path
    blended_words: str | None = None

    @property
    def about(self) -> dict[str, str]:
        return {"image": self.image.name, "source": self.source, "target": self.target}

    def check(self, settings: EditSettings) -> None:
        """ValueError for what cannot be an edit, as far as a look at its names tells."""
        if not self.image.is_file():
            raise ValueError(f"there is no picture at {self.image}")
        if not self.target:
            raise ValueError(f"{self.image} has no target prompt: say what it shall show")
        if not self.source and (settings.control or class_of(settings.method).reads_source):  # which loads torch
            raise ValueError(
                f"{self.image} has no source prompt: say what it shows, which method {settings.method} reads "
                "(sdedit needs none)"
            )
        if self.output.suffix.lower() != ".png":
            raise ValueError(f"output {self.output} will be a png file: give it a name that ends in .png")
        if self.output.resolve() == self.image.resolve():
            raise ValueError(f"output {self.output} is the picture itself: name another --output")
        check_place(self.output)


def several_edits(place: Path, source: str | None, target: str | None, output: str | None) -> list[Edit]:
    """The edits that a folder of pictures, or a CSV file with columns image, source, target (and output), stands for.

    The prompts given go for every picture that says no other. Results go into the folder `output`, by default
    name-edited beside folder or file. ValueError for a file without the columns, for an output outside of that folder
    or among the pictures, and for two edits of one output.
    """
    if output is not None and (Path(output).is_file() or Path(output).suffix.lower() in SUFFIXES):
        raise ValueError(f"output {output} must be a folder, for the results of several edits")
    whole = place.resolve()
    beside = place if place.name == whole.name else whole  # not . and .., which have no name
    folder = Path(output) if output else beside.with_name(f"{whole.stem}-edited")
    rows = _folder_rows(place) if place.is_dir() else csv_rows(place, ("image",))
    edits, seen = [], Counter[str]()
    for row in rows:
        image = place / row["image"] if place.is_dir() else place.parent / row["image"]
        name = row.get("output") or ""
        if not name:
            seen[image.stem] += 1
            number = f"-{seen[image.stem]}" if seen[image.stem] > 1 else ""
            name = f"{image.stem}-edited{number}.png"
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{place}: output {name!r} leaves {folder}: name a file in it, or another --output")
        prompts = row.get("source") or source or "", row.get("target") or target or ""
        edits.append(Edit(image, *prompts, folder / name, row.get("blended_words")))
    if twice := [str(path) for path, times in Counter(edit.output.resolve() for edit in edits).items() if times > 1]:
        raise ValueError(
            f"{place}: {', '.join(twice[:3])} would be written more than once: give each edit its own output"
        )
    pictures = {edit.image.resolve() for edit in edits}
    if also := next((edit.output for edit in edits if edit.output.resolve() in pictures), None):
        raise ValueError(f"{place}: output {also} is a picture to be edited: name another, or another --output")
    return edits


def _folder_rows(folder: Path) -> list[dict[str, str]]:
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    names = [name for name in names if not name.startswith("._")]  # macOS keeps what it knows of a file beside it
    if not names:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    return [{"image": name} for name in names]
