"""Invertible consistency distillation as an editing method: 4 + 4 or 3 + 3 evaluations."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from icd_lightning.diffusion import Boundaries, Denoiser, GuidanceSchedule, NoiseSchedule, OnStep, generate, invert
from icd_lightning.editing.merging import MergedStudent
from icd_lightning.editing.method import EditingMethod, Seed, seeded_noise
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.backbone import UNetDenoiser
from icd_lightning.models.checkpoints import load_student, lora_settings
from icd_lightning.models.family import Family
from icd_lightning.models.students import ADAPTERS, Students
from icd_lightning.models.text import CLIPConditioner, DualCLIPConditioner

log = logging.getLogger(__name__)


class InvertibleConsistency(EditingMethod):
    """A family's frozen parts and its two students; num_segments evaluations to noise, as many back.

    With `merge` a loop runs on the weights of its student merged into the UNet's (see `MergedStudent`), which is
    faster and takes the memory of a second UNet.
    """

    def __init__(
        self,
        students: Students,
        autoencoder: LatentAutoencoder,
        conditioner: CLIPConditioner | DualCLIPConditioner,
        boundaries: Boundaries,
        *,
        merge: bool = False,
    ) -> None:
        self.students, self.autoencoder, self.conditioner = students, autoencoder, conditioner
        self.boundaries, self.merge = boundaries, merge
        self._merged: WeakValueDictionary[str, MergedStudent] = WeakValueDictionary()

    @classmethod
    def from_pretrained(
        cls, family: Family, *, forward: str | None = None, reverse: str | None = None, boundaries: str | None = None
    ) -> InvertibleConsistency:
        """Load a family and its students, by default those in the family's own folder.

        forward, reverse: folders or files of the two students. boundaries: e.g. "259,519,779,999", by default what the
        students' files, or the names of released ones, say. Raises ValueError where nothing says it, or where the two
        students disagree.
        """
        given = None if boundaries is None else Boundaries.parse(boundaries, allow_off_grid=True)
        paths = {"forward": forward, "reverse": reverse}
        paths = {name: path or str(family.root / "students" / name) for name, path in paths.items()}
        students = Students(family.load_unet(guided=True), family.load_schedule(), lora=lora_settings(paths["reverse"]))
        found = {}
        for adapter, direction in ADAPTERS.items():
            about = load_student(students, adapter, paths[direction])
            found[direction] = about.get("boundaries") or boundaries_in_name(Path(paths[direction]).stem)
        ends = given or Boundaries(_common(found, paths), allow_off_grid=True)
        if others := {name: own for name, own in found.items() if own and tuple(own) != ends.boundary_timesteps}:
            log.warning("the students were trained for other boundaries than %s: %s", boundaries, others)
        return cls(students, family.load_autoencoder(), family.load_conditioner(), ends, merge=True)

    def to(self, device: torch.device | str) -> InvertibleConsistency:
        """Move all networks; returns itself."""
        for part in (self.students, self.autoencoder, self.conditioner):
            part.to(device)
        return self

    def nfe(self, *, guidance: GuidanceSchedule | None = None) -> int:
        """Network evaluations of an edit, there and back, whatever its guidance, which is an input of the network."""
        return 2 * self.boundaries.num_segments

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
        return self._sampling("cd", self.students.reverse_model(self.conditioner(prompts), guidance))

    def to_noise(self, latents: Tensor, prompts: Sequence[str], *, seed: Seed, on_step: OnStep | None = None) -> Tensor:
        """Jump up with the forward model, from latents slightly noised by `seed`."""
        return self.climb(latents, prompts, seeded_noise(latents.shape, seed, latents.device), on_step=on_step)

    def climb(self, latents: Tensor, prompts: Sequence[str], noise: Tensor, *, on_step: OnStep | None = None) -> Tensor:
        """Jump up with the forward model, from latents slightly noised by `noise`, (B, C, h, w) both."""
        forward_model = self._sampling("fcd", self.students.forward_model(self.conditioner(prompts)))
        return invert(forward_model, latents, noise, self.boundaries, self.schedule, on_step=on_step)

    def from_noise(self, denoise: Denoiser, noise: Tensor, *, on_step: OnStep | None = None) -> Tensor:
        """Jump down."""
        return generate(denoise, noise, self.boundaries, self.schedule, on_step=on_step)

    def _sampling(self, adapter: str, denoise: UNetDenoiser) -> Denoiser:
        """A student's denoiser as it samples: merged weights are shared by all denoisers that live at a time."""
        if not self.merge:
            return denoise
        network = self._merged.get(adapter) or MergedStudent(self.students, adapter)
        self._merged[adapter] = network
        return replace(denoise, network=network)


def boundaries_in_name(name: str) -> list[int] | None:
    """What the name of a released student says: iCD-SD15-reverse_259_519_779_999, iCD-SD15-forward_19_259_519_779."""
    numbers = re.search(r"(?:_\d+)+$", name)
    if numbers is None:
        return None
    timesteps = [int(number) for number in numbers.group()[1:].split("_")]
    if "forward" in name.lower():  # the forward model's are where its jumps begin, the first of them near the data
        timesteps = [*timesteps[1:], Boundaries.num_train_timesteps - 1]
    return [0, *timesteps]


def _common(found: dict[str, list[int] | None], paths: dict[str, str]) -> tuple[int, ...]:
    """The boundaries that the students' files agree on."""
    said = {name: ends for name, ends in found.items() if ends is not None}
    if not said:
        raise ValueError(
            f"{paths['reverse']} does not say its boundaries; name them, e.g. --boundaries 259,519,779,999"
        )
    if len({tuple(ends) for ends in said.values()}) > 1:
        raise ValueError(f"the students have different boundaries, {said}: they do not belong together")
    return tuple(next(iter(said.values())))
