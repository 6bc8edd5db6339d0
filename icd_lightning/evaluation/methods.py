"""The methods that a benchmark compares, by name, over one family's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icd_lightning.diffusion import Boundaries, GuidanceSchedule, OnStep, Step, StepGuidance
from icd_lightning.editing.baselines import registry
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.editing.defaults import P2P_GUIDANCE_SCALE
from icd_lightning.editing.method import PictureMethod, Seed
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt, PromptToPromptEditing
from icd_lightning.evaluation.benchmarks import CPU
from icd_lightning.evaluation.study import file_hash
from icd_lightning.models.checkpoints import weights_file
from icd_lightning.models.family import Family
from icd_lightning.models.students import Students


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
        blended_words: Sequence[tuple[str, str] | None] | None = None,
        seed: Seed = 0,
        on_step: OnStep | None = None,
        **control: float,
    ) -> Tensor:
        """As `InvertibleConsistency.edit`, with settings of `PromptToPrompt` and the words that each edit blends by."""
        words = blended_words or [None] * len(images)
        settings = [PromptToPrompt(**control, **({} if pair is None else {"blend": pair})) for pair in words]
        decode = PromptToPromptEditing(self, self.students.unet, self.boundaries.num_segments, settings)
        noise = self.invert(images, source_prompts, seed=seed, on_step=on_step)

        def count_both(step: Step) -> None:
            if on_step is not None:
                on_step(step._replace(nfe=2 * step.nfe))  # of the source's branch and the target's

        return decode(noise, source_prompts, target_prompts, guidance=guidance, on_step=count_both)


def untrained_pipeline(family: Family, boundaries: Boundaries) -> InvertibleConsistency:
    """The guidance-distilled teacher's own weights through the students' jumps: what more steps alone give."""
    students = Students(family.load_unet(guided=True), family.load_schedule())
    return InvertibleConsistency(students, family.load_autoencoder(), family.load_conditioner(), boundaries)


def teacher_hash(family: Family) -> str:
    """Of all weights but the students'; of a family that is no folder or file, its name's."""
    place = Path(getattr(family.source, "location", None) or getattr(family.source, "file", ""))
    files = sorted(place.glob("*/*.safetensors")) if place.is_dir() else [place] if place.is_file() else []
    return file_hash(*files) if files else hashlib.sha256(family.model.encode()).hexdigest()


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
        method = OURS[name](self) if name in OURS else registry.build(name, self.family)
        return method.to(self.device)

    def determinants(self, name: str, method: PictureMethod) -> dict[str, Any]:
        """All of the models that the method's figures depend on."""
        found: dict[str, Any] = {"method": name, "family": asdict(self.family), "weights": teacher_hash(self.family)}
        if isinstance(method, InvertibleConsistency):
            found["boundaries"] = method.boundaries
        if isinstance(method, InvertibleConsistency) and name != "untrained":
            paths = {"forward": self.forward, "reverse": self.reverse}
            files = [weights_file(path or self.family.root / "students" / part) for part, path in paths.items()]
            found["students"] = file_hash(*files)
        if name not in OURS:
            found["entry"] = asdict(registry.find(name))
        return found

    def resolution(self, method: PictureMethod) -> int:
        """Pixels of a side of the pictures that the family was trained on."""
        return int(self.family.source.config("unet")["sample_size"]) * method.autoencoder.downsampling

    def guidance(
        self, name: str, method: PictureMethod, guidance_scale: float | None, tau: float | None
    ) -> StepGuidance:
        """As told; else the method's own guidance, but no stronger than its family bears, or else the family's own."""
        defaults = self.family.load_defaults()
        strongest = (
            P2P_GUIDANCE_SCALE if name == "icd_p2p" and not defaults.closed_vocabulary else defaults.guidance_scale
        )
        own = getattr(method, "guidance", None) or StepGuidance(strongest, defaults.tau)
        scale = min(own.guidance_scale, strongest) if guidance_scale is None else guidance_scale
        return replace(own, guidance_scale=scale, **({} if tau is None else {"tau": tau}))

    def students(self, cls: type[InvertibleConsistency] = InvertibleConsistency) -> InvertibleConsistency:
        """Both trained students."""
        options = {"forward": self.forward, "reverse": self.reverse, "boundaries": self.boundaries}
        return cls.from_pretrained(self.family, **options)

    def untrained(self) -> InvertibleConsistency:
        """The teacher through `boundaries`, or the jumps of the trained students."""
        ends = Boundaries.parse(self.boundaries, allow_off_grid=True) if self.boundaries else self.students().boundaries
        return untrained_pipeline(self.family, ends)


OURS: Mapping[str, Callable[[Models], PictureMethod]] = {
    "icd": lambda models: models.students(),
    "icd_p2p": lambda models: models.students(AttentionControlled),
    "untrained": Models.untrained,
}
"""Beside the registry's baselines."""


def all_methods() -> list[str]:
    """The names of every method."""
    return [*OURS, *registry.METHODS]


def check_names(names: Sequence[str]) -> None:
    """ValueError for a name that no method has."""
    for name in names:
        if name not in all_methods() and Path(name).suffix not in (".yaml", ".yml"):
            raise ValueError(
                f"no method {name!r}; there is: {', '.join(all_methods())}, or a YAML file as in conf/method"
            )
