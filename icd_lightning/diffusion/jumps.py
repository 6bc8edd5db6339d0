"""Jumps x_s = jump(x, t, s) and loops of them: the one currency of losses, samplers and editors.

A `Jump` binds a network to prompt, guidance and adapter; whoever takes jumps knows nothing of these. Latents stay
float32 between jumps. `on_step` is called after each with a `Step`; to keep every latent and count network evaluations,
collect them (a jump or its denoiser says by `nfe` how many its latest call took, by default 1):

    steps: list[Step] = []
    x = generate(reverse_model, noise, boundaries, on_step=steps.append)
    nfe = sum(step.nfe for step in steps)

The loops build no graph, except `run_jumps`, through which a method may differentiate.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icd_lightning.diffusion.boundaries import Boundaries
from icd_lightning.diffusion.process import Denoiser, Process

Jump = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x (B, C, H, W) at s = jump(x (B, C, H, W) at t, t (B,) long, s (B,) long)."""


@dataclass(frozen=True)
class DDIMJump:
    """One evaluation at t, split and mixed again at s. Eq. 3, arXiv:2406.14539. From s to s it is the identity.

    `set_alpha_to_one=False` makes it the teacher's solver: see `Process.mix`.
    """

    denoise: Denoiser
    process: Process
    set_alpha_to_one: bool = True

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x0, eps = self.denoise(x, t)
        moved = self.process.mix(x0, eps, s, set_alpha_to_one=self.set_alpha_to_one)
        return torch.where((t == s).view(-1, 1, 1, 1), x, moved)

    @property
    def joins(self) -> Hashable | None:
        """Jumps of one value can be made as one batch by `join`; None: this one cannot."""
        network = getattr(self.denoise, "joins", None)
        return None if network is None else (network, id(self.process), self.set_alpha_to_one)

    def join(self, others: Sequence["DDIMJump"], times: Sequence[Tensor]) -> "DDIMJump":
        """One jump for the batches of `others` behind one another, whose timesteps are `times`, (B_i,) each."""
        denoise: Any = self.denoise
        return DDIMJump(denoise.join([one.denoise for one in others], times), self.process, self.set_alpha_to_one)


@dataclass(frozen=True)
class SamplerJump:
    """One small step of a plain DDIM sampler, up or down: the network is asked at the noisier end.

    So a step up takes back what the step down will do, with the one error that x is not there yet.
    """

    denoise: Denoiser
    process: Process

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x0, eps = self.denoise(x, torch.maximum(t, s))
        # up, the network was not asked of this x; down, its own x0 holds where alpha(t) is 0, too
        up = self.process.x0_from_eps(x, eps, t)
        return self.process.mix(torch.where((t < s).view(-1, 1, 1, 1), up, x0), eps, s, set_alpha_to_one=False)


class Step(NamedTuple):
    """One jump made: from timestep t to s, x (B, C, H, W) at s, the evaluations nfe it took (2 for guidance by CFG)."""

    t: int
    s: int
    x: Tensor
    nfe: int


OnStep = Callable[[Step], object]


def _evaluations(jump: Jump) -> int:
    """What the latest call took: as the jump says, or the denoiser that it binds, or one."""
    return int(getattr(jump, "nfe", 0) or getattr(getattr(jump, "denoise", None), "nfe", 1))


def run_jumps(jump: Jump, x: Tensor, steps: Iterable[tuple[int, int]], *, on_step: OnStep | None = None) -> Tensor:
    """Take x (B, C, H, W) along the steps (t, s); returns x (B, C, H, W) at the last s."""
    for t, s in steps:
        t_batch, s_batch = (torch.full((len(x),), time, device=x.device) for time in (t, s))
        x = jump(x, t_batch, s_batch)
        if on_step is not None:
            on_step(Step(t, s, x, _evaluations(jump)))
    return x


@torch.no_grad()
def generate(jump: Jump, x: Tensor, boundaries: Boundaries, *, on_step: OnStep | None = None) -> Tensor:
    """Noise x (B, C, H, W) to latents x0 (B, C, H, W) with the reverse model: num_segments jumps."""
    return run_jumps(jump, x, boundaries.jumps["reverse"], on_step=on_step)


@torch.no_grad()
def invert(
    jump: Jump, x0: Tensor, noise: Tensor, boundaries: Boundaries, process: Process, *, on_step: OnStep | None = None
) -> Tensor:
    """Latents x0 (B, C, H, W) to the noise (B, C, H, W) that generates them, with the forward model.

    noise (B, C, H, W) enters once and lightly: the forward model begins at start_timestep, not at data.
    """
    x = process.add_noise(x0, noise, boundaries.start_timestep)
    return run_jumps(jump, x, boundaries.jumps["forward"], on_step=on_step)


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
    return [(t, s) for s, t in rising(timesteps)][::-1]


def rising(timesteps: Sequence[int]) -> list[tuple[int, int]]:
    """The steps (t, s) from 0 up to the last of the ascending timesteps, one for each.

    A grid with a 0 spends one evaluation on standing still, as diffusers does.
    """
    return list(zip((0, *timesteps), timesteps, strict=False))


@torch.no_grad()
def ddim_generate(
    denoise: Denoiser, x: Tensor, timesteps: Sequence[int], process: Process, *, on_step: OnStep | None = None
) -> Tensor:
    """Noise x (B, C, H, W) at the last of the ascending timesteps to latents (B, C, H, W): one step for each."""
    return run_jumps(SamplerJump(denoise, process), x, falling(timesteps), on_step=on_step)


@torch.no_grad()
def ddim_invert(
    denoise: Denoiser, x0: Tensor, timesteps: Sequence[int], process: Process, *, on_step: OnStep | None = None
) -> Tensor:
    """Latents x0 (B, C, H, W) to noise (B, C, H, W) at the last of the ascending timesteps: one step for each."""
    return run_jumps(SamplerJump(denoise, process), x0, rising(timesteps), on_step=on_step)


def _checked(num_inference_steps: int, most: int) -> int:
    if not 1 <= num_inference_steps <= most:
        raise ValueError(f"num_inference_steps {num_inference_steps} must lie between 1 and {most}")
    return num_inference_steps
