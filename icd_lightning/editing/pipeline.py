"""Invert, generate, edit: what the two students are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icd_lightning.diffusion import (
    Boundaries,
    Denoiser,
    GuidanceSchedule,
    OnStep,
    StepGuidance,
    generate,
    invert,
)
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.checkpoints import load_student, lora_settings
from icd_lightning.models.family import Family
from icd_lightning.models.students import Students
from icd_lightning.models.text import CLIPConditioner

UNGUIDED = StepGuidance(1.0)


def seeded_noise(shape: Sequence[int], seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise (B, C, H, W) in which sample i depends on seed + i alone, not on the batch or the device."""
    count, *rest = shape
    samples = [torch.randn(rest, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
    return torch.stack(samples).to(device)


@dataclass(frozen=True)
class PromptSwap:
    """eps = denoise(x, t) with the source's denoiser for t > tau T and the target's below: the early steps keep layout."""

    source: Denoiser
    target: Denoiser
    tau: float
    num_train_timesteps: int = 1000
    nfe: int = 1

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        above = bool((t > self.tau * self.num_train_timesteps).all())  # one t for the whole batch, when sampling
        return (self.source if above else self.target)(x, t)


class InvertibleConsistencyPipeline:
    """A family's frozen parts and its two students, from pictures (B, 3, H, W) in [-1, 1] to pictures.

    Latents are (B, C, h, w), scaled. Guidance is any `GuidanceSchedule`; w = 1 is unguided. Inversion is unguided, as
    the forward model is trained. `on_step` is called after each network evaluation (see `diffusion.sampling`).
    """

    def __init__(
        self, students: Students, autoencoder: LatentAutoencoder, conditioner: CLIPConditioner, boundaries: Boundaries
    ) -> None:
        self.students, self.autoencoder, self.conditioner = students, autoencoder, conditioner
        self.boundaries = boundaries

    @classmethod
    def from_pretrained(
        cls, family: Family, *, forward: str | None = None, reverse: str | None = None, boundaries: str | None = None
    ) -> InvertibleConsistencyPipeline:
        """Load a family and its students, by default those that the family ships.

        forward, reverse: folders or files of the two students. boundaries: e.g. "259,519,779,999", by default what the
        reverse student's file says. Raises ValueError where neither says it, or where the two students disagree.
        """
        forward, reverse = (path or str(family.root / "students" / name) for path, name in zip((forward, reverse), ("forward", "reverse"), strict=True))
        students = Students(family.load_unet(guided=True), family.load_schedule(), lora=lora_settings(reverse))
        found = {name: load_student(students, adapter, path).get("boundaries") for name, adapter, path in (("forward", "fcd", forward), ("reverse", "cd", reverse))}
        if boundaries is None:
            if found["reverse"] is None:
                raise ValueError(f"{reverse} does not say its boundaries; name them, e.g. --boundaries 259,519,779,999")
            if found["forward"] not in (None, found["reverse"]):
                raise ValueError(f"the students have different boundaries, {found}: they do not belong together")
            boundaries = ",".join(map(str, found["reverse"]))
        ends = Boundaries.parse(boundaries, allow_off_grid=True)
        return cls(students, family.load_autoencoder(), family.load_conditioner(), ends)

    @property
    def schedule(self):
        """The noise schedule of teacher and students."""
        return self.students.schedule

    def latent_shape(self, count: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape of the latents of `count` pictures of height x width pixels."""
        factor = self.autoencoder.downsampling
        return (count, self.autoencoder.latent_channels, height // factor, width // factor)

    @torch.no_grad()
    def invert(
        self, images: Tensor, prompts: Sequence[str], *, seed: int = 0, on_step: OnStep | None = None
    ) -> Tensor:
        """Encode pictures (B, 3, H, W) with their prompts to noise (B, C, h, w): num_segments evaluations."""
        latents = self.autoencoder.encode(images)
        noise = seeded_noise(latents.shape, seed, latents.device)
        forward_model = self.students.forward_model(self.conditioner(prompts))
        return invert(forward_model, latents, noise, self.boundaries, self.schedule, on_step=on_step)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        *,
        guidance: GuidanceSchedule = UNGUIDED,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Decode noise (B, C, h, w), drawn or inverted, to pictures (B, 3, H, W): num_segments evaluations."""
        return self._decode(self.students.reverse_model(self.conditioner(prompts), guidance), noise, on_step)

    @torch.no_grad()
    def swap(
        self,
        noise: Tensor,
        source_prompts: Sequence[str],
        target_prompts: Sequence[str],
        *,
        guidance: GuidanceSchedule,
        swap_tau: float,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Decode inverted noise (B, C, h, w) with the target prompts, the source's while t > swap_tau T."""
        reverse = self.students.reverse_model
        denoise = PromptSwap(
            reverse(self.conditioner(source_prompts), UNGUIDED), reverse(self.conditioner(target_prompts), guidance), swap_tau
        )
        return self._decode(denoise, noise, on_step)

    def edit(
        self,
        images: Tensor,
        source_prompts: Sequence[str],
        target_prompts: Sequence[str],
        *,
        guidance: GuidanceSchedule,
        swap_tau: float = 0.8,
        seed: int = 0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Edit pictures (B, 3, H, W): invert with the source prompts, decode with the target's."""
        noise = self.invert(images, source_prompts, seed=seed, on_step=on_step)
        return self.swap(
            noise, source_prompts, target_prompts, guidance=guidance, swap_tau=swap_tau, on_step=on_step
        )

    def _decode(self, denoise: Denoiser, noise: Tensor, on_step: OnStep | None) -> Tensor:
        return self.autoencoder.decode(generate(denoise, noise, self.boundaries, self.schedule, on_step=on_step))
