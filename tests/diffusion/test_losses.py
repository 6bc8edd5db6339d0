"""Laws of the losses on denoisers known in closed form; their values on networks are in test_golden.py."""

import pytest
import torch
from analytic import Gaussian, PointMass
from golden_case import consistency, preservation
from torch import Tensor, nn

from icd_lightning.diffusion import (
    VP,
    Boundaries,
    Consistency,
    DDIMJump,
    Draws,
    LossInputs,
    NoisedData,
    Preservation,
    Process,
    Split,
    guidance_distillation,
    pseudo_huber,
    squared_error,
)
from icd_lightning.diffusion.calls import Call, alone, together
from icd_lightning.diffusion.losses import consistency_plan, preservation_plan

C = 0.001


class Linear(nn.Module):
    """The smallest denoiser with a parameter; counts its calls with and without gradient."""

    def __init__(self, scale: float = 0.5):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.calls: list[tuple[list[int], bool]] = []

    def forward(self, x: Tensor, t: Tensor) -> Split:
        self.calls.append((t.tolist(), torch.is_grad_enabled()))
        return VP().split_by_eps(x, self.scale * x, t)


def jump(denoise) -> DDIMJump:
    return DDIMJump(denoise, VP())


def solver(denoise) -> DDIMJump:
    return DDIMJump(denoise, VP(), set_alpha_to_one=False)


@pytest.fixture
def boundaries() -> Boundaries:
    return Boundaries.uniform(4)


@pytest.fixture
def data(process: Process, generator: torch.Generator) -> NoisedData:
    x0, noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
    return NoisedData(x0, noise, process)


@pytest.fixture
def point_data(process: Process, generator: torch.Generator) -> NoisedData:
    """50 samples of one picture, each with its own noise: enough for every solver step at once."""
    x0 = torch.randn(4, 8, 8, generator=generator)
    return NoisedData(x0.expand(50, -1, -1, -1), torch.randn(50, 4, 8, 8, generator=generator), process)


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


def test_point_mass_student_is_consistent_both_ways(process, boundaries, point_data):
    exact = PointMass(point_data.x0[0], process)
    forward = consistency(jump(exact), solver(exact), NoisedData(point_data.x0[:49], point_data.noise[:49], process),
                          boundaries.pairs["forward"], huber_c=C)  # fmt: skip
    reverse = consistency(jump(exact), solver(exact), point_data, boundaries.pairs["reverse"], huber_c=C)
    assert forward.max() < 1e-5
    assert reverse[1:].max() < 1e-5
    # The solver's last stop is the first level, not data: its target keeps just that noise.
    left = point_data.at(0)[:1]
    torch.testing.assert_close(reverse[:1], pseudo_huber(point_data.x0[:1], left, C), rtol=1e-3, atol=1e-6)


def test_point_mass_students_preserve(process, boundaries, point_data):
    exact = PointMass(point_data.x0[0], process)
    few = NoisedData(point_data.x0[:4], point_data.noise[:4], process)
    for trips in (boundaries.trips["forward"], boundaries.trips["reverse"]):
        assert preservation(jump(exact), jump(exact), few, trips, huber_c=C).max() < 1e-5


def test_the_teacher_alone_is_not_consistent_on_curved_paths(process, boundaries, data):
    """One DDIM jump of a whole segment is not the flow, which is what distillation is for."""
    teacher = Gaussian(mean=0.5, std=0.2, process=process)
    pairs = boundaries.pairs["reverse"][torch.tensor([8, 10, 12, 18, 20, 25])]
    assert consistency(jump(teacher), solver(teacher), data, pairs, huber_c=C).min() > 1e-4


def test_the_boundary_condition_ties_the_student_to_the_teacher(process, boundaries, data):
    """At t_next = boundary the student's own prediction plays no part in the target."""
    teacher = Gaussian(mean=0.5, std=0.2, process=process)
    pairs = boundaries.pairs["forward"][torch.tensor([11, 24, 37, 48, 11, 24])]
    assert torch.equal(pairs.t_next, pairs.boundary)
    assert consistency(jump(teacher), solver(teacher), data, pairs, huber_c=C).max() < 1e-5
    assert consistency(jump(Linear()), solver(teacher), data, pairs, huber_c=C).min() > 1e-4


def test_gradient_comes_from_t_alone(boundaries, data):
    student, teacher = Linear(), Linear(0.4)
    pairs = boundaries.pairs["reverse"][torch.tensor([0, 5, 13, 26, 39, 49])]
    loss = consistency(jump(student), solver(teacher), data, pairs, huber_c=C)
    loss.mean().backward()
    assert student.scale.grad is not None
    assert teacher.scale.grad is None
    assert teacher.calls == [(pairs.t.tolist(), False)]
    assert sorted(student.calls) == sorted([(pairs.t_next.tolist(), False), (pairs.t.tolist(), True)])


def test_preservation_trains_the_way_back_alone(boundaries, data):
    away, back = Linear(), Linear(0.4)
    trips = boundaries.trips["forward"][torch.tensor([0, 1, 2, 3, 0, 1])]
    preservation(jump(away), jump(back), data, trips, huber_c=C).mean().backward()
    assert away.scale.grad is None
    assert back.scale.grad is not None
    assert away.calls == [(trips.t.tolist(), False)]
    assert back.calls == [(trips.s.tolist(), True)]


class Joining:
    """A denoiser that can be joined with others of its name; counts the batches that it is called with."""

    def __init__(self, name: str, denoise) -> None:
        self.joins, self.denoise, self.sizes = name, denoise, []

    def __call__(self, x: Tensor, t: Tensor) -> Split:
        self.sizes.append(len(x))
        return self.denoise(x, t)

    def join(self, others, times) -> "Joining":
        assert [len(t) for t in times] == [6] * len(others)
        return self


