"""Laws of the losses on denoisers known in closed form; their values on networks are in test_golden.py."""

import pytest
import torch
from analytic import Gaussian, PointMass
from torch import Tensor, nn

from icd_lightning.diffusion import (
    Boundaries,
    NoisedData,
    NoiseSchedule,
    consistency,
    guidance_distillation,
    preservation,
    pseudo_huber,
    squared_error,
)
from icd_lightning.diffusion.calls import alone, one_by_one, together
from icd_lightning.diffusion.losses import consistency_plan, preservation_plan

C = 0.001


class Linear(nn.Module):
    """The smallest denoiser with a parameter; counts its calls with and without gradient."""

    def __init__(self, scale: float = 0.5):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.calls: list[tuple[list[int], bool]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append((t.tolist(), torch.is_grad_enabled()))
        return self.scale * x


@pytest.fixture
def boundaries() -> Boundaries:
    return Boundaries.uniform(4)


@pytest.fixture
def data(schedule: NoiseSchedule, generator: torch.Generator) -> NoisedData:
    x0, noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
    return NoisedData(x0, noise, schedule)


@pytest.fixture
def point_data(schedule: NoiseSchedule, generator: torch.Generator) -> NoisedData:
    """50 samples of one picture, each with its own noise: enough for every solver step at once."""
    x0 = torch.randn(4, 8, 8, generator=generator)
    return NoisedData(x0.expand(50, -1, -1, -1), torch.randn(50, 4, 8, 8, generator=generator), schedule)


def test_pseudo_huber_is_quadratic_near_zero_and_absolute_far_away():
    target = torch.zeros(3, 4, 8, 8)
    pred = torch.tensor([0.0, 1e-5, 10.0]).view(3, 1, 1, 1).expand(3, 4, 8, 8)
    loss = pseudo_huber(pred.double(), target.double(), C)
    expected = torch.tensor([0.0, 1e-10 / (2 * C), 10.0 - C], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("loss", [lambda p, t: pseudo_huber(p, t, C), squared_error])
def test_losses_are_per_sample_and_float32(loss, generator: torch.Generator):
    pred, target = torch.randn(2, 3, 4, 8, 8, generator=generator)
    values = loss(pred.bfloat16(), target.bfloat16())
    assert values.shape == (3,)
    assert values.dtype == torch.float32
    single = torch.cat([loss(p[None], t[None]) for p, t in zip(pred, target, strict=True)])
    torch.testing.assert_close(loss(pred, target), single)


def test_point_mass_student_is_consistent_both_ways(schedule, boundaries, point_data):
    exact = PointMass(point_data.x0[0], schedule)
    forward = consistency(exact, exact, NoisedData(point_data.x0[:49], point_data.noise[:49], schedule),
                          boundaries.forward_pairs, huber_c=C)  # fmt: skip
    reverse = consistency(exact, exact, point_data, boundaries.reverse_pairs, huber_c=C)
    assert forward.max() < 1e-5
    assert reverse[1:].max() < 1e-5
    # The solver's last stop is alphas_cumprod[0], not data: its target keeps just that noise.
    left = point_data.at(0)[:1]
    torch.testing.assert_close(reverse[:1], pseudo_huber(point_data.x0[:1], left, C), rtol=1e-3, atol=1e-6)


def test_point_mass_students_preserve(schedule, boundaries, point_data):
    exact = PointMass(point_data.x0[0], schedule)
    few = NoisedData(point_data.x0[:4], point_data.noise[:4], schedule)
    for trips in (boundaries.forward_preservation, boundaries.reverse_preservation):
        assert preservation(exact, exact, few, trips, huber_c=C).max() < 1e-5


def test_the_teacher_alone_is_not_consistent_on_curved_paths(schedule, boundaries, data):
    """One DDIM jump of a whole segment is not the flow, which is what distillation is for."""
    teacher = Gaussian(mean=0.5, std=0.2, schedule=schedule)
    pairs = boundaries.reverse_pairs[torch.tensor([8, 10, 12, 18, 20, 25])]
    assert consistency(teacher, teacher, data, pairs, huber_c=C).min() > 1e-4


def test_the_boundary_condition_ties_the_student_to_the_teacher(schedule, boundaries, data):
    """At t_next = boundary the student's own prediction plays no part in the target."""
    teacher = Gaussian(mean=0.5, std=0.2, schedule=schedule)
    pairs = boundaries.forward_pairs[torch.tensor([11, 24, 37, 48, 11, 24])]
    assert torch.equal(pairs.t_next, pairs.boundary)
    assert consistency(teacher, teacher, data, pairs, huber_c=C).max() < 1e-5
    assert consistency(Linear(), teacher, data, pairs, huber_c=C).min() > 1e-4


def test_gradient_comes_from_t_alone(boundaries, data):
    student, teacher = Linear(), Linear(0.4)
    pairs = boundaries.reverse_pairs[torch.tensor([0, 5, 13, 26, 39, 49])]
    loss = consistency(student, teacher, data, pairs, huber_c=C)
    loss.mean().backward()
    assert student.scale.grad is not None
    assert teacher.scale.grad is None
    assert teacher.calls == [(pairs.t.tolist(), False)]
    assert sorted(student.calls) == sorted([(pairs.t_next.tolist(), False), (pairs.t.tolist(), True)])


def test_preservation_trains_the_way_back_alone(boundaries, data):
    away, back = Linear(), Linear(0.4)
    trips = boundaries.forward_preservation[torch.tensor([0, 1, 2, 3, 0, 1])]
    preservation(away, back, data, trips, huber_c=C).mean().backward()
    assert away.scale.grad is None
    assert back.scale.grad is not None
    assert away.calls == [(trips.t.tolist(), False)]
    assert back.calls == [(trips.s.tolist(), True)]


def test_losses_evaluated_together_are_those_evaluated_alone(schedule, boundaries, data):
    """The solver's calls come first, then the targets', then the students': so those of one network can be joined."""
    forward, reverse = Linear(), Linear()
    teacher = Gaussian(mean=0.5, std=0.2, schedule=schedule)
    index, segment = torch.tensor([0, 5, 12, 25, 38, 48]), torch.tensor([0, 1, 2, 3, 0, 1])
    made = []

    def evaluate(calls):
        made.append([(call.denoise, call.grad) for call in calls])
        return one_by_one(calls)

    def plans():
        return {
            "reverse_cd": consistency_plan(reverse, teacher, data, boundaries.reverse_pairs[index], huber_c=C),
            "forward_cd": consistency_plan(forward, teacher, data, boundaries.forward_pairs[index], huber_c=C),
            "reverse_preservation": preservation_plan(
                forward, reverse, data, boundaries.reverse_preservation[segment], huber_c=C
            ),
        }

    joined = together(plans(), evaluate)
    assert joined.keys() == plans().keys()
    for name, plan in plans().items():
        torch.testing.assert_close(joined[name], alone(plan), rtol=0, atol=0)
    assert made == [
        [(teacher, False), (teacher, False)],
        [(reverse, False), (forward, False), (forward, False)],
        [(reverse, True), (forward, True), (reverse, True)],
    ]


T = torch.tensor([0, 99, 299, 499, 799, 999])


def test_guidance_distillation_is_zero_at_the_teacher_and_squared_elsewhere(schedule, data):
    teacher = Gaussian(mean=0.5, std=0.2, schedule=schedule)
    assert guidance_distillation(teacher, teacher, data, T).max() == 0
    loss = guidance_distillation(lambda x, t: teacher(x, t) + 0.3, teacher, data, T)
    torch.testing.assert_close(loss, torch.full((6,), 0.09))


def test_guidance_distillation_of_v_is_the_error_of_v(data):
    by_v = NoiseSchedule(prediction_type="v_prediction")
    data = NoisedData(data.x0, data.noise, by_v)
    velocity = by_v.velocity(data.x0, data.noise, T)
    student = lambda x, t: by_v.eps_from_output(velocity + 0.3, x, t)  # noqa: E731
    loss = guidance_distillation(student, lambda x, t: data.noise, data, T)
    torch.testing.assert_close(loss, torch.full((6,), 0.09), rtol=1e-3, atol=1e-4)


def test_guidance_distillation_trains_the_student_alone(data):
    student, teacher = Linear(), Linear(0.4)
    guidance_distillation(student, teacher, data, T).mean().backward()
    assert student.scale.grad is not None
    assert teacher.scale.grad is None
