"""The protocol of all editing methods: invert and edit pictures (B, 3, H, W) in [-1, 1].

`PictureMethod` is that protocol. `EditingMethod` adds what holds where a picture becomes plain noise and nothing else,
as in iCD and DDIM: such noise can also be drawn. The baselines that keep more than noise are in `baselines/`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from icd_lightning.diffusion import VP, Denoiser, Flow, GuidanceSchedule, OnStep, Process, Split, Step, StepGuidance
from icd_lightning.editing.limits import check_fraction, check_seed
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.family import Family
from icd_lightning.models.text import Conditioner, DualCLIPConditioner

UNGUIDED = StepGuidance(1.0)
Method = TypeVar("Method", bound="PictureMethod")

Seed = int | Sequence[int]
"""Of a batch: sample i has seed + i, or the i-th of B seeds."""

StudentPaths = Mapping[str, str | None] | None
"""Where iCD's students are: what `InvertibleConsistency.from_pretrained` takes beside the family, all or some of it."""


def seeded_noise(shape: Sequence[int], seed: Seed, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise (B, C, H, W); a sample depends on its own seed alone, not on the batch or the device."""
    count, *rest = shape
    samples = [torch.randn(rest, generator=torch.Generator().manual_seed(one)) for one in seeds_of(seed, count)]
    return torch.stack(samples).to(device)


def seeds_of(seed: Seed, count: int) -> list[int]:
    seeds = [int(seed) + i for i in range(count)] if isinstance(seed, Integral) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} samples: give one number, or a seed for each")
    return [check_seed(one) for one in seeds]


@dataclass(eq=False)
class PromptSwap:
    """(x0, eps) = denoise(x, t) by the source's denoiser for t > tau T, else the target's: early steps keep layout."""

    source: Denoiser
    target: Denoiser
    tau: float
    num_train_timesteps: int = 1000
    nfe: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        check_fraction(self.tau, "swap_tau")

    def __call__(self, x: Tensor, t: Tensor) -> Split:
        above = bool((t > self.tau * self.num_train_timesteps).all())  # one t for the whole batch, when sampling
        denoise = self.source if above else self.target
        split = denoise(x, t)
        self.nfe = int(getattr(denoise, "nfe", 1))
        return split


class PictureMethod(ABC):
    """What every way to edit offers, for pictures (B, 3, H, W) and B prompts.

    `edit(pictures, source_prompts, target_prompts, guidance=..., seed=..., on_step=...)` edits them. What `invert`
    returns is the method's own; `generate(prompts, inverted)` decodes it, and so reconstructs. `on_step` is called
    after each step with the evaluations that it took of one picture (see `diffusion.jumps`).
    """

    version: ClassVar[int] = 1
    """Raised by whoever changes what the method computes: results of another version are not reused."""
    reads_source: ClassVar[bool] = True
    """What an edit becomes depends on the source prompt."""
    uses_students: bool = False
    """Runs on iCD's students, so that its results depend on them."""
    needs: ClassVar[type[Process]] = Process
    """The kind of process that its networks are trained on."""

    network: nn.Module
    """What noises and decodes."""
    process: Process
    autoencoder: LatentAutoencoder
    conditioner: Conditioner

    @classmethod
    def from_family(cls: type[Method], family: Family, *, students: StudentPaths = None, **settings: Any) -> Method:
        """Load what the method needs of a family, the students where it uses them; settings are the constructor's."""
        return cls(family, **settings)

    @classmethod
    def check_process(cls, process: Process) -> None:
        """ValueError for a process of another kind than the method needs."""
        if not isinstance(process, cls.needs):
            named = {VP: "VP, as SD1.5, SDXL and tiny are", Flow: "a flow, as FLUX.1 and SD3 are"}
            raise ValueError(
                f"{cls.__name__} needs a model whose process is {named.get(cls.needs, cls.needs.__name__)}, and this "
                f"one's is {type(process).__name__}: take another model, or another method"
            )

    def to(self: Method, device: torch.device | str) -> Method:
        """Move all networks; returns itself."""
        for part in (self.network, self.process, self.autoencoder, self.conditioner):
            part.to(device)
        return self

    def networks(self) -> list[nn.Module]:
        return [self.network]

    @torch.no_grad()
    def invert(self, images: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None) -> Any:
        """Encode pictures (B, 3, H, W) with the prompts that describe them to what an edit descends from."""
        latents = self.autoencoder.encode(images)
        return self.framed_for(latents).invert_latents(latents, prompts, seed=seed, on_step=on_step)

    @abstractmethod
    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Any:
        """From latents (B, C, h, w) to what an edit descends from."""

    def framed_for(self: Method, latents: Tensor) -> Method:
        """This method for whole pictures of latents (B, C, h, w), whose size SDXL is told; all else is shared."""
        channels, factor = self.autoencoder.latent_channels, self.autoencoder.downsampling
        if latents.ndim != 4 or latents.shape[1] != channels:
            shape = tuple(latents.shape)
            raise ValueError(f"latents are of shape {shape}; this model's are (B, {channels}, h, w)")
        if not isinstance(self.conditioner, DualCLIPConditioner):
            return self
        method = copy(self)
        method.conditioner = self.conditioner.for_size(*(side * factor for side in latents.shape[-2:]))
        return method

    def latent_shape(self, count: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape of the latents of `count` pictures; ValueError for a height or width that they cannot have."""
        factor = self.autoencoder.downsampling
        for name, side in (("height", height), ("width", width)):
            if side < factor or side % factor:
                near = max(factor, round(side / factor) * factor)
                raise ValueError(f"{name} {side} must be a multiple of {factor}, for example {near}")
        return (count, self.autoencoder.latent_channels, height // factor, width // factor)


class EditingMethod(PictureMethod):
    """A way to noise (B, C, h, w) and back, unguided to noise; guidance is any `GuidanceSchedule`, w = 1 unguided."""

    version = 2  # 1 swapped pooled embeddings, too

    @abstractmethod
    def denoiser(self, prompts: Sequence[str], guidance: GuidanceSchedule) -> Denoiser:
        """The network that decodes, bound to prompts and guidance: a dataclass that holds its `conditioning`."""

    @abstractmethod
    def from_noise(self, denoise: Denoiser, noise: Tensor, *, on_step: OnStep | None) -> Tensor:
        """Noise (B, C, h, w) to latents (B, C, h, w)."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        *,
        guidance: GuidanceSchedule = UNGUIDED,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Decode noise (B, C, h, w), drawn or inverted, to pictures (B, 3, H, W)."""
        denoise = self.framed_for(noise).denoiser(prompts, guidance)
        return self.autoencoder.decode(self.from_noise(denoise, noise, on_step=on_step))

    def swapping(
        self,
        source_prompts: Sequence[str],
        target_prompts: Sequence[str],
        *,
        guidance: GuidanceSchedule,
        swap_tau: float | None,
    ) -> PromptSwap:
        """The network bound to the target prompts, but while t > swap_tau T to the source's, unguided.

        By default swap_tau is where guidance ends: its tau, tau2 or hi; 1 is never. Pooled embeddings are the target's
        throughout, as in the paper's script for SDXL.
        """
        source: Any = self.denoiser(source_prompts, UNGUIDED)
        target: Any = self.denoiser(target_prompts, guidance)
        told = {name: value for name, value in target.conditioning.tensors.items() if name == "pooled_prompt_embeds"}
        source = replace(source, conditioning=source.conditioning.replace(**told))
        swap_tau = guidance.highest if swap_tau is None else swap_tau
        return PromptSwap(source, target, swap_tau, self.process.num_train_timesteps)

    @torch.no_grad()
    def edit(
        self,
        images: Tensor | None,
        source_prompts: Sequence[str],
        target_prompts: Sequence[str],
        *,
        guidance: GuidanceSchedule,
        swap_tau: float | None = None,
        noise: Tensor | None = None,
        seed: Seed = 0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Edit pictures (B, 3, H, W): invert with the source prompts, decode by `swapping` to the target's.

        noise: what `invert` returned for the pictures, to be decoded in their place.
        """
        if noise is None:
            noise = self.invert(images, source_prompts, seed=seed, on_step=on_step)
        method = self.framed_for(noise)
        denoise = method.swapping(source_prompts, target_prompts, guidance=guidance, swap_tau=swap_tau)
        return self.autoencoder.decode(self.from_noise(denoise, noise, on_step=on_step))


class Clock:
    """Counts evaluations and seconds since it was made; `count` is what methods take as `on_step`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.nfe, self.start = device, 0, 0.0
        self.start = self.seconds()

    def count(self, step: Step) -> None:
        self.nfe += step.nfe

    def seconds(self) -> float:
        """Passed so far, with all work of a GPU done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.start
