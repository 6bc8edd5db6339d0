"""Several losses with their network evaluations joined: ten forward passes become five of twice the batch.

A loss is written as a plan: a generator that yields each jump it needs as a `Call`, is sent the result, and returns its
value. `alone` runs one plan; `together` runs several side by side and makes the calls that fall due at the same time as
one batch, where their jumps can be joined (see `DDIMJump.joins`).
"""

from collections.abc import Generator, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from icd_lightning.diffusion.jumps import Jump

Name = TypeVar("Name")
Value = TypeVar("Value")


class Call(NamedTuple):
    """One jump of x (B, C, H, W) from t (B,) to s (B,).

    Of the calls that wait, those of the lowest `turn` are made: the solver's (0) before the targets' (1), these before
    the student's own (2), which alone are differentiated. So calls of one network meet although their losses have come
    to them by different ways.
    """

    jump: Jump
    x: Tensor
    t: Tensor
    s: Tensor
    turn: int


Plan = Generator[Call, Tensor, Value]


def together(plans: Mapping[Name, Plan[Value]]) -> dict[Name, Value]:
    """Run plans side by side and return what each of them returns."""
    if alien := [name for name, plan in plans.items() if not isinstance(plan, Generator)]:
        raise ValueError(f"loss {alien[0]}: its plan yields nothing: yield a Call(jump, x, t, s, turn) for each jump")
    waiting, results = {name: _called(name, next(plan)) for name, plan in plans.items()}, dict[Name, Value]()
    while waiting:
        turn = min(call.turn for call in waiting.values())
        due = {name: call for name, call in waiting.items() if call.turn == turn}
        with torch.set_grad_enabled(turn == 2 and torch.is_grad_enabled()):
            made = _make(due)
        for name, x in made.items():
            try:
                waiting[name] = _called(name, plans[name].send(x))
            except StopIteration as end:
                del waiting[name]
                results[name] = end.value
    return {name: results[name] for name in plans}


def _called(name: object, call: object) -> Call:
    if not isinstance(call, Call) or call.turn not in (0, 1, 2):
        what = f"a call of turn {call.turn}" if isinstance(call, Call) else f"a {type(call).__name__}"
        raise ValueError(f"loss {name}: its plan yields {what}: yield Call(jump, x, t, s, turn), turn 0, 1 or 2")
    return call


def _make(due: Mapping[Name, Call]) -> dict[Name, Tensor]:
    """The results of the calls of one turn, by name; those whose jumps join are made as one batch."""
    groups: dict[Hashable, list[Name]] = {}
    for name, call in due.items():
        joins = getattr(call.jump, "joins", None)
        groups.setdefault(("alone", name) if joins is None else joins, []).append(name)
    made: dict[Name, Tensor] = {}
    for names in groups.values():
        calls = [due[name] for name in names]
        jump: Any = calls[0].jump
        if len(calls) > 1:
            jump = jump.join([call.jump for call in calls], [call.t for call in calls])
        x, t, s = (torch.cat(column) for column in zip(*((call.x, call.t, call.s) for call in calls), strict=True))
        made.update(zip(names, torch.split(jump(x, t, s), [len(call.x) for call in calls]), strict=True))
    return made


def alone(plan: Plan[Value]) -> Value:
    """Run one plan and return what it returns."""
    return together({None: plan})[None]
