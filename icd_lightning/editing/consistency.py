"""Invertible consistency distillation as an editing method: 4 + 4 or 3 + 3 evaluations."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from icd_lightning.diffusion import (
    Boundaries,
    DDIMJump,
    Denoiser,
    Direction,
    GuidanceSchedule,
    OnStep,
    Step,
    generate,
    invert,
)
from icd_lightning.editing.injection import attention_control, usual_control
from icd_lightning.editing.limits import Control, for_each
from icd_lightning.editing.merging import MergedStudents
from icd_lightning.editing.method import UNGUIDED, EditingMethod, Seed, StudentPaths, seeded_noise
from icd_lightning.editing.prompt_to_prompt import BlendedWords, PairedGuidance
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.diffusion_model import Guidance
from icd_lightning.models.family import Family
from icd_lightning.models.student_file import StudentFile
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents, Students
from icd_lightning.models.text import Conditioner

log = logging.getLogger(__name__)


class InvertibleConsistency(EditingMethod):
    """A family's frozen parts and its two students; num_segments evaluations to noise, as many back.

    With `merge` a loop runs on the weights of its student merged into the network's, which is faster and takes the
    memory of another network, or of two (see `MergedStudents`).
    """

    uses_students = True

    def __init__(
        self,
        students: Students,
        autoencoder: LatentAutoencoder,
        conditioner: Conditioner,
        boundaries: Boundaries,
        *,
        merge: bool = False,
    ) -> None:
        boundaries.check_process(students.process)
        self.students = self.network = students
        self.autoencoder, self.conditioner = autoencoder, conditioner
        self.process, self.boundaries = students.process, boundaries
        self.merged = MergedStudents(students) if merge and isinstance(students, LoraStudents) else None

    @classmethod
    def from_family(cls, family: Family, *, students: StudentPaths = None, **settings: Any) -> InvertibleConsistency:
        return cls.from_pretrained(family, **(students or {}), **settings)

    @classmethod
    def from_pretrained(
        cls,
        family: Family,
        *,
        forward: str | None = None,
        reverse: str | None = None,
        boundaries: str | None = None,
        lora_alpha: float | None = None,
    ) -> InvertibleConsistency:
        """Load a family and its students, by default those in the family's own folder.

        forward, reverse: folders or files of the two students. boundaries: e.g. "259,519,779,999", by default what the
        students' files, or the names of released ones, say. lora_alpha: of files that do not say it. Raises ValueError
        where nothing says it, or where the two students disagree.
        """
        files = _student_files(family, forward=forward, reverse=reverse, lora_alpha=lora_alpha)
        ends = Boundaries.parse(boundaries, allow_off_grid=True) if boundaries else common_boundaries(files)
        ends = replace(ends, start_timestep=files["forward"].start_timestep)
        stated = {direction: file.boundaries for direction, file in files.items() if file.boundaries is not None}
        if others := {name: other for name, other in stated.items() if tuple(other) != ends.boundary_timesteps}:
            log.warning("the students were trained for other boundaries than %s: %s", boundaries, others)
        reverse_file = files["reverse"]
        lora = LoraSettings(reverse_file.rank, reverse_file.alpha, reverse_file.target_modules)
        students = LoraStudents(family.load_model(guided=True), lora=lora)
        for direction in DIRECTIONS:
            students.load(direction, files[direction])
        return cls(students, family.load_autoencoder(), family.load_conditioner(), ends, merge=True)

    def networks(self) -> list[nn.Module]:
        return [model.network for model in self.students.diffusion_models()]

    def denoiser(self, prompts: Sequence[str], guidance: GuidanceSchedule) -> Denoiser:
        return self._sampling("reverse", prompts, guidance)

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Tensor:
        return self.climb(x0, prompts, seeded_noise(x0.shape, seed, x0.device), on_step=on_step)

    def climb(self, latents: Tensor, prompts: Sequence[str], noise: Tensor, *, on_step: OnStep | None = None) -> Tensor:
        """Jump up with the forward model, from latents slightly noised by `noise`, (B, C, h, w) both."""
        jump = DDIMJump(self._sampling("forward", prompts, 1.0), self.process)
        return invert(jump, latents, noise, self.boundaries, self.process, on_step=on_step)

    def from_noise(self, denoise: Denoiser, noise: Tensor, *, on_step: OnStep | None = None) -> Tensor:
        return generate(DDIMJump(denoise, self.process), noise, self.boundaries, on_step=on_step)

    @torch.no_grad()
    def decode_pairs(
        self,
        noise: Tensor,
        source_prompts: Sequence[str],
        target_prompts: Sequence[str],
        *,
        guidance: GuidanceSchedule,
        control: Control | Sequence[Control],
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Noise (B, C, h, w) to latents (2 B, C, h, w): the sources, unguided, and the targets that borrow of them."""
        edits = (control, source_prompts, target_prompts, noise)
        tokenizer, num_steps = self.conditioner.tokenizer, self.boundaries.num_segments
        state = attention_control(*edits, tokenizer=tokenizer, num_steps=num_steps)

        def end(step: Step) -> None:
            state.on_step(step)
            if on_step is not None:
                on_step(step._replace(nfe=2 * step.nfe))  # of the source's branch and the target's

        denoise = self.denoiser([*source_prompts, *target_prompts], PairedGuidance(UNGUIDED, guidance))
        with state.attached(self.students.network):
            return self.from_noise(denoise, noise.repeat(2, 1, 1, 1), on_step=end)

    def _sampling(self, direction: Direction, prompts: Sequence[str], guidance: Guidance) -> Denoiser:
        denoise = self.students.denoiser(direction, self.conditioner(prompts), guidance)
        return denoise if self.merged is None else replace(denoise, network=self.merged[direction])


