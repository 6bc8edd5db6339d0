"""One UNet as a denoiser: guided by its guidance embedding (one evaluation) or by classifier-free guidance (two)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from icd_lightning.diffusion.guidance import classifier_free_guidance, guidance_embedding
from icd_lightning.diffusion.schedule import NoiseSchedule
from icd_lightning.models.conditioning import Conditioning

Guidance = float | Tensor | Callable[[Tensor], Tensor]
"""A guidance scale w for all samples, one for each (B,), or a `GuidanceSchedule` w_t (B,) = schedule(t (B,))."""


def scale_at(guidance: Guidance, t: Tensor) -> Tensor:
    """The guidance scale w (B,) at t (B,), float32."""
    if isinstance(guidance, Tensor):
        return guidance.to(device=t.device, dtype=torch.float32).expand(t.shape)
    if callable(guidance):
        return guidance(t)
    return torch.full(t.shape, float(guidance), device=t.device)


def predict(unet: UNet2DConditionModel, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
    """Network output (B, C, H, W), eps or v, for x (B, C, H, W) at t (B,), in the type of x.

    w (B,) is the guidance scale for the embedding, and None for a UNet without one. The wrong one of the two is
    refused, because a UNet that misses its embedding runs on in silence, unguided.
    """
    dim = unet.config.time_cond_proj_dim
    if (w is None) != (dim is None):
        raise ValueError(
            "this UNet has no guidance embedding: use cfg_denoiser, or give it one with add_guidance_embedding"
            if dim is None
            else "this UNet has a guidance embedding and needs a guidance scale w (1 is unguided)"
        )
    if len(conditioning) != len(x):
        raise ValueError(f"conditioning holds {len(conditioning)} samples, x holds {len(x)}")
    dtype = unet.conv_in.weight.dtype
    embedding = None if dim is None else guidance_embedding(w, dim=dim).to(dtype)
    kwargs = conditioning.to(dtype=dtype).unet_kwargs()
    return unet(x.to(dtype), t, timestep_cond=embedding, return_dict=False, **kwargs)[0].to(x.dtype)


@dataclass(frozen=True, eq=False)
class UNetDenoiser:
    """eps (B, C, H, W) = denoise(x (B, C, H, W), t (B,)) by one evaluation of output = network(x, t, w)."""

    network: Callable[[Tensor, Tensor, Tensor], Tensor]
    schedule: NoiseSchedule
    guidance: Guidance
    nfe: int = 1

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.schedule.eps_from_output(self.network(x, t, scale_at(self.guidance, t)), x, t)


def guided_denoiser(
    unet: UNet2DConditionModel, schedule: NoiseSchedule, conditioning: Conditioning, guidance: Guidance
) -> UNetDenoiser:
    """Bind a UNet with guidance embedding to its prompt and guidance scale; gradients flow."""
    return UNetDenoiser(lambda x, t, w: predict(unet, x, t, conditioning, w), schedule, guidance)


@dataclass(eq=False)
class CFGDenoiser:
    """eps (B, C, H, W) = denoise(x (B, C, H, W), t (B,)) by classifier-free guidance; `nfe` counts the latest call.

    Both branches run as one batch of 2 B. Where a float or a schedule is 1 for the whole batch, the conditional branch
    runs alone. A tensor always takes both: to look at its values would make a training step wait for the GPU.
    """

    unet: UNet2DConditionModel
    schedule: NoiseSchedule
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

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        w = scale_at(self.guidance, t)
        guided = isinstance(self.guidance, Tensor) or bool((w != 1).any())
        self.nfe = 2 if guided else 1
        if not guided:
            return self._eps(x, t, self.conditioning)
        eps_uncond, eps_cond = self._eps(x.repeat(2, 1, 1, 1), t.repeat(2), self._both).chunk(2)
        return classifier_free_guidance(eps_uncond, eps_cond, w)

    def _eps(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.schedule.eps_from_output(predict(self.unet, x, t, conditioning, None), x, t)


def cfg_denoiser(
    unet: UNet2DConditionModel,
    schedule: NoiseSchedule,
    conditioning: Conditioning,
    unconditional: Conditioning,
    guidance: Guidance,
) -> CFGDenoiser:
    """Bind a UNet without guidance embedding to its prompt, its unconditional prompt and its guidance scale."""
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError("this UNet has a guidance embedding: use guided_denoiser, at half the cost")
    return CFGDenoiser(unet, schedule, conditioning, unconditional, guidance)


def add_guidance_embedding(unet: UNet2DConditionModel, dim: int = 512) -> UNet2DConditionModel:
    """A copy of the UNet with a guidance embedding of width dim that starts at zero: the same output at every w."""
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError(f"this UNet already has a guidance embedding of width {unet.config.time_cond_proj_dim}")
    with torch.device("meta"):  # every weight is replaced below, so none is drawn
        # diffusers would drop a value again that it noted as "default, since the file did not say"
        config = {key: value for key, value in unet.config.items() if key != "_use_default_values"}
        guided = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": dim})
    weights = {name: weight.detach().clone() for name, weight in unet.state_dict().items()}
    first = weights["time_embedding.linear_1.weight"]
    weights["time_embedding.cond_proj.weight"] = first.new_zeros(first.shape[1], dim)
    guided.load_state_dict(weights, assign=True)
    return guided.train(unet.training)
