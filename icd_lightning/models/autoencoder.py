"""Pixels <-> latents, for any autoencoder of diffusers'."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from icd_lightning.models.weights import fingerprint


class LatentAutoencoder(nn.Module):
    """A frozen diffusers autoencoder with its scaling applied: images in [-1, 1] on one side, latents on the other.

    Takes any class with `encode`, `decode` and `config`: AutoencoderKL (SD1.5, SDXL) has a posterior, AutoencoderDC
    (tiny) is deterministic. The scaling factor, and a shift where there is one, come from the autoencoder's config.
    AutoencoderKLFlux2 scales patches of its latents, 2 x 2, each channel by the running statistics of its `bn`: the
    patches are the latents here.
    Calls build no graph, except with `gradients=True`: then gradients reach what is given, never the weights.
    """

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False).eval()
        self.latent_channels, self.patch = latent_channels_of(vae.config), patch_of(vae.config)
        self.downsampling = downsampling_of(vae.config)
        self.scaling_factor = vae.config.get("scaling_factor", 1.0)
        self.shift_factor = vae.config.get("shift_factor", None) or 0.0
        numbers = all(isinstance(factor, (int, float)) for factor in (self.scaling_factor, self.shift_factor))
        if not (numbers and 0 < self.scaling_factor < math.inf and math.isfinite(self.shift_factor)):
            raise ValueError(
                f"scaling_factor {self.scaling_factor} or shift_factor {self.shift_factor} of the autoencoder's config "
                "is no number that latents can be scaled with"
            )
        bn = getattr(vae, "bn", None)
        if bn is not None and not (
            bn.running_mean.is_meta or all(one.isfinite().all() for one in self._scaling(bn.running_mean))
        ):
            raise ValueError("running_mean or running_var of the autoencoder's bn is nothing to scale latents with")

    def train(self, mode: bool = True) -> LatentAutoencoder:
        """Stay in evaluation mode: a frozen network has no other."""
        return super().train(False)

    @cached_property
    def fingerprint(self) -> str:
        """Tells autoencoders apart whose latents do not fit each other; the same in any precision."""
        return fingerprint(self.vae.encoder)

    def encode(self, images: Tensor, *, normal: Callable[..., Tensor] | None = None, gradients: bool = False) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to scaled latents (B, C, H/f, W/f): `sample` of their `moments`."""
        return self.sample(self.moments(images, gradients=gradients), normal=normal)

    def moments(self, images: Tensor, *, gradients: bool = False) -> Tensor:
        """Return mean and log-variance (B, 2 C, H/f, W/f) of the posterior, or the latent (B, C, H/f, W/f) itself.

        Raises ValueError where H or W is not a multiple of f.
        """
        height, width = images.shape[-2:]
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"image of {height} x {width} pixels: both sides must be multiples of {self.downsampling}; "
                "crop or resize it first"
            )
        with _running(images, gradients):
            encoded = self.vae.encode(images.to(self.vae.dtype))
        moments = encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded.latent
        return pixel_unshuffle(moments, self.patch).to(images.dtype)  # all channels of the mean stay before the others

    def sample(self, moments: Tensor, *, normal: Callable[..., Tensor] | None = None) -> Tensor:
        """Return scaled latents (B, C, h, w) for what `moments` returned.

        The posterior's mean, as inversion wants it; or, as training wants it, a draw from the posterior, where
        normal(B, C, h, w) gives the standard normal numbers for it (not asked for by an autoencoder without
        posterior).
        """
        if moments.shape[1] == 2 * self.latent_channels:
            posterior = DiagonalGaussianDistribution(moments)
            latents = posterior.mean
            if normal is not None:
                latents = latents + posterior.std * normal(*latents.shape).to(latents)
        elif moments.shape[1] == self.latent_channels:
            latents = moments
        else:
            raise ValueError(f"moments of {moments.shape[1]} channels: the autoencoder has {self.latent_channels}")
        shift, factor = self._scaling(latents)
        return (latents - shift) * factor

    def decode(self, latents: Tensor, *, gradients: bool = False) -> Tensor:
        """Decode scaled latents (B, C, h, w) to images (B, 3, h f, w f), clamped to [-1, 1]."""
        with _running(latents, gradients):
            shift, factor = self._scaling(latents)
            unscaled = pixel_shuffle(latents / factor + shift, self.patch)
            images = self.vae.decode(unscaled.to(self.vae.dtype)).sample
            return images.clamp(-1, 1).to(latents.dtype)

    def _scaling(self, like: Tensor) -> tuple[Any, Any]:
        """Shift and factor of all latents, or of each channel (1, C, 1, 1)."""
        if (bn := getattr(self.vae, "bn", None)) is None:
            return self.shift_factor, self.scaling_factor
        shift, factor = bn.running_mean, (bn.running_var.float() + bn.eps).rsqrt()
        return shift.view(1, -1, 1, 1).to(like), factor.view(1, -1, 1, 1).to(like)


def patch_of(config: Mapping[str, Any]) -> int:
    """Side of the patches that are one latent each, of the autoencoder with this config; ValueError for no square."""
    match config.get("patch_size"):
        case None:
            return 1
        case [int(side), int(other)] if 1 <= side == other <= 64:
            return side
        case wrong:
            raise ValueError(f"patch_size {wrong!r} of the autoencoder's config must be a square such as [2, 2]")


def latent_channels_of(config: Mapping[str, Any]) -> int:
    """C of the latents of the autoencoder with this config; ValueError for no number."""
    if type(channels := config["latent_channels"]) is not int:
        raise ValueError(f"latent_channels {channels!r} of the autoencoder's config must be a whole number")
    return channels * patch_of(config) ** 2


def downsampling_of(config: Mapping[str, Any]) -> int:
    """Pixels per latent, along each side, of the autoencoder with this config."""
    stages = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return int(2 ** (len(stages) - 1)) * patch_of(config)


@contextmanager
def _running(like: Tensor, gradients: bool) -> Iterator[None]:
    """A graph is built on request, and never inside `torch.no_grad`.

    Autocast is off: in float16, an autoencoder that is kept in float32 for a reason would give NaN.
    """
    with torch.autocast(like.device.type, enabled=False), torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
        yield
