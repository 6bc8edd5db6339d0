"""The protocol of all editing methods: invert, edit, nfe, over pictures (B, 3, H, W) in [-1, 1].

`PictureMethod` is that protocol. `EditingMethod` adds what holds where a picture becomes plain noise and nothing else,
as in iCD and DDIM: such noise can also be drawn. The baselines that keep more than noise are in `baselines/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from icd_lightning.diffusion import Denoiser, GuidanceSchedule, OnStep, Process, Split, StepGuidance
from icd_lightning.editing.limits import check_fraction, check_seed
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.conditioning import Conditioning, Framing
from icd_lightning.models.family import Family
from icd_lightning.models.text import Conditioner, DualCLIPConditioner

UNGUIDED = StepGuidance(1.0)
Method = TypeVar("Method", bound="PictureMethod")

Seed = int | Sequence[int]
"""Of a batch: sample i has seed + i, or the i-th of B seeds."""


def seeded_noise(shape: Sequence[int], seed: Seed, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise (B, C, H, W); a sample depends on its own seed alone, not on the batch or the device."""
    count, *rest = shape
    samples = [torch.randn(rest, generator=torch.Generator().manual_seed(one)) for one in seeds_of(seed, count)]
    return torch.stack(samples).to(device)


def seeds_of(seed: Seed, count: int) -> list[int]:
    """A seed for each of `count` samples."""
    seeds = [int(seed) + i for i in range(count)] if isinstance(seed, Integral) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} samples: give one number, or a seed for each")
    return [check_seed(one) for one in seeds]


def usual_swap_tau(guidance: GuidanceSchedule) -> float:
    """Until when edits follow the source's prompt, unless told otherwise: the guidance's tau, or 1, never."""
    return getattr(guidance, "tau", 1.0)


@dataclass(frozen=True, eq=False)
class Framed:
    """A conditioner for whole pictures of one size."""

    conditioner: Conditioner
    height: int
    width: int

    @property
    def tokenizer(self) -> Any:
        return self.conditioner.tokenizer

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        return self.conditioner(prompts, self._framing(len(prompts)))

    def unconditional(self, batch_size: int) -> Conditioning:
        return self.conditioner.unconditional(batch_size, self._framing(batch_size))

    def _framing(self, count: int) -> Framing:
        return Framing.whole(count, (self.height, self.width))


