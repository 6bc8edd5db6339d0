"""What the baselines on flow models share: the samplers' grid, and solvers that look ahead of a step.

The grid is diffusers' for flow matching, from pure noise down to the data: num_inference_steps values of sigma. A
network knows no time below the table's first, 1 / T without shift; of the data itself it is told that one.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from icd_lightning.diffusion import Flow, OnStep, Split, falling, trailing_timesteps
from icd_lightning.editing.baselines.base import Baseline
from icd_lightning.editing.baselines.parts import Branch, Move, Parts, descend
from icd_lightning.editing.limits import Injection

Steps = Sequence[tuple[int, int]]
"""(t, s), in the order of travel."""

Path = Generator[Tensor | None, tuple[Tensor, Tensor], Tensor]
"""Yields what x becomes, is sent x, as a control may have changed it, and its velocity; returns the last x."""


class FlowBaseline(Baseline):
    """A baseline of flow models, along num_inference_steps of Euler's steps from noise to data."""

    needs = Flow
    process: Flow

    def __init__(
        self, parts: Parts, *, num_inference_steps: int, guidance_scale: float, control: Injection | None = None
    ) -> None:
        super().__init__(parts, guidance_scale, control)
        self.steps = falling(trailing_timesteps(num_inference_steps, self.process.num_train_timesteps))

    def climb(self, x0: Tensor, prompts: Sequence[str], steps: Steps, move: Move, on_step: OnStep | None) -> Tensor:
        """Take latents x0 (B, C, h, w) up the steps, unguided: x = move(x, split, index)."""
        source = self.conditioner(prompts)
        branches = [Branch(source, source)]
        return descend(self.parts, x0, steps, lambda index: branches, move, on_step=on_step)


@dataclass(frozen=True, eq=False)
class LookAhead:
    """A solver that takes each step by the velocity at a point of it, `ahead` of its way: 0.5 is the midpoint.

    To be there it moves by the velocity where it stands: a second evaluation, or, if it `reuses`, what the step before
    found at its own point.
    """

    process: Flow
    ahead: float
    reuses: bool

    def between(self, t: int, s: int) -> int:
        """The timestep whose sigma is nearest to that of the point."""
        sigma = (1 - self.ahead) * self.process.sigma(t) + self.ahead * self.process.sigma(s)
        return int((self.process.sigmas - sigma.flatten()).abs().argmin())

    def evaluations(self, steps: Steps) -> list[tuple[int, int]]:
        """Where the network is asked along the steps, and where each answer leads."""
        times: list[int] = []
        for t, s in steps:
            times += [self.between(t, s)] if self.reuses and times else [t, self.between(t, s)]
        return list(pairwise([*times, *(s for _, s in steps[-1:])]))

    def mover(self, steps: Steps) -> Move:
        """What takes the branches' x (n B, C, h, w) along the evaluations of the steps."""
        path = self._path(steps)
        next(path, None)

        def move(x: Tensor, split: Split, index: int) -> Tensor:
            try:
                moved = path.send((x, self.process.velocity(split)))
            except StopIteration as end:
                moved = end.value
            assert moved is not None
            return moved

        return move

    def _path(self, steps: Steps) -> Path:
        x = velocity = None
        for t, s in steps:
            if velocity is None:
                x, velocity = yield x
            _, there = yield self.process.euler_step(x, velocity, t, self.between(t, s))
            x, velocity = self.process.euler_step(x, there, t, s), there if self.reuses else None
        return x
