"""Compiled students are the plain ones, whichever adapter is on, forward and backward."""

import pytest
import torch
from students_case import ADAPTERS, assert_same_gradients, gradients, loss_of, part, tiny_batch, tiny_students

from icd_lightning.models.compilation import compile_unets, why_not_compiled
from icd_lightning.models.conditioning import Conditioning

CPU = torch.device("cpu")
BACKENDS = [
    "eager",
    pytest.param("aot_eager", marks=pytest.mark.slow),
    pytest.param("inductor", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def _fresh():
    """No compiled code from other tests, and an error where ordinary runs would fall back."""
    torch._dynamo.reset()
    before = torch._dynamo.config.suppress_errors
    yield
    torch._dynamo.config.suppress_errors = before
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_compiled_students_give_the_same_outputs_and_gradients(backend, checkpointing):
    if reason := why_not_compiled(CPU, backend):
        pytest.skip(reason)
    plain, compiled = (tiny_students(gradient_checkpointing=checkpointing).train() for _ in range(2))
    names = [name for name, _ in compiled.named_parameters()]
    compile_unets(compiled, backend)
    torch._dynamo.config.suppress_errors = False
    assert names == [name for name, _ in compiled.named_parameters()]
    batch = tiny_batch()
    torch._dynamo.utils.counters.clear()
    for count in (4, 3, 4):  # the second size, and back
        piece = part(batch, slice(count))
        conditioning = Conditioning(piece["prompt_embeds"])
        for students in (plain, compiled):
            students.zero_grad(set_to_none=True)
            # both students' forward passes, the teacher between them, and one backward pass through both
            losses = [loss_of(students, "fcd", piece)]
            students.teacher_eps = students.teacher(conditioning, piece["w"])(piece["x"], piece["t"])
            losses += [loss_of(students, "cd", piece), loss_of(students, "fcd", {**piece, "x": piece["goal"]})]
            sum(losses).backward()
        torch.testing.assert_close(compiled.teacher_eps, plain.teacher_eps, rtol=1e-4, atol=1e-5)
        for adapter in ADAPTERS:
            assert_same_gradients(gradients(compiled, adapter), gradients(plain, adapter))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # teacher, fcd, cd: they were compiled indeed


def test_a_backend_that_does_not_work_is_named():
    assert why_not_compiled(CPU, "eager") is None
    assert "nonsense" in why_not_compiled(CPU, "nonsense")
