"""One UNet as a denoiser: guided by its guidance embedding (one evaluation) or by classifier-free guidance (two)."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from icd_lightning.diffusion.calls import Call
from icd_lightning.diffusion.guidance import classifier_free_guidance, guidance_embedding
from icd_lightning.diffusion.schedule import NoiseSchedule
from icd_lightning.models.conditioning import Conditioning

GUIDANCE_WEIGHT = "time_embedding.cond_proj.weight"

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
    """eps (B, C, H, W) = denoise(x (B, C, H, W), t (B,)) by one evaluation of network(x, t, conditioning, w)."""

    network: Callable[[Tensor, Tensor, Conditioning, Tensor], Tensor]
    schedule: NoiseSchedule
    conditioning: Conditioning
    guidance: Guidance
    nfe: int = 1

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        output = self.network(x, t, self.conditioning, scale_at(self.guidance, t))
        return self.schedule.eps_from_output(output, x, t)


def evaluate_joined(calls: Sequence[Call]) -> list[Tensor]:
    """Make calls of UNetDenoisers, those of one network as one batch; the results are in the order of the calls."""
    groups: dict[object, list[int]] = {}
    for place, call in enumerate(calls):
        groups.setdefault(call.denoise.network, []).append(place)
    results: dict[int, Tensor] = {}
    for places in groups.values():
        own = [calls[place] for place in places]
        joined = own[0] if len(own) == 1 else _join(own)
        results.update(zip(places, joined.make().split([len(call.x) for call in own]), strict=True))
    return [results[place] for place in range(len(calls))]


def _join(calls: Sequence[Call]) -> Call:
    first = calls[0].denoise
    denoise = UNetDenoiser(
        first.network,
        first.schedule,
        Conditioning.cat([call.denoise.conditioning for call in calls]),
        torch.cat([scale_at(call.denoise.guidance, call.t) for call in calls]),
    )
    return Call(denoise, torch.cat([call.x for call in calls]), torch.cat([call.t for call in calls]), calls[0].turn)


def guided_denoiser(
    unet: UNet2DConditionModel, schedule: NoiseSchedule, conditioning: Conditioning, guidance: Guidance
) -> UNetDenoiser:
    """Bind a UNet with guidance embedding to its prompt and guidance scale; gradients flow."""
    return UNetDenoiser(partial(predict, unet), schedule, conditioning, guidance)


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
    weights = {name: weight.detach().clone() for name, weight in unet.state_dict().items()}
    first = weights["time_embedding.linear_1.weight"]
    weights[GUIDANCE_WEIGHT] = first.new_zeros(first.shape[1], dim)
    return _with_weights(unet, weights, dim)


def fold_guidance_embedding(unet: UNet2DConditionModel, w: float) -> UNet2DConditionModel:
    """A copy of a UNet with a guidance embedding that has none and is what it was at this w: w becomes part of a bias.

    The inverse of `add_guidance_embedding` for a UNet that this made.
    """
    dim = unet.config.time_cond_proj_dim
    if dim is None:
        raise ValueError("this UNet has no guidance embedding to fold")
    weights = {name: weight.detach().clone() for name, weight in unet.state_dict().items()}
    projection = weights.pop(GUIDANCE_WEIGHT)
    embedding = guidance_embedding(projection.new_full((1,), w), dim=dim).to(projection.dtype)[0]
    weights["time_embedding.linear_1.bias"] += weights["time_embedding.linear_1.weight"] @ (projection @ embedding)
    return _with_weights(unet, weights, None)


def _with_weights(unet: UNet2DConditionModel, weights: dict[str, Tensor], dim: int | None) -> UNet2DConditionModel:
    """A UNet like this one, but for its weights and the width of its guidance embedding."""
    with torch.device("meta"):  # every weight is replaced below, so none is drawn
        # diffusers would drop a value again that it noted as "default, since the file did not say"
        config = {key: value for key, value in unet.config.items() if key != "_use_default_values"}
        other = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": dim})
    other.load_state_dict(weights, assign=True)
    return other.train(unet.training)


def guided_unet_from_file(file: Path, config: dict[str, Any], dtype: torch.dtype) -> UNet2DConditionModel:
    """The guidance-distilled UNet of this plain UNet's config, from one file with its state dict.

    Such are the released `sd15_cfg_distill.pt` and `sdxl_cfg_distill.pt`. Raises ValueError if the file holds anything
    but tensors, another UNet's, or a UNet without guidance embedding.
    """
    weights = _read_weights(file)
    if GUIDANCE_WEIGHT not in weights:
        raise ValueError(
            f"{file} holds {len(weights)} weights and no {GUIDANCE_WEIGHT}, so it is not the state dict of a "
            "guidance-distilled UNet"
        )
    with torch.device("meta"):  # every weight is replaced below, so none is drawn
        unet = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": weights[GUIDANCE_WEIGHT].shape[1]})
    expected = unet.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    other = [name for name in expected.keys() & weights.keys() if weights[name].shape != expected[name].shape]
    if wrong := [*missing, *unknown, *sorted(other)]:
        raise ValueError(
            f"{file} is not of this model's UNet: {len(missing)} weights missing, {len(unknown)} unknown, {len(other)} "
            f"of another shape, for example {wrong[0]}"
        )
    unet.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    return unet


def _read_weights(file: Path) -> dict[str, Tensor]:
    """A state dict, safetensors or pickled; nothing in a pickle is run."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} cannot be read as a file of weights ({str(error).splitlines()[0]})") from error
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ValueError(f"{file} holds something else than one UNet's state dict, a dict of tensors by name")
    return weights
