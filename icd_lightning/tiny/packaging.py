"""Makes a shipped family of what make trained, `tiny-weights` or `tiny-flow-weights`: half precision, with records."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from icd_lightning.evaluation.curves import read_scalars, thinned
from icd_lightning.files import read_object, replaced_folder, write_json
from icd_lightning.models.student_file import sorted_metadata
from icd_lightning.models.students import DIRECTIONS
from icd_lightning.models.weights import not_finite

EDITING_DEFAULTS = {"guidance_scale": 3.0, "tau": 0.8, "closed_vocabulary": True}
WRITTEN = ("README.md", "notes.md")  # the card and what people wrote by hand for its end


@dataclass(frozen=True)
class Recipe:
    """What a family consists of beside its students, and the trainings that made it.

    overlay: what it lacks is another family's, as its model_index.json says.
    """

    parts: tuple[str, ...]
    stages: tuple[str, ...]
    overlay: bool = False


RECIPES = {  # by the names that `Family` knows
    "tiny": Recipe(
        ("vae", "text_encoder", "tokenizer", "scheduler", "unet", "unet_guided", "scene_network"),
        ("autoencoder", "scene_network", "teacher", "guidance", "students"),
    ),
    "tiny_flow": Recipe(("transformer", "scheduler"), ("teacher", "students"), overlay=True),
}


def package_family(source: Path, out: Path, max_megabytes: float, name: str = "tiny") -> float:
    """Write the family's folder, every file whole, over the one before; return its size in MB (10^6 bytes)."""
    recipe = RECIPES[name]
    if out.is_dir() and any(out.iterdir()) and not ((out / "icd.json").is_file() and (out / "training").is_dir()):
        raise ValueError(f"{out} holds other things than a family, which would be removed: name another --out")
    parts = {part: source / "model" / part for part in recipe.parts}
    parts |= {f"students/{direction}": source / "students" / direction for direction in DIRECTIONS}
    files = [source / "students" / direction / "icd.json" for direction in DIRECTIONS]
    files += [source / stage / "config.yaml" for stage in recipe.stages]
    if recipe.overlay:
        files.append(source / "model" / "model_index.json")
    if missing := [str(path.relative_to(source)) for path in (*parts.values(), *files) if not path.exists()]:
        raise FileNotFoundError(f"{source} lacks {', '.join(missing)}: let `make {source.name}` run to its end first")
    trained_on = read_object(files[0])["family"]
    with replaced_folder(out) as temporary:
        for part, folder in parts.items():
            _copy(folder, temporary / part, (trained_on, name))
        for stage in recipe.stages:
            _record(source / stage, temporary / "training" / stage)
        (temporary / "icd.json").write_text(json.dumps(EDITING_DEFAULTS) + "\n")
        if recipe.overlay:
            shutil.copy(files[-1], temporary)
        for file in (out / written for written in WRITTEN):
            if file.is_file():
                shutil.copy(file, temporary)
        size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file()) / 1e6
        if size > max_megabytes:
            raise ValueError(f"the family takes {size:.1f} MB, more than {max_megabytes:g}: make its networks smaller")
        written = {path.relative_to(temporary) for path in temporary.rglob("*")}
    for path in sorted(out.rglob("*"), reverse=True):  # what a folder holds before the folder
        if path.relative_to(out) not in written:
            path.rmdir() if path.is_dir() else path.unlink()
    return size


def _copy(source: Path, target: Path, names: tuple[str, str]) -> None:
    """Copy a part, its weights in half precision; where it names the family it was trained on, it names the shipped."""
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.suffix == ".safetensors":
            (target / file.name).write_bytes(_halved(file, names))
        elif file.name == "config.json":
            config = json.loads(file.read_text())
            config.pop("_name_or_path", None)  # diffusers' note of the folder that the training began from
            write_json(target / file.name, config)
        elif file.name in ("icd.json", "README.md"):
            (target / file.name).write_text(_renamed(file.read_text(), *names))
        else:
            shutil.copy(file, target / file.name)


def _halved(file: Path, names: tuple[str, str]) -> bytes:
    """A file's weights, floating-point ones as float16: enough for inference and half the download."""
    with safe_open(file, "pt") as weights:
        header = {key: _renamed(value, *names) for key, value in (weights.metadata() or {"format": "pt"}).items()}
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118  (no mapping)
    halved = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    if wrong := not_finite(halved.items()):
        raise ValueError(f"{file}: {wrong} does not fit into half precision")
    return sorted_metadata(save(halved, metadata=header))


def _renamed(text: str, trained_on: str, name: str) -> str:
    """A card or JSON with the family's name, which stands in quotes there, replaced."""
    return text.replace(f'"{trained_on}"', f'"{name}"').replace(f"`{trained_on}`", f"`{name}`")


def _record(run: Path, target: Path) -> None:
    """Keep a training's configuration and its curves, thinned to 200 points each."""
    target.mkdir(parents=True)
    shutil.copy(run / "config.yaml", target / "config.yaml")
    curves = {
        name: {"step": steps, "value": [float(f"{value:.5g}") for value in values]}
        for name, (steps, values) in thinned(read_scalars(run), 200).items()
    }
    (target / "curves.json").write_text(json.dumps(curves) + "\n")
