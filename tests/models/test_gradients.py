"""Both students' gradients are those of separate models, in whatever order passes run; wrong ones raise no error."""

import itertools

import pytest
import torch
from students_case import (
    ADAPTERS,
    assert_same_gradients,
    expected_gradients,
    gradients,
    loss_of,
    part,
    run,
    separate_parameters,
    separate_unet,
    tiny_batch,
    tiny_students,
)

from icd_lightning.models.conditioning import Conditioning

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
    return {adapter: expected_gradients(tiny_students(), adapter, batch) for adapter in ADAPTERS}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_one_student_learns_as_if_alone_and_the_other_not_at_all(students, batch, expected, adapter):
    loss_of(students, adapter, batch).backward()
    assert_same_gradients(gradients(students, adapter), expected[adapter])
    other = ADAPTERS[1 - ADAPTERS.index(adapter)]
    assert all(gradient is None for gradient in gradients(students, other).values())


def test_both_students_learn_from_one_summed_loss(students, batch, expected):
    sum(loss_of(students, adapter, batch) for adapter in ADAPTERS).backward()
    for adapter in ADAPTERS:
        assert_same_gradients(gradients(students, adapter), expected[adapter])


@pytest.mark.parametrize("order", ORDERS)
def test_passes_may_run_in_any_order(students, batch, expected, order):
    """Capitals run a student's forward pass, small letters its backward pass; the teacher runs between any two."""
    losses, conditioning = {}, Conditioning(batch["prompt_embeds"])
    for step in order:
        adapter = {"f": "fcd", "c": "cd"}[step.lower()]
        if step.isupper():
            losses[adapter] = loss_of(students, adapter, batch)
        else:
            losses[adapter].backward()
        students.teacher(conditioning, 1.0)(batch["x"], batch["t"])
    for adapter in ADAPTERS:
        assert_same_gradients(gradients(students, adapter), expected[adapter])


@pytest.mark.parametrize("scope", [None, *ADAPTERS])
def test_backward_does_not_ask_which_adapter_is_on(students, batch, expected, scope):
    loss = loss_of(students, "cd", batch)
    with students.using(scope):
        loss.backward()
        assert students.active == scope
    assert_same_gradients(gradients(students, "cd"), expected["cd"])


def test_gradients_flow_through_one_student_into_the_other(students, batch):
    conditioning = Conditioning(batch["prompt_embeds"])
    there = students.forward_model(conditioning, batch["w"])(batch["x"], batch["t"])
    students.reverse_model(conditioning, batch["w"])(there, batch["t"]).square().mean().backward()

    alone = {adapter: separate_unet(students, adapter) for adapter in ADAPTERS}
    run(alone["cd"], {**batch, "x": run(alone["fcd"], batch)}).square().mean().backward()
    for adapter, unet in alone.items():
        expected = {name: p.grad for name, p in separate_parameters(unet).items()}
        assert_same_gradients(gradients(students, adapter), expected)


def test_backward_may_run_twice_through_one_graph(students, batch, expected):
    loss = sum(loss_of(students, adapter, batch) for adapter in ADAPTERS)
    loss.backward(retain_graph=True)
    loss.backward()
    for adapter in ADAPTERS:
        twice = {name: 2 * gradient for name, gradient in expected[adapter].items()}
        assert_same_gradients(gradients(students, adapter), twice)


def test_two_accumulated_halves_equal_the_whole_batch(students, batch, expected):
    for half in (part(batch, slice(2)), part(batch, slice(2, 4))):
        (sum(loss_of(students, adapter, half) for adapter in ADAPTERS) / 2).backward()
    for adapter in ADAPTERS:
        assert_same_gradients(gradients(students, adapter), expected[adapter])


def test_checkpointing_runs_the_blocks_again(batch):
    """The tests above would prove nothing about recomputation if there were none."""
    students, calls = tiny_students(gradient_checkpointing=True), []
    students.unet.mid_block.resnets[1].register_forward_pre_hook(lambda *_: calls.append(students.active))
    loss = loss_of(students, "cd", batch)
    loss.backward()
    assert calls == ["cd", "cd"]
    with torch.no_grad():
        loss_of(students, "fcd", batch)
    assert calls == ["cd", "cd", "fcd"]
