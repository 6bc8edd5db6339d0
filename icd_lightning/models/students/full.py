"""Full fine-tuning: each student is a network of its own, in float32, beside the frozen teacher."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from icd_lightning.diffusion import Direction
from icd_lightning.files import replaced_folder
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.students.base import DIRECTIONS, Role, Students


class FullStudents(Students):
    """Both students as copies of the teacher's network: three times its memory, and everything is trained.

    Args:
        teacher: the model of guidance distillation (stage 1).
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
    """

    def __init__(self, teacher: DiffusionModel, *, gradient_checkpointing: bool = False) -> None:
        super().__init__(teacher)
        self.copies = nn.ModuleDict({_key(d): copy.deepcopy(self.network).float() for d in DIRECTIONS})
        self.copies.requires_grad_(True)
        for network in self.copies.values() if gradient_checkpointing else ():
            network.enable_gradient_checkpointing()

    def diffusion_models(self) -> list[DiffusionModel]:
        """The teacher and both students."""
        return [self.model, *(self._model_of(direction) for direction in DIRECTIONS)]

    def predict(self, role: Role, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor) -> Tensor:
        """Raw network output (B, C, H, W) for x (B, C, H, W) at t (B,) and guidance scale w (B,)."""
        model = self.model if role == "teacher" else self._model_of(role)
        return model.predict(x, t, conditioning, w)

    def parameters_of(self, direction: Direction) -> list[nn.Parameter]:
        """All of a copy's parameters."""
        return list(self.copies[_key(direction)].parameters())

    def export(self, direction: Direction, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the network to `<direction>/` in diffusers' layout, with icd.json beside it."""
        with replaced_folder(folder / direction) as temporary:
            self.copies[_key(direction)].save_pretrained(temporary)
            (temporary / "icd.json").write_text(json.dumps({"direction": direction, **about}, indent=2) + "\n")

    def settings(self) -> dict[str, Any]:
        """Nothing but their kind."""
        return {"students": "full"}

    def _model_of(self, direction: Direction) -> DiffusionModel:
        return DiffusionModel(self.copies[_key(direction)], self.process, self.backbone)


def _key(direction: Direction) -> str:
    return f"{direction}_model"  # a ModuleDict takes no key `forward`
