"""The noise schedule: how much of x_t is data, how much is noise, and how to move between two timesteps.

    x_t = alpha_t x_0 + sigma_t eps,    alpha_t = sqrt(alphas_cumprod[t]),    sigma_t = sqrt(1 - alphas_cumprod[t])

Shapes: B batch, C channels, H W latent size. Timesteps are long tensors (B,) or plain ints in [0, num_train_timesteps).
Arithmetic is float32 whatever the networks compute in: a solver step changes x by little more than bfloat16 resolves.
So what is computed here is float32 (float64 stays float64), also of bfloat16 x, and a denoiser casts its own input.

Timestep 0 has two meanings. For a network it is the first row of the table, slightly noised (sigma about 0.03); at the
end of a jump it is the data itself, alpha 1 and sigma 0. Diffusers calls the choice `set_alpha_to_one`, and so do we.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""eps = denoise(x, t): the noise (B, C, H, W) in x (B, C, H, W) at t (B,) long; prompt, guidance, adapter are bound."""

_BETA_SCHEDULES = ("scaled_linear", "linear")
_PREDICTION_TYPES = ("epsilon", "v_prediction")


class NoiseSchedule(nn.Module):
    """alphas_cumprod (T,) float32 and everything computed from it; diffusers' names and Stable Diffusion's values.

    Raises ValueError for an unknown `beta_schedule` or `prediction_type` and for betas outside (0, 1).
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        prediction_type: str = "epsilon",
    ) -> None:
        super().__init__()
        if beta_schedule not in _BETA_SCHEDULES:
            raise ValueError(f"beta_schedule {beta_schedule!r} is not supported; choose one of {_BETA_SCHEDULES}")
        if prediction_type not in _PREDICTION_TYPES:
            raise ValueError(f"prediction_type {prediction_type!r} is not supported; choose one of {_PREDICTION_TYPES}")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
        self.num_train_timesteps = num_train_timesteps
        self.prediction_type = prediction_type
        power = 2.0 if beta_schedule == "scaled_linear" else 1.0
        root_start, root_end = beta_start ** (1 / power), beta_end ** (1 / power)
        betas = torch.linspace(root_start, root_end, num_train_timesteps, dtype=torch.float32) ** power
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, dim=0), persistent=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Build from the contents of a diffusers `scheduler_config.json`, whatever scheduler wrote it.

        Raises ValueError for options that change the schedule in a way not supported here.
        """
        for key in ("trained_betas", "rescale_betas_zero_snr"):
            if config.get(key):
                raise ValueError(
                    f"{key}={config[key]!r} is not supported; iCD's teachers have plain schedules: unset it"
                )
        known = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
        return cls(**{key: config[key] for key in known if key in config})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NoiseSchedule":
        # The table follows the module's device but never its precision: model.bfloat16() would leave 8 bits of it.
        super()._apply(lambda table: table.to(fn(table).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def alpha(self, t: Tensor | int, *, set_alpha_to_one: bool = True) -> Tensor:
        """alpha_t (B, 1, 1, 1) of t (B,), or (1, 1, 1, 1) of an int; 1 at t = 0 if `set_alpha_to_one`."""
        return self._level(t, set_alpha_to_one)[0]

    def sigma(self, t: Tensor | int, *, set_alpha_to_one: bool = True) -> Tensor:
        """sigma_t (B, 1, 1, 1) of t (B,), or (1, 1, 1, 1) of an int; 0 at t = 0 if `set_alpha_to_one`."""
        return self._level(t, set_alpha_to_one)[1]

    def _level(self, t: Tensor | int, set_alpha_to_one: bool = False) -> tuple[Tensor, Tensor]:
        """alpha_t, sigma_t; by default as networks know them, so that eps and x0 differ at t = 0 too."""
        t = torch.as_tensor(t, device=self.alphas_cumprod.device).view(-1, 1, 1, 1)
        level = self.alphas_cumprod[t]
        if set_alpha_to_one:
            level = torch.where(t == 0, 1.0, level)
        return level.sqrt(), (1 - level).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t (B, C, H, W) from x0 and noise (B, C, H, W): the forward process as networks are trained on it."""
        alpha, sigma = self._level(t)
        return alpha * x0 + sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """v (B, C, H, W) = alpha_t noise - sigma_t x0 (Salimans and Ho, arXiv:2202.00512)."""
        alpha, sigma = self._level(t)
        return alpha * noise - sigma * x0

    def x0_from_eps(self, x: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """The data (B, C, H, W) left when eps (B, C, H, W) is taken out of x (B, C, H, W) at t."""
        alpha, sigma = self._level(t)
        return (x - sigma * eps) / alpha

    def eps_from_x0(self, x: Tensor, x0: Tensor, t: Tensor | int) -> Tensor:
        """The noise (B, C, H, W) left when x0 (B, C, H, W) is taken out of x (B, C, H, W) at t."""
        alpha, sigma = self._level(t)
        return (x - alpha * x0) / sigma

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """What a network of this `prediction_type` is trained to output (B, C, H, W): the noise, or v."""
        return noise if self.prediction_type == "epsilon" else self.velocity(x0, noise, t)

    def eps_from_output(self, output: Tensor, x: Tensor, t: Tensor | int) -> Tensor:
        """The noise (B, C, H, W) that a network's output (B, C, H, W) for x (B, C, H, W) at t means."""
        if self.prediction_type == "epsilon":
            return output
        alpha, sigma = self._level(t)
        return alpha * output + sigma * x

    def output_from_eps(self, eps: Tensor, x: Tensor, t: Tensor | int) -> Tensor:
        """The output (B, C, H, W) by which a network would say eps (B, C, H, W): the inverse of `eps_from_output`."""
        return self.target(self.x0_from_eps(x, eps, t), eps, t)

    def ddim_step(
        self,
        x: Tensor,
        eps: Tensor,
        t: Tensor | int,
        s: Tensor | int,
        *,
        noise_std: Tensor | None = None,
        set_alpha_to_one: bool = True,
    ) -> Tensor:
        """Move x (B, C, H, W) from t to s along eps (B, C, H, W), towards data or noise alike. Eq. 1, arXiv:2406.14539.

        Takes eps out at t and puts it back at s: the equation's terms in the order that diffusers and the reference
        compute them, so that results agree to the bit. s = t returns x to float32 rounding. `set_alpha_to_one=False` is
        the teacher's solver, whose last stop is the slightly noised alphas_cumprod[0] it was trained on, not the data.

        noise_std (B, 1, 1, 1) leaves room for fresh noise, which the caller adds: noise_std * noise. Eq. 12,
        arXiv:2010.02502. `posterior_std` makes it a DDPM or Euler ancestral step, `sigma(s)` one of an LCM.
        """
        alpha_t, sigma_t = self._level(t, set_alpha_to_one)
        alpha_s, sigma_s = self._level(s, set_alpha_to_one)
        return alpha_s * ((x - sigma_t * eps) / alpha_t) + _kept(sigma_s, noise_std) * eps

    def undo_step(
        self,
        x: Tensor,
        eps: Tensor,
        t: Tensor | int,
        s: Tensor | int,
        *,
        noise_std: Tensor | None = None,
        set_alpha_to_one: bool = True,
    ) -> Tensor:
        """The point (B, C, H, W) at t that `ddim_step` moves to x (B, C, H, W) at s along the same eps (B, C, H, W)."""
        alpha_t, sigma_t = self._level(t, set_alpha_to_one)
        alpha_s, sigma_s = self._level(s, set_alpha_to_one)
        return alpha_t * ((x - _kept(sigma_s, noise_std) * eps) / alpha_s) + sigma_t * eps

    def posterior_std(self, t: Tensor | int, s: Tensor | int, *, set_alpha_to_one: bool = True) -> Tensor:
        """Deviation (B, 1, 1, 1) of x_s given x_t and the data, s <= t. Eq. 16 at eta = 1, arXiv:2010.02502."""
        alpha_t, sigma_t = self._level(t, set_alpha_to_one)
        alpha_s, sigma_s = self._level(s, set_alpha_to_one)
        return sigma_s / sigma_t * (1 - (alpha_t / alpha_s) ** 2).clamp(min=0).sqrt()

    def jump(self, denoise: Denoiser, x: Tensor, t: Tensor, s: Tensor | int) -> Tensor:
        """A student's one evaluation: x (B, C, H, W) from t (B,) to its boundary s (B,). Eq. 3, arXiv:2406.14539."""
        return self.ddim_step(x, denoise(x, t), t, s)


def _kept(sigma: Tensor, noise_std: Tensor | None) -> Tensor:
    """What remains of the old noise (B, 1, 1, 1) beside fresh noise of noise_std (B, 1, 1, 1), together of sigma."""
    return sigma if noise_std is None else (sigma**2 - noise_std**2).clamp(min=0).sqrt()


@dataclass(frozen=True)
class NoisedData:
    """One batch and its one noise: x0, noise (B, C, H, W) and the schedule that mixes them at whatever timestep."""

    x0: Tensor
    noise: Tensor
    schedule: NoiseSchedule

    def at(self, t: Tensor | int) -> Tensor:
        """x_t (B, C, H, W) at t (B,): every loss of an iteration sees a point of the same straight mixture."""
        return self.schedule.add_noise(self.x0, self.noise, t)
