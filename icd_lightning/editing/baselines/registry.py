"""The baselines by name. Importing this is light: a method's module is imported when the method is made.

A name stands for a class and the settings in which it differs from the class's defaults, which are those of the paper
(arXiv:2406.14539) or else of the method's authors. `conf/method/<name>.yaml` says the same in full, to be changed:

    method = build("nti", Family("tiny"))
    method = build("nti", Family("tiny"), guidance_scale=3.0)
    method = build("conf/method/nti.yaml", Family("tiny"))
    method = build("renoise_turbo", Family("tiny"), students={"forward": "mine/forward", "reverse": "mine/reverse"})
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icd_lightning.editing.method import PictureMethod
    from icd_lightning.models.family import Family

BASELINES = "icd_lightning.editing.baselines"


@dataclass(frozen=True)
class Entry:
    """A method's class, `module.Class`, its settings beside the class's defaults, and what it is, in a line."""

    class_path: str
    about: str = ""
    init_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.class_path, str) or "." not in self.class_path:
            raise ValueError(f"class_path {self.class_path!r} is no module.Class")
        if not isinstance(self.init_args, Mapping):
            raise ValueError(f"init_args {self.init_args!r} are no mapping")


METHODS: dict[str, Entry] = {
    "ddim": Entry(f"{BASELINES}.ddim.DDIMInversion", "DDIM inversion, 50 steps each way"),
    "ddim_dynamic": Entry(f"{BASELINES}.ddim.DDIMInversion", "the same, guided for t <= 0.7 T only", {"tau": 0.7}),
    "nti": Entry(f"{BASELINES}.null_text.NullTextInversion", "null-text inversion: fits an empty prompt for each step"),
    "npi": Entry(f"{BASELINES}.negative_prompt.NegativePromptInversion", "the source prompt as negative prompt"),
    "pnp_inversion": Entry(f"{BASELINES}.pnp_inversion.PnPInversion", "direct inversion: the source kept on its path"),
    "edit_friendly": Entry(f"{BASELINES}.edit_friendly.EditFriendlyInversion", "edit-friendly DDPM noise"),
    "infedit": Entry(f"{BASELINES}.infedit.InfEdit", "virtual inversion with an LCM, 12 steps"),
    "renoise_turbo": Entry(f"{BASELINES}.renoise.ReNoise", "fixed-point inversion of SDXL-Turbo, 4 steps each way"),
    "renoise_sdxl": Entry(
        f"{BASELINES}.renoise.ReNoise",
        "fixed-point inversion of SDXL, 50 steps each way",
        {
            "sampler": {"kind": "ddim", "num_inference_steps": 50},
            "renoising": {"count": 1},
            "regularization": None,
            "correction": 0.0,
        },
    ),
    "renoise_lcm": Entry(
        f"{BASELINES}.renoise.ReNoise",
        "fixed-point inversion of an LCM, 5 steps each way",
        {
            "sampler": {"kind": "lcm", "num_inference_steps": 5},
            "renoising": {"count": 5},
            "regularization": None,
            "correction": 0.0,
        },
    ),
    "sdedit": Entry(f"{BASELINES}.sdedit.SDEdit", "noise half-way, decode with the target prompt"),
}


def build(
    method: str, family: Family, *, students: Mapping[str, str | None] | None = None, **settings: Any
) -> PictureMethod:
    """Load a method, given by name or as a YAML file, for a family; settings go before its own.

    students: {"forward": ..., "reverse": ..., "boundaries": ...}, all or some, for methods that use iCD's students; by
    default they are the family's own. Whether a method does, its `uses_students` says.

    Raises ValueError for an unknown method, and for settings that it does not have.
    """
    entry = find(method)
    cls = class_of(entry, method)
    try:
        chosen = typed(cls, {**entry.init_args, **settings})
    except ValueError as error:
        raise ValueError(f"method {method}: {error}") from error
    return cls.from_family(family, students=students, **chosen)


def find(method: str) -> Entry:
    """The entry of a name, or of a YAML file with `class_path` and `init_args`."""
    if method in METHODS:
        return METHODS[method]
    if Path(method).suffix in (".yaml", ".yml"):
        import yaml

        try:
            return Entry(**yaml.safe_load(Path(method).read_text()))
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{method} must hold class_path and init_args, as in conf/method ({reason})") from error
    raise ValueError(f"no method {method!r}; there is: {', '.join(METHODS)}, or a YAML file as in conf/method")


def class_of(entry: Entry, method: str) -> type[Any]:
    """The class of an entry; ValueError, with the method's name, if there is none."""
    module, _, name = entry.class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method {method}: there is no class {entry.class_path} ({error})") from error


def typed(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the class's constructor wants them: checked, mappings turned to dataclasses."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip={"parts", "family"})
    try:
        return vars(parser.instantiate_classes(parser.parse_object(dict(settings))))
    except ArgumentError as error:
        raise ValueError(f"{cls.__name__}: {error}") from error
