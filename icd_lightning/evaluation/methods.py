"""The methods that a benchmark compares, by name, over one family's weights."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icd_lightning.data.manifest import sha256
from icd_lightning.diffusion import Boundaries, GuidanceSchedule, OnStep, Step, StepGuidance
from icd_lightning.editing.baselines import registry
from icd_lightning.editing.baselines.base import Baseline
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.editing.defaults import defaults_of
from icd_lightning.editing.method import PictureMethod, Seed
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt, PromptToPromptEditing
from icd_lightning.evaluation.bench import CPU
from icd_lightning.evaluation.examples import BlendedWords
from icd_lightning.models.family import Family
from icd_lightning.models.student_file import weights_file
from icd_lightning.models.students import LoraStudents


class AttentionControlled(InvertibleConsistency):
    """iCD whose edits borrow attention from the picture that they edit."""

    def nfe(self, *, guidance: GuidanceSchedule | None = None) -> int:
        """Network evaluations of an edit: to noise once, and back with the source beside the target."""
        return 3 * self.boundaries.num_segments

    def edit(
        self,
        images: Tensor,
        source_prompts: Sequence[str],
        target_prompts: Sequence[str],
        *,
        guidance: GuidanceSchedule,
        blended_words: Sequence[BlendedWords] | None = None,
        seed: Seed = 0,
        on_step: OnStep | None = None,
        **control: float,
    ) -> Tensor:
        """As `InvertibleConsistency.edit`, with settings of `PromptToPrompt` and the words that each edit blends by."""
        words = blended_words or [None] * len(images)
        settings = [PromptToPrompt(**control, **({} if pair is None else {"blend": pair})) for pair in words]
        decode = PromptToPromptEditing(self, self.students.network, self.boundaries.num_segments, settings)
        noise = self.invert(images, source_prompts, seed=seed, on_step=on_step)

        def count_both(step: Step) -> None:
            if on_step is not None:
                on_step(step._replace(nfe=2 * step.nfe))  # of the source's branch and the target's

        return decode(noise, source_prompts, target_prompts, guidance=guidance, on_step=count_both)


def untrained_pipeline(family: Family, boundaries: Boundaries) -> InvertibleConsistency:
    """The guidance-distilled teacher's own weights through the students' jumps: what more steps alone give."""
    students = LoraStudents(family.load_model(guided=True))
    return InvertibleConsistency(students, family.load_autoencoder(), family.load_conditioner(), boundaries)


def edit_options(method: type[PictureMethod]) -> list[str]:
    """The numbers that a method's `edit` takes beside what every edit does: of attention control, or its own."""
    if issubclass(method, (AttentionControlled, Baseline)):
        return [one.name for one in fields(PromptToPrompt) if one.name not in ("alignment", "blend")]
    found: list[str] = []
    for edit in [vars(cls)["edit"] for cls in method.__mro__ if "edit" in vars(cls)]:
        parameters = inspect.signature(edit).parameters.values()
        found += [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.name not in EVERY_EDIT]
        if all(one.kind is not one.VAR_KEYWORD for one in parameters):  # else the rest goes to the class it extends
            break
    return found


def guided_as_told(own: StepGuidance, guidance_scale: float | None, tau: float | None) -> StepGuidance:
    """A guidance, with what is told in place of its own."""
    scale = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    return replace(own, **scale, **({} if tau is None else {"tau": tau}))


EVERY_EDIT = ("guidance", "seed", "on_step")
"""Keywords of `edit` that are no options of a method."""


def teacher_hash(family: Family) -> str:
    """Of all weights but the students'; where the model is no folder or file, of its name in their place."""
    place = Path(getattr(family.source, "location", None) or getattr(family.source, "file", ""))
    files = _weights_in(place.glob("*")) if place.is_dir() else [place] if place.is_file() else []
    outside = [file for part in (family.guided_unet, family.vae) if part for file in _weights_at(Path(part))]
    if files:
        return sha256(*files, *outside)
    return hashlib.sha256(family.model.encode()).hexdigest() + (sha256(*outside) if outside else "")


def _weights_at(place: Path) -> list[Path]:
    """Of a part that is kept outside of its model, a file or a folder; none where the name is of something else."""
    if place.is_file():
        return [place]
    return _weights_in(folder for folder in (place, place / "unet_guided") if (folder / "config.json").is_file())


def _weights_in(folders: Iterable[Path]) -> list[Path]:
    return sorted(file for folder in folders for kind in ("safetensors", "bin") for file in folder.glob(f"*.{kind}"))


