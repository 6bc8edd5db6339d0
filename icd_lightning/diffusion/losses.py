"""The losses: pure functions of denoisers, one value per sample (B,); averaging and weighting are the task's.

An iteration of invertible consistency distillation (Eq. 5, arXiv:2406.14539) sums four, named after the student they
train. Each of them can be evaluated alone, or its plan `together` with the others' (see `calls`):

    data = NoisedData(x0, noise, schedule)
    reverse_cd           = consistency(reverse_model, teacher, data, boundaries.reverse_pairs[i], ...)
    forward_cd           = consistency(forward_model, teacher, data, boundaries.forward_pairs[j], ...)
    reverse_preservation = preservation(forward_model, reverse_model, data, boundaries.reverse_preservation[k], ...)
    forward_preservation = preservation(reverse_model, forward_model, data, boundaries.forward_preservation[k], ...)

Teacher and reverse_model share one w per sample in the first; every network is unguided (w = 1) in the other three.
What needs no gradient is evaluated before the one call that does, so a loss never holds more than one graph.
"""

import torch
from torch import Tensor

from icd_lightning.diffusion.boundaries import RoundTrips, TrainingPairs
from icd_lightning.diffusion.calls import Call, Plan, alone
from icd_lightning.diffusion.schedule import Denoiser, NoisedData


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


def consistency(
    student: Denoiser, teacher: Denoiser, data: NoisedData, pairs: TrainingPairs, *, huber_c: float
) -> Tensor:
    """`consistency_plan` evaluated alone, (B,)."""
    return alone(consistency_plan(student, teacher, data, pairs, huber_c=huber_c))


def preservation(away: Denoiser, back: Denoiser, data: NoisedData, trips: RoundTrips, *, huber_c: float) -> Tensor:
    """`preservation_plan` evaluated alone, (B,)."""
    return alone(preservation_plan(away, back, data, trips, huber_c=huber_c))


def consistency_plan(
    student: Denoiser, teacher: Denoiser, data: NoisedData, pairs: TrainingPairs, *, huber_c: float
) -> Plan:
    """L_CD (B,): from t and from the teacher's next point t_next, the student must land on the same x at the boundary.

    pairs holds t, t_next, boundary (B,) of either direction. At t_next = boundary the student stays where it is, so
    the target is the teacher's step itself: the boundary condition that anchors the model. Gradient comes from t only.
    """
    schedule = data.schedule
    x = data.at(pairs.t)
    eps = yield Call(teacher, x, pairs.t, turn=0)
    x_next = schedule.ddim_step(x, eps, pairs.t, pairs.t_next, set_alpha_to_one=False)
    eps = yield Call(student, x_next, pairs.t_next, turn=1)
    target = schedule.ddim_step(x_next, eps, pairs.t_next, pairs.boundary)
    eps = yield Call(student, x, pairs.t, turn=2)
    return pseudo_huber(schedule.ddim_step(x, eps, pairs.t, pairs.boundary), target, huber_c)


def preservation_plan(away: Denoiser, back: Denoiser, data: NoisedData, trips: RoundTrips, *, huber_c: float) -> Plan:
    """L_f or L_r (B,): jump from t to the segment's other end s with `away`, return with `back`, and find x_t again.

    Eq. 4, arXiv:2406.14539. trips holds t, s (B,). Only `back` gets gradient: L_f goes down with the reverse student
    and trains the forward one on the way up, L_r is its mirror image.
    """
    x = data.at(trips.t)
    eps = yield Call(away, x, trips.t, turn=1)
    x_away = data.schedule.ddim_step(x, eps, trips.t, trips.s)
    eps = yield Call(back, x_away, trips.s, turn=2)
    return pseudo_huber(data.schedule.ddim_step(x_away, eps, trips.s, trips.t), x, huber_c)


def guidance_distillation(student: Denoiser, teacher: Denoiser, data: NoisedData, t: Tensor) -> Tensor:
    """Stage 1 (B,): a student with embedded w against the teacher guided by the same w, at t (B,).

    Squared error of what the network outputs: of eps as in the paper; of v, which at large t is the error of x0, where
    eps hardly rewards it. With `lambda x, t: data.noise` for a teacher this is the plain denoising loss.
    """
    schedule = data.schedule
    x = data.at(t)
    with torch.no_grad():
        target = schedule.output_from_eps(teacher(x, t), x, t)
    return squared_error(schedule.output_from_eps(student(x, t), x, t), target)
