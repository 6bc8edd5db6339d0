"""One frozen network, two LoRA adapters, three denoisers: teacher, forward model `fcd`, reverse model `cd`.

The public switches of peft (`set_adapter`, `disable_adapters`) also flip `requires_grad`, which autograd reads when it
runs backward: switch between forward and backward, and a student loses its gradients without an error. So both adapters
stay trainable for good, and `using` switches by what a LoRA layer's forward reads, its list of active adapters. All
layers share one list object: a switch is one assignment, whatever their number, and an empty list is the bare network.

Two private attributes of peft's layers are used: `_active_adapter`, the list, is set, `_disable_adapters` read. There
is no public way to switch without touching `requires_grad`; pyproject.toml pins the range that tests guard. So is its
`LoraVariant`, by which each layer adds its adapter up (`LeanLora`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from icd_lightning.diffusion import Direction
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.student_file import StudentFile, write_diffusers, write_kohya
from icd_lightning.models.students.base import DIRECTIONS, Role, Students

ADAPTERS: dict[Direction, str] = {"forward": "fcd", "reverse": "cd"}
"""Names of adapters. A ModuleDict takes no key `forward`, hence the paper's names."""


@dataclass(frozen=True)
class LoraSettings:
    """LoRA of each student; weights count alpha / rank. The defaults are those of the released students.

    target_modules: endings of the names of the layers to adapt; None: the architecture's usual ones.
    """

    rank: int = 64
    alpha: float = 8
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < float("inf"):
            raise ValueError(f"LoRA rank {self.rank} and alpha {self.alpha} must be positive and finite")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("LoRA target_modules are none: name layers, or leave it out for the usual ones")


class LeanLora(LoraVariant):
    """y + B s A x, with as little to move beside the frozen layer's y as can be.

    peft multiplies B A x by s, which is of y's size, where A x has but `rank` channels; and under autocast it makes x
    float32, which A makes half precision again. Merging is peft's own.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """y (B, ..., out) or (B, out, H, W) of the layer for x, with the adapter."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        device = x.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):  # of meta it is not
            x = x.to(down.weight.dtype)
        return result + up(down(x) * module.scaling[active_adapter])

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W + s B A."""
        return orig_weight + module.get_delta_weight(active_adapter)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """W += s B A."""
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W of W + s B A."""
        return orig_weight - module.get_delta_weight(active_adapter)


