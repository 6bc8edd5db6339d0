"""Sampling: a loop of jumps over any denoiser, in either direction, and the 50-step DDIM loops it is compared with.

Latents stay float32 between jumps. `on_step` is called after each with a `Step`; to keep every latent and count network
evaluations, collect them:

    steps: list[Step] = []
    x = generate(reverse_model, noise, boundaries, schedule, on_step=steps.append)
    nfe = sum(step.nfe for step in steps)

The loops build no graph, except `run_jumps`, through which a method may differentiate.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from icd_lightning.diffusion.boundaries import Boundaries
from icd_lightning.diffusion.schedule import Denoiser, NoiseSchedule


class Step(NamedTuple):
    """One jump made: from timestep t to s, x (B, C, H, W) at s, the evaluations nfe it took (2 for guidance by CFG)."""

    t: int
    s: int
    x: Tensor
    nfe: int


OnStep = Callable[[Step], object]


def run_jumps(
    denoise: Denoiser,
    x: Tensor,
    jumps: Iterable[tuple[int, int]],
    schedule: NoiseSchedule,
    *,
    on_step: OnStep | None = None,
) -> Tensor:
    """Take x (B, C, H, W) along jumps (t, s), each one evaluation at t; returns x (B, C, H, W) at the last s."""
    for t, s in jumps:
        x = schedule.jump(denoise, x, _batch_of(t, x), s)
        if on_step is not None:
            on_step(Step(t, s, x, _nfe(denoise)))
    return x


@torch.no_grad()
def generate(
    denoise: Denoiser, x: Tensor, boundaries: Boundaries, schedule: NoiseSchedule, *, on_step: OnStep | None = None
) -> Tensor:
    """Noise x (B, C, H, W) to latents x0 (B, C, H, W) with the reverse model: num_segments evaluations."""
    return run_jumps(denoise, x, boundaries.reverse_jumps, schedule, on_step=on_step)


@torch.no_grad()
def invert(
    denoise: Denoiser,
    x0: Tensor,
    noise: Tensor,
    boundaries: Boundaries,
    schedule: NoiseSchedule,
    *,
    on_step: OnStep | None = None,
) -> Tensor:
    """Latents x0 (B, C, H, W) to the noise (B, C, H, W) that generates them, with the forward model.

    noise (B, C, H, W) enters once and lightly: the forward model begins at start_timestep, not at data.
    """
    x = schedule.add_noise(x0, noise, boundaries.start_timestep)
    return run_jumps(denoise, x, boundaries.forward_jumps, schedule, on_step=on_step)


def reconstruct(
    forward_model: Denoiser,
    reverse_model: Denoiser,
    x0: Tensor,
    noise: Tensor,
    boundaries: Boundaries,
    schedule: NoiseSchedule,
) -> Tensor:
    """Invert latents x0 (B, C, H, W), starting with noise (B, C, H, W), then generate them again (B, C, H, W)."""
    return generate(reverse_model, invert(forward_model, x0, noise, boundaries, schedule), boundaries, schedule)


def ddim_timesteps(num_inference_steps: int, num_train_timesteps: int = 1000) -> tuple[int, ...]:
    """The grid of a plain DDIM sampler, ascending: 0, 20, ..., 980 for 50 steps (diffusers' "leading" spacing).

    Raises ValueError for more steps than timesteps, or none.
    """
    stride = num_train_timesteps // _checked(num_inference_steps, num_train_timesteps)
    return tuple(range(0, stride * num_inference_steps, stride))


def trailing_timesteps(num_inference_steps: int, num_train_timesteps: int = 1000) -> tuple[int, ...]:
    """The grid of SDXL-Turbo, ascending: 249, 499, 749, 999 for 4 steps (diffusers' "trailing" spacing)."""
    stride = num_train_timesteps / _checked(num_inference_steps, num_train_timesteps)
    return tuple(round(num_train_timesteps - i * stride) - 1 for i in reversed(range(num_inference_steps)))


def lcm_timesteps(num_inference_steps: int, solver_timesteps: Sequence[int]) -> tuple[int, ...]:
    """The grid of a latent consistency model, ascending: as many of its solver's timesteps, evenly from the last."""
    count = len(solver_timesteps)
    places = [i * count // _checked(num_inference_steps, count) for i in range(num_inference_steps)]
    return tuple(solver_timesteps[count - 1 - place] for place in reversed(places))


def falling(timesteps: Sequence[int]) -> list[tuple[int, int]]:
    """The steps (t, s) from the last of the ascending timesteps down to 0, one for each."""
    return [(t, s) for s, t in _rising(timesteps)][::-1]


@torch.no_grad()
def ddim_generate(
    denoise: Denoiser, x: Tensor, timesteps: Sequence[int], schedule: NoiseSchedule, *, on_step: OnStep | None = None
) -> Tensor:
    """Noise x (B, C, H, W) at the last of the ascending timesteps to latents (B, C, H, W): one evaluation for each."""
    return _run_ddim(denoise, x, falling(timesteps), schedule, on_step)


@torch.no_grad()
def ddim_invert(
    denoise: Denoiser, x0: Tensor, timesteps: Sequence[int], schedule: NoiseSchedule, *, on_step: OnStep | None = None
) -> Tensor:
    """Latents x0 (B, C, H, W) to noise (B, C, H, W) at the last of the ascending timesteps: one evaluation for each."""
    return _run_ddim(denoise, x0, _rising(timesteps), schedule, on_step)


def ddim_path(
    denoise: Denoiser,
    x0: Tensor,
    timesteps: Sequence[int],
    schedule: NoiseSchedule,
    *,
    on_step: OnStep | None = None,
) -> list[Tensor]:
    """Every latent (B, C, H, W) that `ddim_invert` passes, x0 first, the noise last."""
    path = [x0]

    def keep(step: Step) -> None:
        path.append(step.x)
        if on_step is not None:
            on_step(step)

    ddim_invert(denoise, x0, timesteps, schedule, on_step=keep)
    return path


def _run_ddim(
    denoise: Denoiser, x: Tensor, steps: Iterable[tuple[int, int]], schedule: NoiseSchedule, on_step: OnStep | None
) -> Tensor:
    for t, s in steps:
        # Up or down, a step asks the network at its noisier end: going up takes back what coming down will do, with the
        # one error that x is not there yet.
        eps = denoise(x, _batch_of(max(t, s), x))
        x = schedule.ddim_step(x, eps, t, s, set_alpha_to_one=False)
        if on_step is not None:
            on_step(Step(t, s, x, _nfe(denoise)))
    return x


def _rising(timesteps: Sequence[int]) -> list[tuple[int, int]]:
    # Data counts as alphas_cumprod[0], so a grid with a 0 spends one evaluation on standing still, as diffusers does.
    return list(zip((0, *timesteps), timesteps, strict=False))


def _checked(num_inference_steps: int, most: int) -> int:
    if not 1 <= num_inference_steps <= most:
        raise ValueError(f"num_inference_steps {num_inference_steps} must lie between 1 and {most}")
    return num_inference_steps


def _batch_of(t: int, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), t, dtype=torch.long, device=x.device)


def _nfe(denoise: Denoiser) -> int:
    return int(getattr(denoise, "nfe", 1))