@dataclass(eq=False)
class PromptSwap:
    """(x0, eps) = denoise(x, t) by the source's denoiser for t > tau T, else the target's: early steps keep the layout.

    `nfe` counts the latest call.
    """

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
    """What every way to edit offers: `invert` pictures, `edit` them, and say what an edit costs, `nfe`.

    What `invert` returns is the method's own; `generate(prompts, inverted)` decodes it, and so reconstructs.
    """

    version: ClassVar[int] = 1
    """Raised by whoever changes what the method computes: results of another version are not reused."""
    reads_source: ClassVar[bool] = True
    """What an edit becomes depends on the source prompt."""
    uses_students: bool = False
    """Runs on iCD's students, so that its results depend on them."""

    autoencoder: LatentAutoencoder
    conditioner: Conditioner | Framed

    @classmethod
    @abstractmethod
    def from_family(
        cls: type[Method], family: Family, *, students: Mapping[str, str | None] | None = None, **settings: Any
    ) -> Method:
        """Load what the method needs of a family; settings are the constructor's.

        students: for methods that use them, what `InvertibleConsistency.from_pretrained` takes beside the family.
        """

    @property
    @abstractmethod
    def process(self) -> Process:
        """The noise process of the networks."""

    @abstractmethod
    def networks(self) -> Sequence[nn.Module]:
        """Those that noise and decode."""

    def to(self: Method, device: torch.device | str) -> Method:
        """Move all networks; returns itself."""
        for part in (*self.networks(), self.process, self.autoencoder, self.conditioner):
            part.to(device)
        return self

    @abstractmethod
    def invert(self, images: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None) -> Any:
        """Encode pictures (B, 3, H, W) with the prompts that describe them to what an edit descends from."""

    @abstractmethod
    def edit(
        self,
        images: Tensor,
        source_prompts: Sequence[str],
        target_prompts: Sequence[str],
        *,
        seed: Seed = 0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Edit pictures (B, 3, H, W) that source prompts describe towards the target prompts."""

    def nfe(self, *, guidance: GuidanceSchedule) -> int:
        """Network evaluations that an edit of one picture takes under this guidance, there and back."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it costs")

    def framed_for(self: Method, latents: Tensor) -> Method:
        """This method for whole pictures of latents (B, C, h, w), whose size SDXL is told; all else is shared."""
        if not isinstance(self.conditioner, DualCLIPConditioner):
            return self
        method, factor = copy(self), self.autoencoder.downsampling
        method.conditioner = Framed(self.conditioner, *(side * factor for side in latents.shape[-2:]))
        return method

    def latent_shape(self, count: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape of the latents of `count` pictures of height x width pixels."""
        factor = self.autoencoder.downsampling
        return (count, self.autoencoder.latent_channels, height // factor, width // factor)


class EditingMethod(PictureMethod):
    """A way to noise and back. Latents are (B, C, h, w), scaled; guidance is any `GuidanceSchedule`, w = 1 unguided.

    `on_step` is called after each step with the evaluations that it took (see `diffusion.jumps`).
    """

    @abstractmethod
    def denoiser(self, prompts: Sequence[str], guidance: GuidanceSchedule) -> Denoiser:
        """The network that decodes, bound to prompts and guidance."""

    @abstractmethod
    def to_noise(self, latents: Tensor, prompts: Sequence[str], *, seed: Seed, on_step: OnStep | None) -> Tensor:
        """Latents (B, C, h, w) to noise (B, C, h, w), unguided."""

    @abstractmethod
    def from_noise(self, denoise: Denoiser, noise: Tensor, *, on_step: OnStep | None) -> Tensor:
        """Noise (B, C, h, w) to latents (B, C, h, w)."""

    @torch.no_grad()
    def invert(
        self, images: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Tensor:
        """Encode pictures (B, 3, H, W) with their prompts to noise (B, C, h, w)."""
        latents = self.autoencoder.encode(images)
        return self.framed_for(latents).to_noise(latents, prompts, seed=seed, on_step=on_step)

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
        swap_tau: float,
    ) -> PromptSwap:
        """The network bound to the target prompts, but while t > swap_tau T to the source's, unguided."""
        source, target = self.denoiser(source_prompts, UNGUIDED), self.denoiser(target_prompts, guidance)
        return PromptSwap(source, target, swap_tau, self.process.num_train_timesteps)

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
        """Decode inverted noise (B, C, h, w) to pictures (B, 3, H, W), by `swapping`."""
        method = self.framed_for(noise)
        denoise = method.swapping(source_prompts, target_prompts, guidance=guidance, swap_tau=swap_tau)
        return self.autoencoder.decode(self.from_noise(denoise, noise, on_step=on_step))

    def edit(
        self,
        images: Tensor,
        source_prompts: Sequence[str],
        target_prompts: Sequence[str],
        *,
        guidance: GuidanceSchedule,
        swap_tau: float | None = None,
        seed: Seed = 0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Edit pictures (B, 3, H, W): invert with the source prompts, decode with the target's.

        swap_tau: follow the source prompt while t > swap_tau T; by default the guidance's tau, or 1 where it has none.
        """
        swap_tau = usual_swap_tau(guidance) if swap_tau is None else swap_tau
        noise = self.invert(images, source_prompts, seed=seed, on_step=on_step)
        return self.swap(noise, source_prompts, target_prompts, guidance=guidance, swap_tau=swap_tau, on_step=on_step)
