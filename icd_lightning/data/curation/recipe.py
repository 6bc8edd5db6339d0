"""What is to be kept of pairs, as a file in conf/data/curate says it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from icd_lightning.data.curation.duplicates import REASONS, Duplicates
from icd_lightning.data.curation.passes import VERSION
from icd_lightning.data.curation.stages import Stage
from icd_lightning.data.tally import REASONS as UNREADABLE
from icd_lightning.files import read_yaml
from icd_lightning.registry import Entry, typed
from icd_lightning.trust import check_class


@dataclass(frozen=True)
class Recipe:
    """What is kept of pairs, and at which resolution. See conf/data/curate.

    Captions are the txt or caption file or column, or else `caption_field` of the json file or table.
    """

    stages: tuple[Stage, ...] = ()
    duplicates: Duplicates | None = None
    resolution: int | None = None
    caption_field: str | None = None

    def __post_init__(self) -> None:
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"resolution {self.resolution} must be at least 1")
        names = [*REASONS, *UNREADABLE, *(stage.name for stage in self.stages)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two stages drop for {twice!r}: give one of them another reason")

    def settings(self) -> dict[str, Any]:
        about = {"version": VERSION, "resolution": self.resolution, "caption_field": self.caption_field}
        about["duplicates"] = self.duplicates and asdict(self.duplicates)
        return json.loads(json.dumps(about | {"stages": [stage.settings() for stage in self.stages]}))


def read_recipe(file: str | Path) -> Recipe:
    """The recipe in a YAML file; OSError or ValueError, which name it, for anything else."""
    return build_recipe(read_yaml(Path(file)), file)


def build_recipe(content: Any, file: str | Path) -> Recipe:
    """The recipe of settings that `file` holds; ValueError, which names it, for anything else."""
    if not isinstance(content, dict) or not isinstance(content.get("stages") or [], list):
        raise ValueError(f"{file} must hold a list of stages, as conf/data/curate/laion_sd15.yaml does")
    others = {name: value for name, value in content.items() if name != "stages"}
    try:
        stages = tuple(_stage(entry) for entry in content.get("stages") or ())
        return Recipe(stages, **typed(Recipe, others, skip={"stages"}))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


def _stage(about: dict[str, Any]) -> Stage:
    entry = Entry(**about)
    check_class(entry.class_path, "a stage")
    if not (isinstance(cls := entry.load(), type) and issubclass(cls, Stage)):  # before it is built
        raise ValueError(f"{entry.class_path} is no Stage: derive it from icd_lightning.data.curation.stages.Stage")
    return entry.build()
