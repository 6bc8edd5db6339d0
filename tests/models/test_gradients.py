"""Both students' gradients are those of separate models, in whatever order passes run; wrong ones raise no error."""

import itertools

import pytest
import torch
from students_case import (
    assert_same_gradients,
    expected_gradients,
    gradients,
    loss_of,
    output_of,
    part,
    run,
    separate_parameters,
    separate_unet,
    tiny_batch,
    tiny_students,
)

from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.students import DIRECTIONS

ORDERS = [
    "".join(order) for order in sorted(set(itertools.permutations("FfCc"))) if order.index("F") < order.index("f")
]
ORDERS = [order for order in ORDERS if order.index("C") < order.index("c")]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "checkpointed"])
def both(request):
    return tiny_students(gradient_checkpointing=request.param).train()


@pytest.fixture
def students(both):
    both.zero_grad(set_to_none=True)
    return both


@pytest.fixture(scope="module")
def batch():
    return tiny_batch()


@pytest.fixture(scope="module")
def expected(batch):
    """Each student's gradients in a model of its own."""
    return {direction: expected_gradients(tiny_students(), direction, batch) for direction in DIRECTIONS}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_student_learns_as_if_alone_and_the_other_not_at_all(students, batch, expected, direction):
    loss_of(students, direction, batch).backward()
    assert_same_gradients(gradients(students, direction), expected[direction])
    other = DIRECTIONS[1 - DIRECTIONS.index(direction)]
    assert all(gradient is None for gradient in gradients(students, other).values())


def test_both_students_learn_from_one_summed_loss(students, batch, expected):
    sum(loss_of(students, direction, batch) for direction in DIRECTIONS).backward()
    for direction in DIRECTIONS:
        assert_same_gradients(gradients(students, direction), expected[direction])


@pytest.mark.parametrize("order", ORDERS)
def test_passes_may_run_in_any_order(students, batch, expected, order):
    """Capitals run a student's forward pass, small letters its backward pass; the teacher runs between any two."""
    losses = {}
    for step in order:
        direction = {"f": "forward", "c": "reverse"}[step.lower()]
        if step.isupper():
            losses[direction] = loss_of(students, direction, batch)
        else:
            losses[direction].backward()
        output_of(students, "teacher", batch)
    for direction in DIRECTIONS:
        assert_same_gradients(gradients(students, direction), expected[direction])


@pytest.mark.parametrize("scope", ["teacher", *DIRECTIONS])
def test_backward_does_not_ask_which_adapter_is_on(students, batch, expected, scope):
    loss = loss_of(students, "reverse", batch)
    with students.using(scope):
        loss.backward()
        assert students.active == scope
    assert_same_gradients(gradients(students, "reverse"), expected["reverse"])


def test_gradients_flow_through_one_student_into_the_other(students, batch):
    conditioning = Conditioning(prompt_embeds=batch["prompt_embeds"])
    there = students.denoiser("forward", conditioning, batch["w"])(batch["x"], batch["t"]).eps
    students.denoiser("reverse", conditioning, batch["w"])(there, batch["t"]).eps.square().mean().backward()

    alone = {direction: separate_unet(students, direction) for direction in DIRECTIONS}
    run(alone["reverse"], {**batch, "x": run(alone["forward"], batch)}).square().mean().backward()
    for direction, unet in alone.items():
        expected = {name: p.grad for name, p in separate_parameters(unet).items()}
        assert_same_gradients(gradients(students, direction), expected)


def test_two_accumulated_halves_equal_the_whole_batch(students, batch, expected):
    for half in (part(batch, slice(2)), part(batch, slice(2, 4))):
        (sum(loss_of(students, direction, half) for direction in DIRECTIONS) / 2).backward()
    for direction in DIRECTIONS:
        assert_same_gradients(gradients(students, direction), expected[direction])


def test_checkpointing_runs_the_blocks_again(batch):
    """The tests above would prove nothing about recomputation if there were none."""
    students, calls = tiny_students(gradient_checkpointing=True), []
    students.network.mid_block.resnets[1].register_forward_pre_hook(lambda *_: calls.append(students.active))
    loss = loss_of(students, "reverse", batch)
    loss.backward()
    assert calls == ["reverse", "reverse"]
    with torch.no_grad():
        loss_of(students, "forward", batch)
    assert calls == ["reverse", "reverse", "forward"]
