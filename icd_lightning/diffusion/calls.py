"""Several losses with their network evaluations joined: ten forward passes become five of twice the batch.

A loss is written as a plan: a generator that yields each jump it needs as a `Call`, is sent the result, and returns its
value. `alone` runs one plan; `together` runs several side by side and makes the calls that fall due at the same time as
one batch, where their jumps can be joined (see `DDIMJump.joins`).
"""

from collections.abc import Generator, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from icd_lightning.diffusion.jumps import Jump

Name = TypeVar("Name")
Value = TypeVar("Value")


class Call(NamedTuple):
    """One jump of x (B, C, H, W) from t (B,) to s (B,), with or without gradient.

    Of the calls that wait, those of the lowest `turn` are made: the solver's (0) before the targets' (1), these before
    the student's own (2). So calls of one network meet although their losses have come to them by different ways.
    """

    jump: Jump
    x: Tensor
    t: Tensor
    s: Tensor
    turn: int

    @property
    def grad(self) -> bool:
        """Only the student's own evaluation is differentiated."""
        return self.turn == 2

    def make(self) -> Tensor:
        """Evaluate it by itself."""
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            return self.jump(self.x, self.t, self.s)


Plan = Generator[Call, Tensor, Value]


def make_joined(calls: Sequence[Call]) -> list[Tensor]:
    """Make calls, those whose jumps join as one batch; the results are in the order of the calls."""
    groups: dict[Hashable, list[int]] = {}
    for place, call in enumerate(calls):
        joins = getattr(call.jump, "joins", None)
        groups.setdefault(("alone", place) if joins is None else joins, []).append(place)
    results: dict[int, Tensor] = {}
    for places in groups.values():
        own = [calls[place] for place in places]
        joined = own[0] if len(own) == 1 else _join(own)
        parts = torch.split(joined.make(), [len(call.x) for call in own])
        results.update(zip(places, parts, strict=True))
    return [results[place] for place in range(len(calls))]


def _join(calls: Sequence[Call]) -> Call:
    first: Any = calls[0].jump
    jump = first.join([call.jump for call in calls], [call.t for call in calls])
    x, t, s = (torch.cat(column) for column in zip(*((call.x, call.t, call.s) for call in calls), strict=True))
    return Call(jump, x, t, s, calls[0].turn)


def together(plans: Mapping[Name, Plan[Value]]) -> dict[Name, Value]:
    """Run plans side by side and return what each of them returns."""
    waiting, results = {name: next(plan) for name, plan in plans.items()}, dict[Name, Value]()
    while waiting:
        turn = min(call.turn for call in waiting.values())
        due = {name: call for name, call in waiting.items() if call.turn == turn}
        for name, x in zip(due, make_joined(list(due.values())), strict=True):
            try:
                waiting[name] = plans[name].send(x)
            except StopIteration as end:
                del waiting[name]
                results[name] = end.value
    return {name: results[name] for name in plans}


def alone(plan: Plan[Value]) -> Value:
    """Run one plan and return what it returns."""
    return together({None: plan})[None]
