"""Several losses with their network evaluations joined: ten forward passes become five of twice the batch.

A loss is written as a plan: a generator that yields each evaluation it needs as a `Call`, is sent the result, and
returns its value. `alone` runs one plan; `together` runs several side by side and hands the calls that fall due at the
same time to `evaluate`, which may join those of one network in one batch (`models.backbone.evaluate_joined`).
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from icd_lightning.diffusion.schedule import Denoiser

Name = TypeVar("Name")


class Call(NamedTuple):
    """One evaluation eps (B, C, H, W) = denoise(x (B, C, H, W), t (B,)), with or without gradient.

    Of the calls that wait, those of the lowest `turn` are made: the solver's (0) before the targets' (1), these before
    the student's own (2). So calls of one network meet although their losses have come to them by different ways.
    """

    denoise: Denoiser
    x: Tensor
    t: Tensor
    turn: int

    @property
    def grad(self) -> bool:
        """Only the student's own evaluation is differentiated."""
        return self.turn == 2

    def make(self) -> Tensor:
        """Evaluate it by itself."""
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            return self.denoise(self.x, self.t)


Plan = Generator[Call, Tensor, Tensor]


def one_by_one(calls: Sequence[Call]) -> list[Tensor]:
    """Evaluate calls, each by itself."""
    return [call.make() for call in calls]


def together(
    plans: Mapping[Name, Plan], evaluate: Callable[[Sequence[Call]], Sequence[Tensor]] = one_by_one
) -> dict[Name, Tensor]:
    """Run plans side by side and return what each of them returns."""
    waiting, results = {name: next(plan) for name, plan in plans.items()}, dict[Name, Tensor]()
    while waiting:
        turn = min(call.turn for call in waiting.values())
        due = {name: call for name, call in waiting.items() if call.turn == turn}
        for name, eps in zip(due, evaluate(list(due.values())), strict=True):
            try:
                waiting[name] = plans[name].send(eps)
            except StopIteration as end:
                del waiting[name]
                results[name] = end.value
    return {name: results[name] for name in plans}


def alone(plan: Plan) -> Tensor:
    """Run one plan and return what it returns."""
    return together({None: plan})[None]
