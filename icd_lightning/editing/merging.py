"""A student merged into its network's weights while a loop runs: a LoRA layer takes three calls, a merged one one."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from icd_lightning.diffusion import Direction
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.students import LoraStudents


class MergedStudent:
    """network(x, t, conditioning, w) of one student on weights W + s B A, made at the first call and kept.

    Make one for each loop: it does not follow its student's training. The network holds merged layers during a call,
    and its own at all other times. The student runs as ever where gradients are wanted, in half precision, where small
    updates would be rounded away, and in a network that is compiled or offloaded by parts.
    """

    def __init__(self, students: LoraStudents, direction: Direction) -> None:
        self.students, self.direction = students, direction
        self._merged: list[tuple[nn.Module, str, nn.Module, nn.Module]] | None = None
        self._quantized = any(type(weight.data) is not Tensor for weight in students.network.parameters())

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not self._mergeable:
            return self.students.predict(self.direction, x, t, conditioning, w)
        if self._merged is None:
            self._merged = list(self._merge())
        try:
            for holder, name, merged, _ in self._merged:
                setattr(holder, name, merged)
            return self.students.predict("teacher", x, t, conditioning, w)
        finally:
            for holder, name, _, layer in self._merged:
                setattr(holder, name, layer)

    @property
    def _mergeable(self) -> bool:
        network = self.students.network
        weight = self.students.backbone.weight(network)
        scattered = weight.is_meta or hasattr(network, "_diffusers_hook")  # sequential offloading, group offloading
        # torch has no public way to ask whether a module was compiled in place
        plain = network._compiled_call_impl is None and not self._quantized
        return not scattered and plain and weight.dtype == torch.float32

    def _merge(self) -> Iterator[tuple[nn.Module, str, nn.Module, nn.Module]]:
        """For each layer with LoRA: whose child it is, under which name, the merged layer, and itself."""
        parameters, lora = self.students.named_parameters_of(self.direction), self.students.lora
        for key, down in parameters.items():
            if not key.endswith(".lora_A.weight"):
                continue
            path = key.removesuffix(".lora_A.weight")
            up = parameters[f"{path}.lora_B.weight"]
            parent, _, name = path.rpartition(".")
            holder = self.students.network.get_submodule(parent)
            layer = getattr(holder, name)
            weight = layer.base_layer.weight
            # a convolution's A is as its weight, and its B of 1 x 1: flat, both are matrices as a linear layer's are
            flat = torch.addmm(weight.flatten(1), up.flatten(1), down.flatten(1), alpha=lora.alpha / lora.rank)
            merged = nn.Parameter(flat.view_as(weight), False)
            yield holder, name, copy.deepcopy(layer.base_layer, {id(weight): merged}), layer