class LoraStudents(Students):
    """Both students as adapters in the teacher's own network; the memory of one.

    Takes over the network given to it: freezes it and plants the adapters. Both begin at zero, that is, as the teacher.

    Args:
        teacher: the model of guidance distillation (stage 1).
        lora: rank, alpha and layers.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        forward, reverse: a student to begin with, ours or a released file; its rank and alpha must be those of `lora`.
    """

    def __init__(
        self,
        teacher: DiffusionModel,
        *,
        lora: LoraSettings = LoraSettings(),
        gradient_checkpointing: bool = False,
        forward: str | None = None,
        reverse: str | None = None,
    ) -> None:
        super().__init__(teacher)
        if any(isinstance(module, BaseTunerLayer) for module in self.network.modules()):
            raise ValueError("this network already carries adapters: give students a freshly loaded one")
        self.lora = lora
        roles: tuple[Role, ...] = ("teacher", *DIRECTIONS)
        self.models = {role: replace(teacher, using=partial(self._called, role)) for role in roles}
        self._plant(lora.target_modules or self.backbone.lora_targets)
        self.backbone.require_guidance(self.network)
        named = self.network.named_modules()
        self._layers = {name: module for name, module in named if isinstance(module, BaseTunerLayer)}
        self._active: list[str] = []
        for layer in self._layers.values():
            layer._active_adapter, layer.cast_input_dtype_enabled = self._active, False
            layer.lora_variant.update(dict.fromkeys(ADAPTERS.values(), LeanLora()))
        for direction in DIRECTIONS:
            for weight in self.named_parameters_of(direction).values():
                weight.data = weight.data.float()  # peft makes them in the type of the base, too coarse for small steps
                weight.requires_grad_(True)
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing(self._checkpointed)
        for direction, path in (("forward", forward), ("reverse", reverse)):
            if path is not None:
                self.load(direction, StudentFile.read(path, alpha=lora.alpha))

    def _plant(self, targets: tuple[str, ...]) -> None:
        modules = dict(self.network.named_modules())
        named = [name for name in modules if any(name == target or name.endswith(f".{target}") for target in targets)]
        bare = [name for name in named if not any(True for _ in modules[name].parameters(recurse=False))]  # no layers
        if len(named) == len(bare):
            raise ValueError(
                f"no layer of {type(self.network).__name__} is named like the LoRA target_modules {', '.join(targets)}"
                f": name some of its layers, for example {next((name for name in reversed(modules) if name), 'none')}"
            )
        config = LoraConfig(
            r=self.lora.rank, lora_alpha=self.lora.alpha, target_modules=list(targets), exclude_modules=bare or None
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are what we want
            for adapter in ADAPTERS.values():
                if hasattr(self.network, "add_adapter"):
                    self.network.add_adapter(config, adapter)
                else:  # a class that says nothing of adapters, such as PixArt's: what diffusers does for the others
                    inject_adapter_in_model(config, self.network, adapter)

    # Parameters

    def layers_of(self, direction: Direction) -> dict[str, tuple[BaseTunerLayer, nn.Parameter, nn.Parameter]]:
        """A student's layers by name: the adapted layer, A and B."""
        adapter = ADAPTERS[direction]
        return {
            name: (layer, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
            for name, layer in self._layers.items()
        }

    def named_parameters_of(self, direction: Direction) -> dict[str, nn.Parameter]:
        """A student's parameters by the names of its file: `<module>.lora_A.weight`, `<module>.lora_B.weight`."""
        return {
            f"{name}.{part}.weight": weight
            for name, (_, *weights) in self.layers_of(direction).items()
            for part, weight in zip(("lora_A", "lora_B"), weights, strict=True)
        }

    def parameters_of(self, direction: Direction) -> list[nn.Parameter]:
        """A student's parameters, for an optimizer: float32, and trainable whichever adapter is on."""
        parameters = list(self.named_parameters_of(direction).values())
        if any(parameter.dtype != torch.float32 for parameter in parameters):
            raise ValueError(
                f"the {direction} model was cast to {parameters[0].dtype}, in which small steps are lost: load the "
                "network in half precision and leave students alone (precision 32-true or bf16-mixed, not bf16-true)"
            )
        return parameters

    # Files

    def load(self, direction: Direction, file: StudentFile) -> None:
        """Take a student from its file. Every key and shape must fit, and so must alpha, rank and direction."""
        ours = self.process.settings
        if not self.process.is_of(theirs := file.about.get("process", ours)):
            told = "; of a flow the resolution fixes the shift: name it by --trained_at, of icd fit family.trained_at"
            raise ValueError(
                f"{file.path} was trained for the process {theirs}, and this network's is {ours}"
                f"{told if 'shift' in ours else ''}"
            )
        if file.direction not in (None, direction):
            raise ValueError(f"{file.path} holds the {file.direction} model, and is given as the {direction} model")
        if (file.rank, file.alpha) != (self.lora.rank, self.lora.alpha):
            raise ValueError(
                f"{file.path} has LoRA rank {file.rank} and alpha {file.alpha:g}, the students {self.lora.rank} and "
                f"{self.lora.alpha:g}: give them rank {file.rank} and alpha {file.alpha:g} (students.init_args.lora)"
            )
        targets, ends = self.named_parameters_of(direction), file.boundaries
        with torch.no_grad():
            for name, weight in file.fitted(targets).items():
                targets[name].copy_(weight)
        if ends is not None:
            self.boundaries[direction] = ends

    def file(self, direction: Direction, about: Mapping[str, Any]) -> StudentFile:
        """A student as a file's content, on the CPU."""
        parameters = self.named_parameters_of(direction)
        weights = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
        targets = self.lora.target_modules or self.backbone.lora_targets
        known = {"adapter": ADAPTERS[direction], "direction": direction, "process": self.process.settings}
        return StudentFile(weights, self.lora.rank, self.lora.alpha, {**known, **about}, targets, self.backbone.part)

    def export(self, direction: Direction, folder: Path, about: Mapping[str, Any]) -> None:
        """Write `<direction>/`, which plain diffusers loads, and `kohya/<direction>.safetensors` for other programs."""
        file = self.file(direction, about)
        write_diffusers(file, folder / direction)
        write_kohya(file, folder / "kohya" / f"{direction}.safetensors")

    def settings(self) -> dict[str, Any]:
        """Rank, alpha, and the adapted layers."""
        return {"students": "lora", **asdict(self.lora)}

    # Switching

    @property
    def active(self) -> Role:
        """The role that the network is in."""
        return next((role for role, adapter in ADAPTERS.items() if [adapter] == self._active), "teacher")

    @contextmanager
    def using(self, role: Role) -> Iterator[None]:
        """Turn one adapter on (teacher: both off) and restore what was; `requires_grad` is left alone."""
        before = self._active[:]
        self._active[:] = [] if role == "teacher" else [ADAPTERS[role]]
        try:
            with super().using(role):
                yield
        finally:
            self._active[:] = before

    def _called(self, role: Role) -> AbstractContextManager[None]:
        """`using`, once for each call; blocks that are checkpointed need not look at all layers again."""
        if any(layer._active_adapter is not self._active or layer._disable_adapters for layer in self._layers.values()):
            raise ValueError(
                "peft or diffusers switched the adapters (set_adapter, disable_adapters, load_lora_weights, ...), "
                "which also stops gradients: build students anew, and switch by LoraStudents.using"
            )
        return self.using(role)

    def _checkpointed(self, module: nn.Module, *args) -> Tensor:
        """Checkpoint one block of the network; its second run, during backward, uses the adapter of the first."""
        role = self.active

        def run(*args):
            with self.using(role):
                return module(*args)

        # compiled code is of one adapter, in its second run too; and `using` it could not take in.
        # In evaluation mode a network draws no random numbers, so there is no state to preserve
        block = module if torch.compiler.is_compiling() else run
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
