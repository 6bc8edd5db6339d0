"""The methods that a benchmark compares, over one family's weights, and all that their figures depend on."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from icd_lightning.data.manifest import sha256
from icd_lightning.diffusion import StepGuidance
from icd_lightning.editing.baselines.base import Baseline
from icd_lightning.editing.consistency import AttentionControlled, InvertibleConsistency
from icd_lightning.editing.defaults import defaults_of, edits_by_attention
from icd_lightning.editing.limits import Injection, PromptToPrompt
from icd_lightning.editing.method import PictureMethod
from icd_lightning.editing.methods import LOADED, METHODS, build, class_of, says_guidance
from icd_lightning.files import as_seen_here
from icd_lightning.models.family import Family, parse_style
from icd_lightning.models.student_file import weights_file
from icd_lightning.registry import typed

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
EVERY_EDIT = ("guidance", "noise", "seed", "on_step")  # keywords of `edit` that are no options of a method


def all_methods(family: Family) -> list[str]:
    """The names of every method that suits the family, once; the log says the rest. icd is icd_p2p or icd_swap."""
    same, process = "icd_p2p" if edits_by_attention(family) else "icd_swap", family.load_process()
    fits = {name: isinstance(process, class_of(name).needs) for name in METHODS.entries if name != same}
    if left_out := ", ".join(name for name, fit in fits.items() if not fit):
        log.warning("left out, since the process of %s is %s: %s", family.model, type(process).__name__, left_out)
    return [name for name, fit in fits.items() if fit]


def edit_options(method: type[PictureMethod]) -> list[str]:
    """The numbers that a method's `edit` takes beside what every edit does: of attention control, or its own."""
    if issubclass(method, (AttentionControlled, Baseline)):
        names = [one.name for kind in (PromptToPrompt, Injection) for one in fields(kind)]
        return [name for name in dict.fromkeys(names) if name not in ("alignment", "blend", "amplified")]
    options: list[str] = []
    for edit in [vars(cls)["edit"] for cls in method.__mro__ if "edit" in vars(cls)]:
        parameters = inspect.signature(edit).parameters.values()
        options += [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.name not in EVERY_EDIT]
        if all(one.kind is not one.VAR_KEYWORD for one in parameters):  # else the rest goes to the class it extends
            break
    return options


def guided_as_told(own: StepGuidance, guidance_scale: float | None, tau: float | None) -> StepGuidance:
    told = {"guidance_scale": guidance_scale, "tau": tau}
    return replace(own, **{name: value for name, value in told.items() if value is not None})


@dataclass(frozen=True)
class Models:
    """A family, the two students (by default its own), and the device to run on."""

    family: Family
    forward: str | None = None
    reverse: str | None = None
    boundaries: str | None = None
    lora_alpha: float | None = None
    device: torch.device = CPU

    def load(self, name: str, **settings: Any) -> PictureMethod:
        """The method of this name, on the device; ValueError if there is none."""
        students = {part: getattr(self, part) for part in ("forward", "reverse", "boundaries", "lora_alpha")}
        return build(name, self.family, students=students, **settings).to(self.device)

    def variant(self, name: str, method: PictureMethod, settings: Mapping[str, float]) -> PictureMethod:
        """The method with other settings of its constructor; its networks are shared where it is a baseline."""
        if not settings:
            return method
        whole = {key: int(value) if value == int(value) else value for key, value in settings.items()}
        if not isinstance(method, Baseline):
            return self.load(name, **whole)
        other, cls = copy(method), type(method)
        cls.__init__(other, method.parts, **typed(cls, {**METHODS.find(name).init_args, **whole}, skip=LOADED))
        return other

    def family_guidance(self) -> StepGuidance:
        defaults = defaults_of(self.family)
        return StepGuidance(defaults["guidance_scale"], defaults["tau"])

    def guidance(self, name: str, method: PictureMethod, *, edit: bool = False) -> StepGuidance:
        """The method's own guidance, but no stronger than its family bears, or else the family's own.

        Edits by attention control have the family's guidance for edits; what a method's file says holds.
        """
        if not isinstance(method, InvertibleConsistency):
            strongest = method.guidance if says_guidance(name) else self.family_guidance()
            return replace(
                method.guidance, guidance_scale=min(method.guidance.guidance_scale, strongest.guidance_scale)
            )
        defaults = defaults_of(self.family, method.boundaries)
        usual = defaults["guidance_scale"]
        by_attention = edit and isinstance(method, AttentionControlled)
        return StepGuidance(defaults.get("edit_guidance_scale", usual) if by_attention else usual, defaults["tau"])

    def determinants(self, name: str, method: PictureMethod) -> dict[str, Any]:
        """All of the models that the method's figures depend on."""
        cls, entry = type(method), METHODS.find(name)
        depends = {"method": f"{cls.__module__}.{cls.__qualname__}", "version": getattr(cls, "version", 1)}
        family = {name: as_seen_here(value) for name, value in asdict(self.family).items()}
        depends |= {"settings": dict(entry.init_args), "family": family}
        depends |= {"weights": teacher_hash(self.family), "boundaries": getattr(method, "boundaries", None)}
        if method.uses_students:
            paths = {"forward": self.forward, "reverse": self.reverse}
            files = [weights_file(self.family.student(part, path)) for part, path in paths.items()]
            depends |= {"students": sha256(*files), "told": (self.boundaries, self.lora_alpha)}
        return depends


def teacher_hash(family: Family) -> str:
    """Of all weights but the students'; where the model is no folder or file, of its name in their place."""
    base = getattr(family.source, "base", family.source)
    place = Path(getattr(base, "location", None) or getattr(base, "file", ""))
    files = _weights_in(place.glob("*")) if place.is_dir() else [place] if place.is_file() else []
    outside = []  # parts that are kept outside of the model, files or folders; a name of something else has none
    own = family.source.folder if base is not family.source else None
    style = parse_style(family.style)[0] if family.style else None
    for part in filter(None, (family.named_guided, family.vae, style)):
        folders = [folder for folder in (Path(part), Path(part, "unet_guided")) if (folder / "config.json").is_file()]
        outside += [Path(part)] if Path(part).is_file() else _weights_in(folders)
    if own is not None:
        outside += _weights_in(own.glob("*"))
    if files:
        return sha256(*files, *outside)
    return hashlib.sha256(family.model.encode()).hexdigest() + (sha256(*outside) if outside else "")


def _weights_in(folders: Iterable[Path]) -> list[Path]:
    return sorted(file for folder in folders for kind in ("safetensors", "bin") for file in folder.glob(f"*.{kind}"))
