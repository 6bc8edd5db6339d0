"""Students merged into their network's weights while they sample: a LoRA layer takes three calls, a merged one one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakValueDictionary

import psutil
import torch
from torch import Tensor, nn

from icd_lightning.diffusion import Direction
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.students import LoraStudents

log = logging.getLogger(__name__)
SHARE = 0.25  # of the memory that is free on a device, what merged weights may take for good
MIB = 2**20


class _Layer(NamedTuple):
    """A layer with LoRA: whose child it is, under which name; itself, merged, and the weights W, A, B it is made of."""

    holder: nn.Module
    name: str
    own: nn.Module
    merged: nn.Module
    made_of: list[tuple[nn.Parameter, Tensor, int]]


class MergedStudent:
    """network(x, t, conditioning, w) of one student on weights W + s B A, made at the first call and kept.

    It does not follow its student's training: ask `MergedStudents` for each loop anew. The network holds merged layers
    during a call, and its own at all other times. The student runs as ever where gradients are wanted, in half
    precision, where small updates would be rounded away, in a quantized network, and in one that is offloaded by parts.
    A compiled network has one code for both students, since their merged weights are arguments of it.
    """

    def __init__(self, students: LoraStudents, direction: Direction) -> None:
        self.students, self.direction = students, direction
        self._layers: list[_Layer] = []
        weights = [layer.base_layer.weight for layer, *_ in students.layers_of(direction).values()]
        self._quantized = any(type(weight.data) is not Tensor for weight in weights)
        self.nbytes = sum(weight.nbytes for weight in weights)

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not self.mergeable:
            return self.students.predict(self.direction, x, t, conditioning, w)
        self._layers = self._layers or list(self._merge())
        try:
            for layer in self._layers:  # setattr takes as long as a small layer
                layer.holder._modules[layer.name] = layer.merged
            return self.students.predict("teacher", x, t, conditioning, w)
        finally:
            for layer in self._layers:
                layer.holder._modules[layer.name] = layer.own

    @property
    def holds(self) -> bool:
        """Whether the weights are where and what they were when it was merged."""
        return all(
            weight.data_ptr() == data.data_ptr() and _version(weight) == version
            for layer in self._layers
            for weight, data, version in layer.made_of
        )

    @property
    def device(self) -> torch.device:
        return self.students.backbone.weight(self.students.network).device

    @property
    def mergeable(self) -> bool:
        network = self.students.network
        weight = self.students.backbone.weight(network)
        scattered = weight.is_meta or hasattr(network, "_diffusers_hook")  # sequential offloading, group offloading
        return not scattered and not self._quantized and weight.dtype == torch.float32

    def _merge(self) -> Iterator[_Layer]:
        scale = self.students.lora.alpha / self.students.lora.rank
        for path, (layer, down, up) in self.students.layers_of(self.direction).items():
            parent, _, name = path.rpartition(".")
            base = layer.base_layer
            # a convolution's A is as its weight, and its B of 1 x 1: flat, both are matrices as a linear layer's are
            flat = torch.addmm(base.weight.flatten(1), up.flatten(1), down.flatten(1), alpha=scale)
            merged = nn.Parameter(flat.view_as(base.weight), False)
            shared = {id(base.weight): merged, id(base.bias): base.bias}
            # the data are kept, too, lest others come to lie at their address
            made_of = [(weight, weight.data, _version(weight)) for weight in (base.weight, down, up)]
            holder = self.students.network.get_submodule(parent)
            yield _Layer(holder, name, layer, copy.deepcopy(base, shared), made_of)


class MergedStudents:
    """Both students of a network, merged: kept for good where the device's memory allows, else while a loop runs."""

    def __init__(self, students: LoraStudents) -> None:
        self.students = students
        self._alive: WeakValueDictionary[Direction, MergedStudent] = WeakValueDictionary()
        self._kept: dict[Direction, MergedStudent] = {}
        self._device: torch.device | None = None
        self.keep_merged = False

    def __reduce__(self) -> tuple[type[MergedStudents], tuple[LoraStudents]]:
        """Copies and pickles begin anew: what is merged is of these students, and they may move or train apart."""
        return MergedStudents, (self.students,)

    def __getitem__(self, direction: Direction) -> MergedStudent:
        """The network of a student for a loop; one for all that run at a time, until its weights change."""
        network = self._alive.get(direction)
        if network is None or not network.holds:
            network = self._alive[direction] = MergedStudent(self.students, direction)
        if network.mergeable and network.device != self._device:
            self._choose(2 * network.nbytes, network.device)
        if self.keep_merged:
            self._kept[direction] = network
        return network

    def _choose(self, needed: int, device: torch.device) -> None:
        free, offloaded = free_memory(device), hasattr(self.students.network, "_hf_hook")  # which goes between calls
        self._device, self._kept, self.keep_merged = device, {}, not offloaded and needed <= SHARE * free
        how = "both students are kept merged" if self.keep_merged else "students are merged for each loop"
        log.info("%s: together %d MiB, of %d MiB free on %s", how, needed // MIB, free // MIB, device)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    module = torch.get_device_module(device)
    return module.mem_get_info(device)[0] if hasattr(module, "mem_get_info") else psutil.virtual_memory().available


def _version(weight: Tensor) -> int:
    """How often it was written to; of weights made in inference mode nobody counts."""
    return 0 if weight.is_inference() else weight._version
