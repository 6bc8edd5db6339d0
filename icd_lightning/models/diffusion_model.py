"""A network as a denoiser: guided by its guidance embedding (one evaluation) or by classifier-free guidance (two)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from icd_lightning.diffusion import Process, Split, classifier_free_guidance
from icd_lightning.models.backbones import Backbone
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.weights import first_line

log = logging.getLogger(__name__)

Guidance = float | Tensor | Callable[[Tensor], Tensor]
"""A guidance scale w for all samples, one for each (B,), or a `GuidanceSchedule` w_t (B,) = schedule(t (B,))."""

Network = Callable[[Tensor, Tensor, Conditioning, Tensor | None], Tensor]
"""output (B, C, H, W) = network(x (B, C, H, W), t (B,), conditioning of B, w (B,) or None)."""

VARIANTS = 64
"""Compiled versions of a network that may exist: teacher and students, with and without gradient, at some sizes."""


def scale_at(guidance: Guidance, t: Tensor) -> Tensor:
    """The guidance scale w (B,) at t (B,), float32."""
    if isinstance(guidance, Tensor):
        return guidance.to(device=t.device, dtype=torch.float32).expand(t.shape)
    if callable(guidance):
        return guidance(t)
    return torch.full(t.shape, float(guidance), device=t.device)


@dataclass(frozen=True, eq=False)
class DiffusionModel:
    """A network, the process that it was trained on, and what is known of its architecture.

    `using()` is entered around each call: so one network can be several models, by adapters that are on or off.
    """

    network: nn.Module
    process: Process
    backbone: Backbone
    using: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def takes_guidance(self) -> bool:
        return self.backbone.guidance_width(self.network) is not None

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
        """The network's output (B, C, H, W) for x (B, C, H, W) at t (B,), in the type of x.

        w (B,) is the guidance scale for the embedding, and None for a network without one. The wrong one of the two is
        refused, because a network that misses its embedding runs on in silence, unguided.
        """
        if (w is not None) != self.takes_guidance:
            raise ValueError(
                "this network has a guidance embedding and needs a guidance scale w (1 is unguided)"
                if self.takes_guidance
                else "this network has no guidance embedding: give unconditional prompts, or with_guidance_embedding"
            )
        if len(conditioning) != len(x):
            raise ValueError(f"conditioning holds {len(conditioning)} samples, x holds {len(x)}")
        with self.using():
            return self.backbone.predict(self.network, x, self.process.network_time(t), conditioning, w).to(x.dtype)

    def denoiser(
        self, conditioning: Conditioning, guidance: Guidance, unconditional: Conditioning | None = None
    ) -> GuidedDenoiser | CFGDenoiser:
        """Bind the network to its prompts and guidance; gradients flow.

        A network without guidance embedding is guided away from the `unconditional` prompts, at twice the cost.
        """
        if self.takes_guidance:
            return GuidedDenoiser(self.predict, self.process, conditioning, guidance)
        if unconditional is None:
            raise ValueError("a network without guidance embedding needs unconditional prompts to be guided away from")
        return CFGDenoiser(self.predict, self.process, conditioning, unconditional, guidance)

    def with_guidance_embedding(self, width: int = 512) -> DiffusionModel:
        """The model of a copy of the network with a guidance embedding that starts at zero."""
        if self.takes_guidance:
            raise ValueError("this network already has a guidance embedding, and needs no stage 1")
        return replace(self, network=self.backbone.add_guidance_embedding(self.network, width))


@dataclass(frozen=True, eq=False)
class GuidedDenoiser:
    """(x0, eps) = denoise(x (B, C, H, W), t (B,)) by one evaluation of network(x, t, conditioning, w)."""

    network: Network
    process: Process
    conditioning: Conditioning
    guidance: Guidance
    nfe: int = 1

    def __call__(self, x: Tensor, t: Tensor) -> Split:
        return self.process.split(self.network(x, t, self.conditioning, scale_at(self.guidance, t)), x, t)

    @property
    def joins(self) -> Hashable:
        """Denoisers of one network can be called as one batch."""
        return self.network

    def join(self, others: Sequence[GuidedDenoiser], times: Sequence[Tensor]) -> GuidedDenoiser:
        """One denoiser for the batches of `others` behind one another, at `times` (B_i,)."""
        conditioning = Conditioning.cat([one.conditioning for one in others])
        w = torch.cat([scale_at(one.guidance, t) for one, t in zip(others, times, strict=True)])
        return replace(self, conditioning=conditioning, guidance=w)


@dataclass(eq=False)
class CFGDenoiser:
    """(x0, eps) = denoise(x (B, C, H, W), t (B,)) by classifier-free guidance; `nfe` counts the latest call.

    Both branches run as one batch of 2 B. Where a float or a schedule is 1 for the whole batch, the conditional branch
    runs alone. A tensor always takes both: to look at its values would make a training step wait for the GPU.
    """

    network: Network
    process: Process
    conditioning: Conditioning
    unconditional: Conditioning
    guidance: Guidance
    nfe: int = 2
    _both: Conditioning = field(init=False)

    def __post_init__(self) -> None:
        if len(self.unconditional) != len(self.conditioning):
            raise ValueError(
                f"{len(self.unconditional)} unconditional samples for {len(self.conditioning)} prompts: give as many"
            )
        self._both = Conditioning.cat([self.unconditional, self.conditioning])

    def __call__(self, x: Tensor, t: Tensor) -> Split:
        w = scale_at(self.guidance, t)
        guided = isinstance(self.guidance, Tensor) or bool((w != 1).any())
        self.nfe = 2 if guided else 1
        if not guided:
            return self.process.split(self.network(x, t, self.conditioning, None), x, t)
        unconditional, conditional = self.network(x.repeat(2, 1, 1, 1), t.repeat(2), self._both, None).chunk(2)
        return self.process.split(classifier_free_guidance(unconditional, conditional, w), x, t)


@torch.enable_grad()
def why_not_compiled(device: torch.device, backend: str) -> str | None:
    """Try torch.compile on a few numbers, forward and backward; what is in the way, or None."""
    numbers = torch.ones(8, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: x.sin().sum(), backend=backend)(numbers).backward()
    except Exception as error:  # a compiler, Triton or Python headers may be missing; each says so in a way of its own
        return first_line(error)
    return None


def compile_networks(networks: Iterable[nn.Module], device: torch.device, backend: str = "inductor") -> None:
    """Run every network through torch.compile, as a whole and in place, so that names of weights stay as they are.

    Where that does not work the log says why, and they run as they are. Which adapter is on is a list that each LoRA
    layer reads, on which the compiled code is conditioned: a switch to another adapter compiles another version the
    first time, and from then on selects it. How many versions there may be has no public name in torch.
    """
    if reason := why_not_compiled(device, backend):
        log.warning("torch.compile does not work here, so networks run as they are (%s)", reason)
        return
    log.info("networks are compiled by torch.compile: the first call of each kind takes minutes")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled after all runs as it is, with a warning
    for network in networks:
        network.compile(backend=backend)
