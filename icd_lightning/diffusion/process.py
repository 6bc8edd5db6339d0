"""A process mixes data and noise; a network's output splits the mixture again. One move serves every process:

    x_t = alpha(t) x0 + sigma(t) eps,    (x0, eps) = split(output, x_t, t),    x_s = alpha(s) x0 + sigma(s) eps

`VP` is Stable Diffusion's, variance-preserving; `Flow` the straight path of flow matching. Shapes: B batch, C channels,
H W latent size. Timesteps are long tensors (B,) or plain ints in [0, num_train_timesteps). Arithmetic is float32
whatever the networks compute in: a solver step changes x by little more than bfloat16 resolves. So what is computed
here is float32 (float64 stays float64), also of bfloat16 x, and a denoiser casts its own input.

Timestep 0 has two meanings. For a network it is the first level of the table, slightly noised; at the end of a jump it
is the data itself, alpha 1 and sigma 0. Diffusers calls the choice `set_alpha_to_one`, and so do we.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

Time = Tensor | int
"""Timesteps (B,) long, or one int for all."""


class Split(NamedTuple):
    """What a network sees in x_t: the data x0 and the noise eps, (B, C, H, W) both."""

    x0: Tensor
    eps: Tensor


Denoiser = Callable[[Tensor, Tensor], Split]
"""(x0, eps) = denoise(x, t) of x (B, C, H, W) at t (B,) long; prompt, guidance, adapter are bound."""


class Process(nn.Module, ABC):
    """The levels alphas, sigmas (T,) float32 of T timesteps, and everything computed from them.

    A subclass says what its networks output (`target`) and how that splits x_t (`split`), and of diffusers' schedulers:
        schedulers: their classes, whose config holds the arguments of the subclass.
        needed: options that must be there, since libraries differ in what they take without.
        refused: options of theirs that change the levels in a way not known here.
    """

    schedulers: ClassVar[tuple[str, ...]]
    needed: ClassVar[tuple[str, ...]] = ()
    refused: ClassVar[tuple[str, ...]] = ()

    alphas: Tensor
    sigmas: Tensor
    settings: dict[str, Any]
    """What a network of the process was trained for, by name: plain values."""

    def __init__(self, alphas: Tensor, sigmas: Tensor) -> None:
        super().__init__()
        self.num_train_timesteps = len(alphas)
        self.settings = {}
        self.register_buffer("alphas", alphas, persistent=False)
        self.register_buffer("sigmas", sigmas, persistent=False)

    @staticmethod
    def from_config(config: Mapping[str, Any], tokens: int | None = None) -> "Process":
        """The process of a diffusers `scheduler_config.json`, whichever sampler wrote it.

        `tokens` of a picture, patches of 2 x 2 latents, fix the shift of a flow that has one by resolution.

        Raises ValueError for a scheduler of an unknown kind, and for options that change the levels in a way not known.
        """
        name = config.get("_class_name")
        config = _at_fixed_shift(config, tokens)
        if name is None:  # a scheduler's config in memory; only betas make it plain which process it is of
            foreign = [key for key in ("shift", "base_shift", "sigma_data") if key in config]
            name = f"with {foreign[0]}" if foreign else "DDIMScheduler"
        kind = _kind_of(str(name))
        parameters = inspect.signature(kind, eval_str=True).parameters
        given = {key: config[key] for key in parameters if key in config}
        unknown = [key for key in kind.refused if config.get(key)]
        unknown += [key for key, value in given.items() if value is None]
        if unknown:
            raise ValueError(
                f"{unknown[0]}={config[unknown[0]]!r} of a scheduler is not supported by {kind.__name__}: unset it "
                "(and set a flow's shift to the number to use), or take a model without it"
            )
        if absent := [key for key in kind.needed if key not in config]:
            raise ValueError(f"the scheduler's config does not say {absent[0]}: take the one that the model came with")
        for key, value in given.items():
            expected = parameters[key].annotation
            if type(value) is not expected and (type(value), expected) != (int, float):
                raise ValueError(f"{key} {value!r} of a scheduler is no {expected.__name__}")
        return kind(**given)

    def is_of(self, told: object) -> bool:
        """Whether settings that a file tells are of this process; older files tell fewer of them."""
        return isinstance(told, Mapping) and {**self.settings, **told} == self.settings

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Process":
        # The tables follow the module's device but never its precision: model.bfloat16() would leave 8 bits of them.
        super()._apply(lambda table: table.to(fn(table).device), recurse)  # type: ignore[no-untyped-call]
        return self

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """What a network is trained to output (B, C, H, W) where x_t is mixed of x0 and noise: the inverse of split."""

    @abstractmethod
    def split(self, output: Tensor, x: Tensor, t: Time) -> Split:
        """What a network's output (B, C, H, W) for x (B, C, H, W) at t means."""

    def network_time(self, t: Tensor) -> Tensor:
        """How networks are told the timesteps t (B,)."""
        return t

    def alpha(self, t: Time, *, set_alpha_to_one: bool = True) -> Tensor:
        """alpha(t) (B, 1, 1, 1) of t (B,), or (1, 1, 1, 1) of an int; 1 at t = 0 if `set_alpha_to_one`."""
        return self._level(t, set_alpha_to_one)[0]

    def sigma(self, t: Time, *, set_alpha_to_one: bool = True) -> Tensor:
        """sigma(t) (B, 1, 1, 1) of t (B,), or (1, 1, 1, 1) of an int; 0 at t = 0 if `set_alpha_to_one`."""
        return self._level(t, set_alpha_to_one)[1]

    def _level(self, t: Time, set_alpha_to_one: bool = False) -> tuple[Tensor, Tensor]:
        """alpha(t), sigma(t); by default as networks know them, so that eps and x0 differ at t = 0 too."""
        t = torch.as_tensor(t, device=self.alphas.device).view(-1, 1, 1, 1)
        alpha, sigma = self.alphas[t], self.sigmas[t]
        if set_alpha_to_one:
            alpha, sigma = torch.where(t == 0, 1.0, alpha), torch.where(t == 0, 0.0, sigma)
        return alpha, sigma

    def add_noise(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """x_t (B, C, H, W) from x0 and noise (B, C, H, W), as networks are trained on it."""
        alpha, sigma = self._level(t)
        return alpha * x0 + sigma * noise

    def mix(
        self, x0: Tensor, eps: Tensor, s: Time, *, noise_std: Tensor | None = None, set_alpha_to_one: bool = True
    ) -> Tensor:
        """x_s (B, C, H, W) = alpha(s) x0 + sigma(s) eps: where every move of every sampler ends.

        noise_std (B, 1, 1, 1) leaves room for fresh noise, which the caller adds: noise_std * noise. Eq. 12,
        arXiv:2010.02502. `posterior_std` makes it a DDPM or Euler ancestral step, `sigma(s)` one of an LCM.
        """
        alpha, sigma = self._level(s, set_alpha_to_one)
        return alpha * x0 + _kept(sigma, noise_std) * eps

    def x0_from_eps(
        self, x: Tensor, eps: Tensor, t: Time, *, noise_std: Tensor | None = None, set_alpha_to_one: bool = False
    ) -> Tensor:
        """The data (B, C, H, W) left when eps (B, C, H, W) is taken out of x (B, C, H, W) at t: undoes `mix`."""
        alpha, sigma = self._level(t, set_alpha_to_one)
        return (x - _kept(sigma, noise_std) * eps) / alpha

    def eps_from_x0(self, x: Tensor, x0: Tensor, t: Time) -> Tensor:
        """The noise (B, C, H, W) left when x0 (B, C, H, W) is taken out of x (B, C, H, W) at t."""
        alpha, sigma = self._level(t)
        return (x - alpha * x0) / sigma

    def split_by_eps(self, x: Tensor, eps: Tensor, t: Time) -> Split:
        """The split of x (B, C, H, W) at t whose noise is eps (B, C, H, W)."""
        return Split(self.x0_from_eps(x, eps, t), eps)

    def ddim_step(
        self,
        x: Tensor,
        eps: Tensor,
        t: Time,
        s: Time,
        *,
        noise_std: Tensor | None = None,
        set_alpha_to_one: bool = True,
    ) -> Tensor:
        """Move x (B, C, H, W) from t to s along a given eps (B, C, H, W), up or down. Eq. 1, arXiv:2406.14539.

        For methods that change eps; whoever has a network's split mixes that. `set_alpha_to_one=False` is the teacher's
        solver, whose last stop is the slightly noised first level that it was trained on, not the data.
        """
        x0 = self.x0_from_eps(x, eps, t, set_alpha_to_one=set_alpha_to_one)
        return self.mix(x0, eps, s, noise_std=noise_std, set_alpha_to_one=set_alpha_to_one)

    def posterior_std(self, t: Time, s: Time, *, set_alpha_to_one: bool = True) -> Tensor:
        """Deviation (B, 1, 1, 1) of x_s given x_t and the data, s <= t. Eq. 16 at eta = 1, arXiv:2010.02502."""
        alpha_t, sigma_t = self._level(t, set_alpha_to_one)
        alpha_s, sigma_s = self._level(s, set_alpha_to_one)
        fresh = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2  # what x_t has beyond x_s, scaled to its alpha
        return sigma_s / sigma_t * fresh.clamp(min=0).sqrt()


class VP(Process):
    """Variance-preserving: alpha(t) = sqrt(alphas_cumprod[t]), sigma(t) = sqrt(1 - alphas_cumprod[t]).

    Networks output eps, or v = alpha(t) eps - sigma(t) x0 (Salimans and Ho, arXiv:2202.00512). Diffusers' names and
    Stable Diffusion's values. Raises ValueError for an unknown `beta_schedule` or `prediction_type` and for betas
    outside (0, 1).
    """

    schedulers = (
        *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler", "UniPCMultistepScheduler"),
        *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
        *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler"),
        *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DDIMInverseScheduler"),
    )
    needed = ("beta_start", "beta_end", "beta_schedule")
    refused = ("trained_betas", "rescale_betas_zero_snr", "use_flow_sigmas")

    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        prediction_type: str = "epsilon",
    ) -> None:
        if beta_schedule not in ("scaled_linear", "linear"):
            raise ValueError(f"beta_schedule {beta_schedule!r} is not supported; choose one of scaled_linear, linear")
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {prediction_type!r} is not one of epsilon, v_prediction")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
        _check_timesteps(num_train_timesteps)
        power = 2.0 if beta_schedule == "scaled_linear" else 1.0
        roots = beta_start ** (1 / power), beta_end ** (1 / power)
        betas = torch.linspace(*roots, num_train_timesteps, dtype=torch.float32) ** power
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        super().__init__(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())
        self.prediction_type = prediction_type
        levels = {"beta_start": beta_start, "beta_end": beta_end, "beta_schedule": beta_schedule}
        self.settings = {"prediction_type": prediction_type, **levels}

    def target(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        alpha, sigma = self._level(t)
        return alpha * noise - sigma * x0

    def split(self, output: Tensor, x: Tensor, t: Time) -> Split:
        """By eps, what is left of x is x0; by v, both are a rotation of x and v."""
        if self.prediction_type == "epsilon":
            return self.split_by_eps(x, output, t)
        alpha, sigma = self._level(t)
        return Split(alpha * x - sigma * output, alpha * output + sigma * x)


class Flow(Process):
    """Flow matching (arXiv:2210.02747): x_t = (1 - sigma) x0 + sigma eps, and networks output the velocity eps - x0.

    sigma(t) = shift u / (1 + (shift - 1) u) of u = (t + 1) / T, as diffusers' `FlowMatchEulerDiscreteScheduler`.
    """

    schedulers = ("FlowMatchEulerDiscreteScheduler",)
    refused = ("use_dynamic_shifting", "invert_sigmas", "shift_terminal", "prediction_type")

    def __init__(self, *, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
        if not 0.001 <= shift <= 1000:
            raise ValueError(f"shift {shift} is out of range; choose 0.001 to 1000 (1 shifts nothing, SD3 has 3)")
        _check_timesteps(num_train_timesteps)
        u = torch.arange(1, num_train_timesteps + 1, dtype=torch.float32) / num_train_timesteps
        sigmas = shift * u / (1 + (shift - 1) * u)
        super().__init__(1 - sigmas, sigmas)
        self.settings = {"shift": shift}

    def target(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        return noise - x0

    def split(self, output: Tensor, x: Tensor, t: Time) -> Split:
        """Along the velocity, down to the data and up to the noise; no division at either end."""
        alpha, sigma = self._level(t)
        return Split(x - sigma * output, x + alpha * output)

    def velocity(self, split: Split) -> Tensor:
        """The velocity (B, C, H, W) that made a split."""
        return split.eps - split.x0

    def euler_step(self, x: Tensor, velocity: Tensor, t: Time, s: Time) -> Tensor:
        """Move x (B, C, H, W) from t to s, up or down, along a given velocity (B, C, H, W); 0 is the data."""
        return x + (self.sigma(s) - self.sigma(t)) * velocity

    def network_time(self, t: Tensor) -> Tensor:
        """T sigma(t) (B,) float32, as diffusers' scheduler counts."""
        return self.num_train_timesteps * self.sigmas[t]


def _kind_of(scheduler: str) -> type[Process]:
    """The process whose scheduler this is, ours or one of another package; ValueError for none, and for two."""
    kinds = [Process]
    for kind in kinds:
        kinds += kind.__subclasses__()
    told = {kind: kind.schedulers for kind in kinds if "schedulers" in vars(kind)}
    named = [kind for kind, schedulers in told.items() if scheduler in schedulers]
    if not named:
        known = ", ".join(one for schedulers in told.values() for one in schedulers)
        raise ValueError(
            f"scheduler {scheduler!r} is of no known process; known schedulers (_class_name): {known}. A process of "
            "yours is known where the module that defines the backbone imports it (family.backbone, --backbone)"
        )
    if len(named) > 1:
        paths = " and ".join(f"{kind.__module__}.{kind.__name__}" for kind in named)
        raise ValueError(f"scheduler {scheduler!r} is one of both {paths}: take another name for yours")
    return named[0]


def _at_fixed_shift(config: Mapping[str, Any], tokens: int | None) -> Mapping[str, Any]:
    """The config with a number in the place of a shift that changes with a picture's tokens, as FLUX.1-dev's does.

    mu is linear in the tokens and the shift exp(mu), or mu itself where `time_shift_type` is linear: `calculate_shift`
    of diffusers' FluxPipeline, and the defaults are those of its scheduler.
    """
    if tokens is None or not config.get("use_dynamic_shifting"):
        return config
    usual = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    few, many, low, high = (config.get(name, number) for name, number in usual.items())
    numbers = all(type(number) in (int, float) for number in (few, many, low, high))
    kind = config.get("time_shift_type", "exponential")
    if not numbers or not few < many or kind not in ("exponential", "linear"):
        said = {name: config[name] for name in (*usual, "time_shift_type") if name in config}
        raise ValueError(f"a shift by resolution of {said} cannot be computed: unset use_dynamic_shifting, set shift")
    mu = low + (high - low) * (tokens - few) / (many - few)
    return {**config, "use_dynamic_shifting": False, "shift": float(mu if kind == "linear" else exp(min(mu, 99.0)))}


def _check_timesteps(num_train_timesteps: int) -> None:
    if not 1 <= num_train_timesteps <= 100_000:
        raise ValueError(f"num_train_timesteps {num_train_timesteps} is out of range; choose 1 to 100,000, as 1000")


def _kept(sigma: Tensor, noise_std: Tensor | None) -> Tensor:
    """What remains of the old noise (B, 1, 1, 1) beside fresh noise of noise_std (B, 1, 1, 1), together of sigma."""
    return sigma if noise_std is None else (sigma**2 - noise_std**2).clamp(min=0).sqrt()


@dataclass(frozen=True)
class NoisedData:
    """One batch and its one noise: x0, noise (B, C, H, W) and the process that mixes them at whatever timestep."""

    x0: Tensor
    noise: Tensor
    process: Process

    def __len__(self) -> int:
        return len(self.x0)

    def at(self, t: Time) -> Tensor:
        """x_t (B, C, H, W) at t (B,): every loss of an iteration sees a point of the same straight mixture."""
        return self.process.add_noise(self.x0, self.noise, t)