class AttentionControlled(InvertibleConsistency):
    """iCD whose edits borrow attention from the picture that they edit."""

    @property
    def control(self) -> Control:
        return usual_control(self.network)

    def edit(
        self,
        images: Tensor | None,
        source_prompts: Sequence[str],
        target_prompts: Sequence[str],
        *,
        guidance: GuidanceSchedule,
        control: Control | None = None,
        blended_words: Sequence[BlendedWords] | None = None,
        noise: Tensor | None = None,
        seed: Seed = 0,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Tensor:
        """As `InvertibleConsistency.edit`, with `control` or its own, and the words that each edit blends by.

        options: fields of the control, in the place of its own.
        """
        each = for_each(control or self.control, len(source_prompts), options, blended_words)
        if noise is None:
            noise = self.invert(images, source_prompts, seed=seed, on_step=on_step)
        prompts = (source_prompts, target_prompts)
        latents = self.framed_for(noise).decode_pairs(noise, *prompts, guidance=guidance, control=each, on_step=on_step)
        return self.autoencoder.decode(latents[len(noise) :])


class Untrained(InvertibleConsistency):
    """The guidance-distilled teacher's own weights through the students' jumps: what more steps alone give."""

    uses_students = False

    @classmethod
    def from_family(cls, family: Family, *, students: StudentPaths = None, **settings: Any) -> Untrained:
        """Through the boundaries given, or those of the trained students."""
        paths = dict(students or {})
        text = paths.pop("boundaries", None)
        if text:
            return cls.of_teacher(family, Boundaries.parse(text, allow_off_grid=True))
        return cls.of_teacher(family, common_boundaries(_student_files(family, **paths)))

    @classmethod
    def of_teacher(cls, family: Family, boundaries: Boundaries) -> Untrained:
        students = LoraStudents(family.load_model(guided=True))
        return cls(students, family.load_autoencoder(), family.load_conditioner(), boundaries)


def _student_files(
    family: Family, *, forward: str | None = None, reverse: str | None = None, lora_alpha: float | None = None
) -> dict[Direction, StudentFile]:
    paths: dict[Direction, str | None] = {"forward": forward, "reverse": reverse}
    places = {direction: family.student(direction, path) for direction, path in paths.items()}
    return {direction: StudentFile.read(place, alpha=lora_alpha) for direction, place in places.items()}


def common_boundaries(files: Mapping[Direction, StudentFile]) -> Boundaries:
    stated = {direction: file.boundaries for direction, file in files.items() if file.boundaries is not None}
    if not stated:
        raise ValueError(
            f"{files['reverse'].path} does not say its boundaries; name them, e.g. --boundaries 259,519,779,999"
        )
    if len({tuple(ends) for ends in stated.values()}) > 1:
        raise ValueError(f"the students have different boundaries, {stated}: they do not belong together")
    ends = tuple(next(iter(stated.values())))
    return Boundaries(ends, files["forward"].start_timestep, allow_off_grid=True)
