"""One frozen UNet, two LoRA adapters, three denoisers: teacher, forward model `fcd`, reverse model `cd`.

The public switches of peft (`set_adapter`, `disable_adapters`) also flip `requires_grad`, which autograd reads when it
runs backward: switch between forward and backward, and a student loses its gradients without an error. So both adapters
stay trainable for good, and `using` switches by what a LoRA layer's forward reads, its list of active adapters. All
layers hold the same list object: a switch is one assignment, whatever their number, and an empty list is the bare UNet.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from icd_lightning.diffusion.schedule import NoiseSchedule
from icd_lightning.models.backbone import Guidance, UNetDenoiser, predict
from icd_lightning.models.conditioning import Conditioning

ADAPTERS = {"fcd": "forward", "cd": "reverse"}
"""Adapter names and their directions. A ModuleDict takes no key `forward`, hence the paper's names."""

RELEASED_TARGET_MODULES = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


@dataclass(frozen=True)
class LoraSettings:
    """LoRA of each student; weights count alpha / rank. The defaults are those of the released students."""

    rank: int = 64
    alpha: float = 8
    target_modules: tuple[str, ...] = RELEASED_TARGET_MODULES

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"LoRA rank {self.rank} and alpha {self.alpha} must be positive")

    def config(self) -> LoraConfig:
        """As a configuration of peft."""
        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.target_modules))


class Students(nn.Module):
    """The frozen teacher UNet with both students in it; the memory of one network.

    Takes over the UNet given to it: freezes it and plants the adapters. Both start at zero, that is, as the teacher.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        schedule: NoiseSchedule,
        *,
        lora: LoraSettings | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if unet.config.time_cond_proj_dim is None:
            raise ValueError(
                "the students' UNet needs a guidance embedding (time_cond_proj_dim): pass one of guidance distillation "
                "(stage 1), which trains it, or start from an untrained one by add_guidance_embedding(unet)"
            )
        if any(isinstance(module, BaseTunerLayer) for module in unet.modules()):
            raise ValueError("this UNet already carries adapters: give Students a freshly loaded one")
        self.unet = unet.requires_grad_(False)
        self.schedule = schedule
        self.lora = lora or LoraSettings()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are what we want
            for adapter in ADAPTERS:
                unet.add_adapter(self.lora.config(), adapter)
        unet.time_embedding.register_forward_pre_hook(_refuse_missing_guidance)
        self._layers = {name: module for name, module in unet.named_modules() if isinstance(module, BaseTunerLayer)}
        self._active: list[str] = []
        for layer in self._layers.values():
            layer._active_adapter = self._active
        for adapter in ADAPTERS:
            for weight in self.named_parameters_of(adapter).values():
                weight.data = weight.data.float()  # peft makes them in the type of the base, too coarse for small steps
                weight.requires_grad_(True)
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing(self._checkpointed)

    def train(self, mode: bool = True) -> Students:
        """The UNet stays in evaluation mode: a frozen teacher has nothing to drop."""
        super().train(mode)
        self.unet.eval()
        return self

    # Parameters

    def named_parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by the names of its file: `<module>.lora_A.weight`, `<module>.lora_B.weight`."""
        _check(adapter)
        return {
            f"{name}.{part}.weight": getattr(layer, part)[adapter].weight
            for name, layer in self._layers.items()
            for part in ("lora_A", "lora_B")
        }

    def parameters_of(self, adapter: str) -> list[nn.Parameter]:
        """The adapter's parameters, for an optimizer: float32, and trainable whichever adapter is on."""
        parameters = list(self.named_parameters_of(adapter).values())
        if any(parameter.dtype != torch.float32 for parameter in parameters):
            raise ValueError(
                f"adapter {adapter!r} was cast to {parameters[0].dtype}, in which small steps are lost: load the UNet "
                "in half precision instead of casting the students (precision 32-true or bf16-mixed, not bf16-true)"
            )
        return parameters

    # Switching

    @property
    def active(self) -> str | None:
        """The adapter that is on, or None for the teacher."""
        return self._active[0] if self._active else None

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Turn one adapter on (None: both off) and restore what was; `requires_grad` is left alone."""
        if adapter is not None:
            _check(adapter)
        before = self._active[:]
        self._active[:] = [] if adapter is None else [adapter]
        try:
            yield
        finally:
            self._active[:] = before

    def _checkpointed(self, module: nn.Module, *args) -> Tensor:
        """Checkpoint one block of the UNet; its second run, during backward, uses the adapter of the first."""
        adapter = self.active

        def run(*args):
            with self.using(adapter):
                return module(*args)

        # compiled code is of one adapter, in its second run too; and `using` it could not take in.
        # In evaluation mode a UNet draws no random numbers, so there is no state to preserve
        block = module if torch.compiler.is_compiling() else run
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)

    # Networks

    def predict(self, adapter: str | None, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor) -> Tensor:
        """Raw network output (B, C, H, W), eps or v, for x (B, C, H, W) at t (B,) and guidance scale w (B,)."""
        if any(layer._active_adapter is not self._active or layer._disable_adapters for layer in self._layers.values()):
            raise ValueError(
                "peft or diffusers switched the adapters (set_adapter, disable_adapters, load_lora_weights, ...), "
                "which also stops gradients: build Students anew, and switch by Students.using"
            )
        with self.using(adapter):
            return predict(self.unet, x, t, conditioning, w)

    def denoiser(self, adapter: str | None, conditioning: Conditioning, guidance: Guidance) -> UNetDenoiser:
        """Bind adapter (None: the teacher, without gradient), prompt and guidance to a callable eps = denoise(x, t)."""

        return UNetDenoiser(_Network(self, adapter), self.schedule, conditioning, guidance)

    def teacher(self, conditioning: Conditioning, guidance: Guidance) -> UNetDenoiser:
        """The bare UNet, without gradient."""
        return self.denoiser(None, conditioning, guidance)

    def forward_model(self, conditioning: Conditioning, guidance: Guidance = 1.0) -> UNetDenoiser:
        """Image -> noise; it is trained unguided."""
        return self.denoiser("fcd", conditioning, guidance)

    def reverse_model(self, conditioning: Conditioning, guidance: Guidance) -> UNetDenoiser:
        """Noise -> image."""
        return self.denoiser("cd", conditioning, guidance)


@dataclass(frozen=True)
class _Network:
    """The UNet with one adapter; equal to another of the same, so that calls of both can be made as one batch."""

    students: Students
    adapter: str | None

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.adapter is not None):
            return self.students.predict(self.adapter, x, t, conditioning, w)


def _check(adapter: str) -> None:
    if adapter not in ADAPTERS:
        raise ValueError(f"no adapter {adapter!r}: 'fcd' is the forward model (image -> noise), 'cd' the reverse model")


def _refuse_missing_guidance(module: nn.Module, args: tuple) -> None:
    """diffusers runs a UNet without its guidance embedding in silence, unguided; this hook makes that an error."""
    if len(args) < 2 or args[1] is None:
        raise ValueError("this UNet was called without timestep_cond, its guidance embedding: call Students.predict")