@dataclass(frozen=True)
class Models:
    """A family, the two students (by default its own), and the device to run on."""

    family: Family
    forward: str | None = None
    reverse: str | None = None
    boundaries: str | None = None
    device: torch.device = field(default=CPU)

    def load(self, name: str) -> PictureMethod:
        """The method of this name, on the device; ValueError if there is none."""
        check_names([name])
        build = OURS.get(name, lambda models: registry.build(name, models.family, students=models.chosen))
        return build(self).to(self.device)

    def variant(self, name: str, method: PictureMethod, settings: Mapping[str, float]) -> PictureMethod:
        """The method with other settings of its constructor; its networks are shared where it is a baseline."""
        if not settings:
            return method
        entry, cls = registry.find(name), type(method)
        whole = {key: int(value) if value == int(value) else value for key, value in settings.items()}
        if not isinstance(method, Baseline):
            return registry.build(name, self.family, students=self.chosen, **whole).to(self.device)
        other = copy(method)
        cls.__init__(other, method.parts, **registry.typed(cls, {**entry.init_args, **whole}))
        return other

    def method_class(self, name: str) -> type[PictureMethod]:
        """The class of the method of this name, without loading any weights."""
        if name in OURS:
            by_attention = name == "icd_p2p" or (name == "icd" and self.edits_by_attention)
            return AttentionControlled if by_attention else InvertibleConsistency
        return registry.class_of(registry.find(name), name)

    @property
    def edits_by_attention(self) -> bool:
        """Whether the family is edited best by Prompt-to-Prompt, else by swapping the prompt: what icd does."""
        return bool(self.defaults().get("attention_control"))

    def defaults(self, boundaries: Boundaries | None = None) -> dict[str, Any]:
        """How the family is guided and edited best; its tau is for students of these boundaries."""
        ends = boundaries or Boundaries.uniform(4)
        return defaults_of(self.family, ends, two_encoders=self.family.source.has("text_encoder_2"))

    def determinants(self, name: str, method: PictureMethod) -> dict[str, Any]:
        """All of the models that the method's figures depend on."""
        known = "icd_p2p" if isinstance(method, AttentionControlled) else name
        found: dict[str, Any] = {"method": known, "family": asdict(self.family), "weights": teacher_hash(self.family)}
        ours, borrowed = isinstance(method, InvertibleConsistency), getattr(method, "uses_students", False)
        if ours or borrowed:
            found["boundaries"] = getattr(method, "boundaries", self.boundaries)
        if borrowed or (ours and name != "untrained"):
            paths = {"forward": self.forward, "reverse": self.reverse}
            files = [weights_file(path or self.family.root / "students" / part) for part, path in paths.items()]
            found["students"] = sha256(*files)
        if name not in OURS:
            found["entry"] = asdict(registry.find(name))
        return found

    def resolution(self, method: PictureMethod) -> int:
        """Pixels of a side of the pictures that the family was trained on."""
        return int(self.family.source.config("unet")["sample_size"]) * method.autoencoder.downsampling

    def family_guidance(self) -> StepGuidance:
        """The family's own."""
        defaults = self.defaults()
        return StepGuidance(defaults["guidance_scale"], defaults["tau"])

    def guidance(self, name: str, method: PictureMethod, *, edit: bool = False) -> StepGuidance:
        """The method's own guidance, but no stronger than its family bears, or else the family's own.

        Edits by attention control have the family's guidance for edits.
        """
        if not isinstance(method, InvertibleConsistency):
            strongest = self.family_guidance().guidance_scale
            return replace(method.guidance, guidance_scale=min(method.guidance.guidance_scale, strongest))
        defaults = self.defaults(method.boundaries)
        usual = defaults["guidance_scale"]
        by_attention = edit and isinstance(method, AttentionControlled)
        return StepGuidance(defaults.get("edit_guidance_scale", usual) if by_attention else usual, defaults["tau"])

    def students(self, cls: type[InvertibleConsistency] = InvertibleConsistency) -> InvertibleConsistency:
        """Both trained students."""
        return cls.from_pretrained(self.family, **self.chosen)

    @property
    def chosen(self) -> dict[str, str | None]:
        """The students and their boundaries, as `InvertibleConsistency.from_pretrained` takes them."""
        return {"forward": self.forward, "reverse": self.reverse, "boundaries": self.boundaries}

    def untrained(self) -> InvertibleConsistency:
        """The teacher through `boundaries`, or the jumps of the trained students."""
        ends = Boundaries.parse(self.boundaries, allow_off_grid=True) if self.boundaries else self.students().boundaries
        return untrained_pipeline(self.family, ends)


OURS: Mapping[str, Callable[[Models], PictureMethod]] = {
    "icd": lambda models: models.students(models.method_class("icd")),
    "icd_p2p": lambda models: models.students(AttentionControlled),
    "icd_swap": lambda models: models.students(),
    "untrained": Models.untrained,
}
"""Beside the registry's baselines; icd is one of the two that follow, whichever suits the family."""


def all_methods(*, by_attention: bool = False) -> list[str]:
    """The names of every method, once: icd, the other way to edit, and whatever else there is."""
    return ["icd", "icd_swap" if by_attention else "icd_p2p", "untrained", *registry.METHODS]


def check_names(names: Sequence[str]) -> None:
    """ValueError for a name that no method has."""
    known = [*OURS, *registry.METHODS]
    for name in names:
        if name not in known and Path(name).suffix not in (".yaml", ".yml"):
            raise ValueError(f"no method {name!r}; there is: {', '.join(known)}, or a YAML file as in conf/method")
