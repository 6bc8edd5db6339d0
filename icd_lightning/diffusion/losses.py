"""The losses: pure functions of jumps, one value per sample (B,), and the objects that a configuration names.

An iteration of invertible consistency distillation (Eq. 5, arXiv:2406.14539) sums four, named after the student they
train: reverse_cd and forward_cd are `Consistency`, reverse_preservation and forward_preservation `Preservation`.

A `Loss` says what it draws, which student it trains and what it computes; the task sums what the configuration names.
The equations are plans (see `calls`), so that their network evaluations can be made together. What needs no gradient is
evaluated before the one call that does, so a loss never holds more than one graph.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icd_lightning.diffusion.boundaries import Boundaries, Direction, RoundTrips, TrainingPairs
from icd_lightning.diffusion.calls import Call, Plan
from icd_lightning.diffusion.draws import Draws
from icd_lightning.diffusion.jumps import Jump
from icd_lightning.diffusion.process import Denoiser, NoisedData

OTHER: dict[Direction, Direction] = {"reverse": "forward", "forward": "reverse"}


def pseudo_huber(pred: Tensor, target: Tensor, c: float) -> Tensor:
    """mean(sqrt(d^2 + c^2) - c) (B,) of the difference d of pred and target (B, ...), in float32 or better.

    Quadratic below c, absolute above (arXiv:2310.14189).
    """
    difference = _difference(pred, target)
    return ((difference.square() + c**2).sqrt() - c).flatten(1).mean(1)


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """Mean square (B,) of the difference of pred and target (B, ...), in float32 or better."""
    return _difference(pred, target).square().flatten(1).mean(1)


def _difference(pred: Tensor, target: Tensor) -> Tensor:
    # At c = 0.001 half precision would leave nothing of a good student's error; float64 is kept for tests.
    precision = torch.promote_types(pred.dtype, torch.float32)
    return pred.to(precision) - target.to(precision)


def consistency_plan(
    student: Jump, solver: Jump, data: NoisedData, pairs: TrainingPairs, *, huber_c: float
) -> Plan[Tensor]:
    """L_CD (B,): from t and from the solver's next point t_next, the student must land on the same x at the boundary.

    pairs holds t, t_next, boundary (B,) of either direction. At t_next = boundary the student stays where it is, so
    the target is the teacher's step itself: the boundary condition that anchors the model. Gradient comes from t only.
    """
    x = data.at(pairs.t)
    x_next = yield Call(solver, x, pairs.t, pairs.t_next, turn=0)
    target = yield Call(student, x_next, pairs.t_next, pairs.boundary, turn=1)
    landed = yield Call(student, x, pairs.t, pairs.boundary, turn=2)
    return pseudo_huber(landed, target, huber_c)


def preservation_plan(away: Jump, back: Jump, data: NoisedData, trips: RoundTrips, *, huber_c: float) -> Plan[Tensor]:
    """L_f or L_r (B,): jump from t to the segment's other end s with `away`, return with `back`, and find x_t again.

    Eq. 4, arXiv:2406.14539. trips holds t, s (B,). Only `back` gets gradient: L_f goes down with the reverse student
    and trains the forward one on the way up, L_r is its mirror image.
    """
    x = data.at(trips.t)
    x_away = yield Call(away, x, trips.t, trips.s, turn=1)
    returned = yield Call(back, x_away, trips.s, trips.t, turn=2)
    return pseudo_huber(returned, x, huber_c)


def guidance_distillation(student: Denoiser, teacher: Denoiser, data: NoisedData, t: Tensor) -> Tensor:
    """Stage 1 (B,): a student with embedded w against the teacher guided by the same w, at t (B,).

    Squared error of what the network outputs: of eps as in the paper; of v, which at large t is the error of x0, where
    eps hardly rewards it.
    """
    x = data.at(t)
    with torch.no_grad():
        target = data.process.target(*teacher(x, t), t)
    return squared_error(data.process.target(*student(x, t), t), target)


@dataclass(frozen=True)
class LossInputs:
    """What one iteration gives to its losses.

    `solver(w)` is the teacher's step, `students[direction](w)` a student's jump, at guidance scales w, a number or
    (B,).
    """

    data: NoisedData
    boundaries: Boundaries
    guidance_scales: Sequence[float]
    solver: Callable[[Tensor | float], Jump]
    students: Mapping[Direction, Callable[[Tensor | float], Jump]]


class LossValues(NamedTuple):
    """A loss of each sample (B,), and the segment (B,) long of the time axis in which it was taken."""

    values: Tensor
    segments: Tensor


class Loss(ABC):
    """A loss of one student, by name in the configuration: `class_path`, and the arguments of its class.

    Args:
        trains: which student gets its gradient: reverse (noise -> image) or forward (image -> noise).
        weight: what its mean counts in the sum.
        huber_c: c of the pseudo-Huber distance.

    Raises ValueError for a weight or a c that is not positive and finite.
    """

    def __init__(self, trains: Direction, *, weight: float = 1.0, huber_c: float = 0.001) -> None:
        if trains not in OTHER:
            raise ValueError(f"trains {trains!r} is none of reverse, forward")
        for name, value in (("weight", weight), ("huber_c", huber_c)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} {value} of a loss must be positive and finite; null leaves the loss out")
        self.trains, self.weight, self.huber_c = trains, weight, huber_c

    def settings(self) -> dict[str, Any]:
        """What checkpoints and cards say of it: its class and its plain values; of anything else only the kind."""
        plain = json.dumps(vars(self), default=lambda value: type(value).__name__)
        return {"kind": type(self).__name__, **json.loads(plain)}

    @abstractmethod
    def plan(self, inputs: LossInputs, draws: Draws) -> Plan[LossValues]:
        """Draw, and yield the jumps to make; only those of turn 2 are differentiated."""

    def check(self, name: str, made: object, *, count: int) -> None:
        """ValueError for what a plan returned, if that is no `LossValues` of `count` samples, or trains nothing."""
        shapes = [tuple(getattr(one, "shape", "?")) for one in made] if isinstance(made, LossValues) else []
        if shapes != [(count,), (count,)]:
            what = " and ".join(map(str, shapes)) or type(made).__name__
            raise ValueError(
                f"loss {name}: its plan returns {what}: return LossValues(values, segments), both of shape ({count},), "
                "one of each for a sample"
            )
        if torch.is_grad_enabled() and not made.values.requires_grad:
            raise ValueError(
                f"loss {name} gives the {self.trains} model no gradient: yield its jump, "
                f"inputs.students[{self.trains!r}](w), in a Call of turn 2"
            )


class Consistency(Loss):
    """L_CD of a student. The reverse one draws w from the guidance scales; the forward one is trained unguided."""

    def plan(self, inputs: LossInputs, draws: Draws) -> Plan[LossValues]:
        """One pair of the solver's grid for each sample."""
        pairs, count = inputs.boundaries.pairs[self.trains], len(inputs.data)
        pairs = pairs[draws.integers(count, len(pairs))]
        w = draws.choice(count, inputs.guidance_scales) if self.trains == "reverse" else 1.0
        student, solver = inputs.students[self.trains](w), inputs.solver(w)
        values = yield from consistency_plan(student, solver, inputs.data, pairs, huber_c=self.huber_c)
        return LossValues(values, pairs.segment)


class Preservation(Loss):
    """L_f of the forward student, L_r of the reverse one: there with the other student, and back. Both unguided."""

    def plan(self, inputs: LossInputs, draws: Draws) -> Plan[LossValues]:
        """One segment for each sample."""
        trips, count = inputs.boundaries.trips[self.trains], len(inputs.data)
        trips = trips[draws.integers(count, len(trips))]
        away, back = inputs.students[OTHER[self.trains]](1.0), inputs.students[self.trains](1.0)
        values = yield from preservation_plan(away, back, inputs.data, trips, huber_c=self.huber_c)
        return LossValues(values, trips.segment)
