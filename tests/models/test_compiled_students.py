"""Compiled students are the plain ones, whichever adapter is on, forward and backward."""

import pytest
import torch
from students_case import (
    assert_same_gradients,
    gradients,
    loss_of,
    output_of,
    part,
    tiny_batch,
    tiny_students,
    tiny_unet,
)

from icd_lightning.editing.merging import MergedStudents
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.diffusion_model import compile_networks, why_not_compiled
from icd_lightning.models.students import DIRECTIONS, LoraSettings

SMALLEST = {  # each kind of block once, and of layer with an adapter: tracing takes seconds a block
    "block_out_channels": [16],
    "down_block_types": ["DownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["CrossAttnUpBlock2D"],
    "layers_per_block": 1,
}
LORA = LoraSettings(rank=4, alpha=8, target_modules=("to_q", "conv1"))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh():
    """No compiled code from other tests, and an error where ordinary runs would fall back."""
    torch._dynamo.reset()
    before = torch._dynamo.config.suppress_errors
    yield
    torch._dynamo.config.suppress_errors = before
    torch._dynamo.reset()


CASES = [  # backend, checkpointing, sizes of batches
    pytest.param("eager", True, (4, 4), marks=pytest.mark.slow),
    ("eager", False, (4, 4)),
    pytest.param("eager", False, (4, 3, 2, 4), marks=pytest.mark.slow),
    pytest.param("aot_eager", True, (4, 3, 4), marks=pytest.mark.slow),
    pytest.param("inductor", False, (4, 4), marks=pytest.mark.slow),
    pytest.param("inductor", True, (4, 4), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("backend", "checkpointing", "sizes"), CASES, ids=str)
def test_compiled_students_give_the_same_outputs_and_gradients(backend, checkpointing, sizes):
    if reason := why_not_compiled(CPU, backend):
        pytest.skip(reason)
    options = {"lora": LORA, "gradient_checkpointing": checkpointing}
    plain, compiled = (tiny_students(unet=tiny_unet(**SMALLEST), **options).train() for _ in range(2))
    compile_networks([compiled.network], CPU, backend)
    torch._dynamo.config.suppress_errors = False
    counters = torch._dynamo.utils.counters
    counters.clear()
    for size in sizes:
        batch, eps = part(tiny_batch(), slice(size)), []
        for students in (plain, compiled):
            students.zero_grad(set_to_none=True)
            # both students' forward passes, the teacher's between them, and one backward pass through both
            first = loss_of(students, "forward", batch)
            eps.append(output_of(students, "teacher", batch))
            again = loss_of(students, "forward", {**batch, "x": batch["goal"]})
            (first + loss_of(students, "reverse", batch) + again).backward()
        torch.testing.assert_close(*eps, rtol=1e-4, atol=1e-5)
        for direction in DIRECTIONS:
            assert_same_gradients(gradients(compiled, direction), gradients(plain, direction))
    assert not counters["graph_break"]
    if len(set(sizes)) == 1:
        assert counters["stats"]["unique_graphs"] == 3  # the teacher, and each student; none of them twice


@pytest.mark.slow
@torch.no_grad()
def test_merged_students_share_their_compiled_code():
    plain, compiled = (tiny_students(unet=tiny_unet(**SMALLEST), lora=LORA) for _ in range(2))
    compile_networks([compiled.network], CPU, "eager")
    torch._dynamo.config.suppress_errors = False
    torch._dynamo.utils.counters.clear()
    batch, merged = tiny_batch(), MergedStudents(compiled)
    told = (batch["x"], batch["t"], Conditioning(prompt_embeds=batch["prompt_embeds"]), batch["w"])
    for direction in DIRECTIONS:
        found = merged[direction](*told)
        torch.testing.assert_close(found, plain.predict(direction, *told), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_backend_that_does_not_work_is_named():
    assert why_not_compiled(CPU, "eager") is None
    assert "nonsense" in why_not_compiled(CPU, "nonsense")
