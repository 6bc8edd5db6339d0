"""Invertible consistency distillation as an editing method: 4 + 4 or 3 + 3 evaluations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icd_lightning.diffusion import Boundaries, Denoiser, GuidanceSchedule, NoiseSchedule, OnStep, generate, invert
from icd_lightning.editing.method import EditingMethod, seeded_noise
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.checkpoints import load_student, lora_settings
from icd_lightning.models.family import Family
from icd_lightning.models.students import ADAPTERS, Students
from icd_lightning.models.text import CLIPConditioner


class InvertibleConsistencyPipeline(EditingMethod):
    """A family's frozen parts and its two students; num_segments evaluations to noise, as many back."""

    def __init__(
        self, students: Students, autoencoder: LatentAutoencoder, conditioner: CLIPConditioner, boundaries: Boundaries
    ) -> None:
        self.students, self.autoencoder, self.conditioner = students, autoencoder, conditioner
        self.boundaries = boundaries

    @classmethod
    def from_pretrained(
        cls, family: Family, *, forward: str | None = None, reverse: str | None = None, boundaries: str | None = None
    ) -> InvertibleConsistencyPipeline:
        """Load a family and its students, by default those in the family's own folder.

        forward, reverse: folders or files of the two students. boundaries: e.g. "259,519,779,999", by default what the
        students' files say. Raises ValueError where neither says it, or where the two students disagree.
        """
        paths = {"forward": forward, "reverse": reverse}
        paths = {name: path or str(family.root / "students" / name) for name, path in paths.items()}
        students = Students(family.load_unet(guided=True), family.load_schedule(), lora=lora_settings(paths["reverse"]))
        found = {
            direction: load_student(students, adapter, paths[direction]).get("boundaries")
            for adapter, direction in ADAPTERS.items()
        }
        ends = Boundaries.parse(boundaries or _common(found, paths), allow_off_grid=True)
        return cls(students, family.load_autoencoder(), family.load_conditioner(), ends)

    def to(self, device: torch.device | str) -> InvertibleConsistencyPipeline:
        """Move all networks; returns itself."""
        for part in (self.students, self.autoencoder, self.conditioner):
            part.to(device)
        return self

    @property
    def resolution(self) -> int:
        """Pixels of a side of the pictures that the UNet was trained on."""
        return int(self.students.unet.config.sample_size) * self.autoencoder.downsampling

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of teacher and students."""
        return self.students.schedule

    def denoiser(self, prompts: Sequence[str], guidance: GuidanceSchedule) -> Denoiser:
        """The reverse model."""
        return self.students.reverse_model(self.conditioner(prompts), guidance)

    def to_noise(self, latents: Tensor, prompts: Sequence[str], *, seed: int, on_step: OnStep | None = None) -> Tensor:
        """Jump up with the forward model, from latents slightly noised by `seed`."""
        forward_model = self.students.forward_model(self.conditioner(prompts))
        noise = seeded_noise(latents.shape, seed, latents.device)
        return invert(forward_model, latents, noise, self.boundaries, self.schedule, on_step=on_step)

    def from_noise(self, denoise: Denoiser, noise: Tensor, *, on_step: OnStep | None = None) -> Tensor:
        """Jump down."""
        return generate(denoise, noise, self.boundaries, self.schedule, on_step=on_step)


def _common(found: dict[str, list[int] | None], paths: dict[str, str]) -> str:
    """The boundaries that the students' files agree on."""
    said = {name: ends for name, ends in found.items() if ends is not None}
    if not said:
        raise ValueError(
            f"{paths['reverse']} does not say its boundaries; name them, e.g. --boundaries 259,519,779,999"
        )
    if len({tuple(ends) for ends in said.values()}) > 1:
        raise ValueError(f"the students have different boundaries, {said}: they do not belong together")
    return ",".join(map(str, next(iter(said.values()))))
