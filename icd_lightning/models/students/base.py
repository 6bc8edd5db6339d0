"""What a task, a sampler or an editor asks of two students, however their weights are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from icd_lightning.diffusion import DDIMJump, Direction
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.diffusion_model import CFGDenoiser, DiffusionModel, Guidance, GuidedDenoiser

Role = Literal["teacher", "forward", "reverse"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse")


class Students(nn.Module, ABC):
    """A frozen teacher with a guidance embedding, and two students that begin as it.

    The forward model goes image -> noise and is trained unguided, the reverse model noise -> image.

    Args:
        teacher: the model of guidance distillation (stage 1).
    """

    def __init__(self, teacher: DiffusionModel) -> None:
        super().__init__()
        if not teacher.takes_guidance:
            raise ValueError(
                "the students' teacher needs a guidance embedding: pass the model of guidance distillation (stage 1), "
                "which trains it, or begin with an untrained one by with_guidance_embedding()"
            )
        self.model = teacher
        self.network = teacher.network.requires_grad_(False)
        self.process, self.backbone = teacher.process, teacher.backbone
        self.models: dict[Role, DiffusionModel] = {"teacher": replace(teacher, using=partial(self.using, "teacher"))}
        """The network of each role; a subclass adds its students'."""
        self.boundaries: dict[Direction, list[int]] = {}
        """Of students that were loaded: what their files say."""

    def diffusion_models(self) -> list[DiffusionModel]:
        """Every network there is, to be spread over devices or compiled."""
        return [self.model]

    def train(self, mode: bool = True) -> Students:
        """The networks stay in evaluation mode: a frozen teacher has nothing to drop."""
        super().train(mode)
        for model in self.diffusion_models():
            model.network.eval()
        return self

    def using(self, role: Role) -> AbstractContextManager[object]:
        """Entered around each call in a role: the teacher is without gradient."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and role != "teacher")

    def predict(self, role: Role, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor) -> Tensor:
        """Raw network output (B, C, H, W) for x (B, C, H, W) at t (B,) and guidance scale w (B,)."""
        return self.models[role].predict(x, t, conditioning, w)

    @abstractmethod
    def parameters_of(self, direction: Direction) -> list[nn.Parameter]:
        """A student's parameters, for an optimizer: float32."""

    @abstractmethod
    def export(self, direction: Direction, folder: Path, about: Mapping[str, Any]) -> None:
        """Write a student below `folder`, with what there is to say of it."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the students are, beside their teacher: plain values, equal in runs that go on from one another."""

    def freeze(self, direction: Direction) -> None:
        """Take a student out of training."""
        for parameter in self.parameters_of(direction):
            parameter.requires_grad_(False)

    def denoiser(self, role: Role, conditioning: Conditioning, guidance: Guidance) -> GuidedDenoiser | CFGDenoiser:
        """Bind a network to prompt and guidance."""
        return self.models[role].denoiser(conditioning, guidance)

    def jump(self, role: Role, conditioning: Conditioning, guidance: Guidance) -> DDIMJump:
        denoise = self.denoiser(role, conditioning, guidance)
        return DDIMJump(denoise, self.process, set_alpha_to_one=role != "teacher")
