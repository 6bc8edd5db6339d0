"""Full fine-tuning: each student is a network of its own, in float32, beside the frozen teacher."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from icd_lightning.diffusion import Direction
from icd_lightning.files import replaced_folder
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.students.base import DIRECTIONS, Students


class FullStudents(Students):
    """Both students as copies of the teacher's network: three times its memory, and everything is trained.

    Args:
        teacher: the model of guidance distillation (stage 1), not quantized.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
    """

    def __init__(self, teacher: DiffusionModel, *, gradient_checkpointing: bool = False) -> None:
        super().__init__(teacher)
        if any(type(weight.data) is not Tensor for weight in self.network.parameters()):  # torchao's own kinds
            raise ValueError(
                "FullStudents trains copies of the teacher, whose weights are kept in fewer bits: leave out "
                "family.quantization, or take LoraStudents, adapters on the frozen base"
            )
        copies = {direction: copy.deepcopy(self.network).float().requires_grad_(True) for direction in DIRECTIONS}
        self.copies = nn.ModuleDict({f"{d}_model": network for d, network in copies.items()})  # `forward` is no key
        for direction, network in copies.items():
            self.models[direction] = replace(teacher, network=network)
            if gradient_checkpointing:
                network.enable_gradient_checkpointing()

    def diffusion_models(self) -> list[DiffusionModel]:
        return list(self.models.values())

    def parameters_of(self, direction: Direction) -> list[nn.Parameter]:
        return list(self.models[direction].network.parameters())

    def export(self, direction: Direction, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the network to `<direction>/` in diffusers' layout, with icd.json beside it."""
        with replaced_folder(folder / direction) as temporary:
            self.models[direction].network.save_pretrained(temporary)
            (temporary / "icd.json").write_text(json.dumps({"direction": direction, **about}, indent=2) + "\n")

    def settings(self) -> dict[str, Any]:
        return {"students": "full"}
