"""Students on the Hugging Face hub: an overlay (see `models/overlay.py`) with a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id

from icd_lightning.diffusion import Direction
from icd_lightning.editing.consistency import common_boundaries
from icd_lightning.editing.defaults import told_by
from icd_lightning.files import read_object, read_yaml
from icd_lightning.models.cards import repository_card
from icd_lightning.models.released import RELEASED
from icd_lightning.models.sources import HUB_ID
from icd_lightning.models.student_file import WEIGHTS_NAME, StudentFile
from icd_lightning.models.students import DIRECTIONS
from icd_lightning.models.weights import first_line, read_header


@dataclass(frozen=True)
class Publication:
    """What is uploaded: both students, and the name of a released UNet or the folder of another."""

    students: Mapping[Direction, StudentFile]
    base_model: str
    guided_unet: str | Path
    defaults: Mapping[str, Any]

    @classmethod
    def of(cls, folder: str | Path, base_model: str | None = None, guided_unet: str | None = None) -> Publication:
        """Of a run's folder, or a saved pipeline's; ValueError or FileNotFoundError for one that is not complete."""
        folder = Path(folder)
        place = folder / "students" if (folder / "students").is_dir() else folder
        students = {direction: _student(place / direction, direction) for direction in DIRECTIONS}
        common_boundaries(students)
        family, index = _family(folder), folder / "model_index.json"
        model = base_model or family.get("model") or str(students["reverse"].about.get("family"))
        guided = guided_unet or family.get("guided_unet")
        if model in RELEASED:
            guided, model = guided or RELEASED[model].index.get("guided_unet"), RELEASED[model].base.model
        if not HUB_ID.fullmatch(model) or Path(model).exists():
            raise ValueError(f"{folder} was trained on {model!r}, which is not on the hub: name its id by --base_model")
        said = read_object(index) if index.is_file() else {}
        return cls(students, model, _guided(guided or folder), told_by(said, str(index)))

    def files(self, repo: str) -> dict[str, Path | bytes]:
        """Content by its place in the repository of this name."""
        index: dict[str, Any] = {"_class_name": "InvertibleConsistencyPipeline", "base_model": self.base_model}
        index |= {"students": list(DIRECTIONS), **self.defaults}
        files: dict[str, Path | bytes] = {}
        for direction, student in self.students.items():
            files[f"students/{direction}/{WEIGHTS_NAME}"] = student.path
        if isinstance(self.guided_unet, Path):
            index["unet_guided"] = ["diffusers", read_object(self.guided_unet / "config.json").get("_class_name")]
            for file in [self.guided_unet / "config.json", *self.guided_unet.glob("*.safetensors*")]:
                files[f"unet_guided/{file.name}"] = file
        else:
            index["guided_unet"] = self.guided_unet
        reverse = self.students["reverse"]
        settings = {**reverse.about, "family": self.base_model, "rank": reverse.rank, "alpha": reverse.alpha}
        card = repository_card(repo, common_boundaries(self.students), index, settings)
        texts = {"README.md": card, "model_index.json": json.dumps(index, indent=2) + "\n"}
        return files | {name: text.encode() for name, text in texts.items()}


def publish(publication: Publication, repo: str, *, private: bool = False, endpoint: str | None = None) -> str:
    """Upload to the hub as one commit, and return the repository's address.

    Raises ValueError for a name that is none, OSError where the hub refuses or cannot be reached.
    """
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"repo {repo!r} must be OWNER/NAME, as in someone/icd-sd15-mine")
    validate_repo_id(repo)
    files, api = publication.files(repo), HfApi(endpoint=endpoint, library_name="icd_lightning")
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        content = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repo, content, commit_message="Upload by icd push")
    except Exception as error:  # those of the library, whichever it is, that sends the hub's requests, among them
        raise OSError(
            f"{repo} cannot be written on {api.endpoint} ({first_line(error)}): log in as someone who may, by `hf auth "
            "login` or HF_TOKEN, and push again; --endpoint or HF_ENDPOINT names another hub"
        ) from error
    return str(address)


def _student(place: Path, direction: Direction) -> StudentFile:
    student = StudentFile.read(place)
    if student.path.name != WEIGHTS_NAME or student.direction != direction:
        raise ValueError(f"{student.path} is no {direction} model as `icd fit` writes it to {direction}/{WEIGHTS_NAME}")
    return student


def _family(folder: Path) -> dict[str, str]:
    try:
        family = read_yaml(folder / "config.yaml")["model"]["init_args"]["family"]
    except (FileNotFoundError, KeyError, TypeError):
        return {}
    named = family if isinstance(family, dict) else {}
    return {name: value for name, value in named.items() if isinstance(value, str)}


def _guided(name: str | Path) -> str | Path:
    """A released UNet's name, or the folder of another; ValueError for what is neither."""
    if name in RELEASED:
        return str(name)
    for folder in (Path(name), Path(name, "unet_guided")):
        if (folder / "config.json").is_file() and (files := list(folder.glob("*.safetensors"))):
            for file in files:
                read_header(file)  # whole, as far as it can be told without reading all
            return folder
    raise ValueError(
        f"no guidance-distilled UNet at {name}, which the students adapt: name its folder, with config.json and "
        ".safetensors files, or a released one such as sd15-cfg-distill, by --guided_unet"
    )