def test_losses_evaluated_together_are_those_evaluated_alone(process, boundaries, data):
    """The solver's calls come first, then the targets', then the students': so those of one network can be joined."""
    forward, reverse = Joining("forward", Linear()), Joining("reverse", Linear())
    teacher = Joining("teacher", Gaussian(mean=0.5, std=0.2, process=process))
    index, segment = torch.tensor([0, 5, 12, 25, 38, 48]), torch.tensor([0, 1, 2, 3, 0, 1])
    up, down = DDIMJump(forward, process), DDIMJump(reverse, process)
    steps = DDIMJump(teacher, process, set_alpha_to_one=False)

    def plans():
        return {
            "reverse_cd": consistency_plan(down, steps, data, boundaries.pairs["reverse"][index], huber_c=C),
            "forward_cd": consistency_plan(up, steps, data, boundaries.pairs["forward"][index], huber_c=C),
            "reverse_preservation": preservation_plan(up, down, data, boundaries.trips["reverse"][segment], huber_c=C),
        }

    joined = together(plans())
    assert (teacher.sizes, forward.sizes, reverse.sizes) == ([12], [12, 6], [6, 12])
    assert joined.keys() == plans().keys()
    for name, plan in plans().items():
        torch.testing.assert_close(joined[name], alone(plan), rtol=0, atol=0)


def test_jumps_that_cannot_be_joined_are_made_alone(data):
    """Any callable is a jump."""
    calls = []

    def plan(number: float):
        x = yield Call(lambda x, t, s: calls.append(len(x)) or x + number, data.x0, torch.ones(6), torch.zeros(6), 0)
        return x

    results = together({1.0: plan(1.0), 2.0: plan(2.0)})
    assert calls == [6, 6]
    assert all(torch.equal(x, data.x0 + number) for number, x in results.items())


@pytest.fixture
def inputs(process, boundaries, data):
    """Networks that note the w that they are asked for."""
    asked: dict[str, list] = {"solver": [], "reverse": [], "forward": []}

    def maker(name: str, make):
        return lambda w: asked[name].append(w) or make(Linear())

    students = {name: maker(name, jump) for name in ("reverse", "forward")}
    return asked, LossInputs(data, boundaries, (1.0, 8.0), maker("solver", solver), students)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_a_consistency_loss_draws_pairs_of_its_direction_and_w_for_the_reverse_student_alone(inputs, direction):
    asked, given = inputs
    loss = Consistency(direction, huber_c=C)
    values, segments = alone(loss.plan(given, Draws(0, 0)))
    draws = Draws(0, 0)
    pairs = given.boundaries.pairs[direction]
    pairs = pairs[draws.integers(6, len(pairs))]
    assert torch.equal(segments, pairs.segment)
    torch.testing.assert_close(values, consistency(jump(Linear()), solver(Linear()), given.data, pairs, huber_c=C))
    (w,), (solvers_w,) = asked[direction], asked["solver"]
    assert w is solvers_w
    if direction == "reverse":
        assert torch.equal(w, draws.choice(6, (1.0, 8.0)))
    else:
        assert w == 1.0


@pytest.mark.parametrize(("direction", "other"), [("reverse", "forward"), ("forward", "reverse")])
def test_a_preservation_loss_goes_away_with_the_other_student(inputs, direction, other):
    asked, given = inputs
    values, segments = alone(Preservation(direction, huber_c=C).plan(given, Draws(0, 0)))
    assert asked == {"solver": [], direction: [1.0], other: [1.0]}
    trips = given.boundaries.trips[direction]
    trips = trips[Draws(0, 0).integers(6, len(trips))]
    assert torch.equal(segments, trips.segment)
    torch.testing.assert_close(values, preservation(jump(Linear()), jump(Linear()), given.data, trips, huber_c=C))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0}, "weight 0.0 of a loss must be positive and finite; null leaves the loss out"),
        ({"weight": float("nan")}, "weight nan"),
        ({"huber_c": float("inf")}, "huber_c inf"),
        ({"trains": "both"}, "trains 'both' is none of reverse, forward"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Consistency(**{"trains": "reverse", **options})


T = torch.tensor([0, 99, 299, 499, 799, 999])


def test_guidance_distillation_is_zero_at_the_teacher_and_squared_elsewhere(process, data):
    teacher = Gaussian(mean=0.5, std=0.2, process=process)
    assert guidance_distillation(teacher, teacher, data, T).max() == 0
    off = lambda x, t: process.split_by_eps(x, teacher(x, t).eps + 0.3, t)  # noqa: E731
    loss = guidance_distillation(off, teacher, data, T)
    torch.testing.assert_close(loss, torch.full((6,), 0.09))


def test_guidance_distillation_of_v_is_the_error_of_v(data):
    by_v = VP(prediction_type="v_prediction")
    data = NoisedData(data.x0, data.noise, by_v)
    velocity = by_v.target(data.x0, data.noise, T)
    student = lambda x, t: by_v.split(velocity + 0.3, x, t)  # noqa: E731
    loss = guidance_distillation(student, lambda x, t: Split(data.x0, data.noise), data, T)
    torch.testing.assert_close(loss, torch.full((6,), 0.09), rtol=1e-3, atol=1e-4)


def test_guidance_distillation_trains_the_student_alone(data):
    student, teacher = Linear(), Linear(0.4)
    guidance_distillation(student, teacher, data, T).mean().backward()
    assert student.scale.grad is not None
    assert teacher.scale.grad is None
