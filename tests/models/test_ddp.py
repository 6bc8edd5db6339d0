"""Two real gloo processes, half of the batch each, against one process with the joined batch."""

import pytest
import torch
import torch.distributed as dist
from ranks_case import WORLD, run_ranks
from students_case import assert_same_gradients, gradients, loss_of, part, tiny_batch, tiny_students
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from icd_lightning.models.students import DIRECTIONS, LoraStudents

WRAPS = {
    "plain": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
}
pytestmark = pytest.mark.slow  # two processes through the Trainer are a fast test of tasks/
CASES = [("plain", False), ("plain", True), ("find_unused", True), ("static_graph", True)]  # wrap, checkpointing


class SummedLoss(nn.Module):
    """Both students' losses in one forward pass, as DDP and Lightning want it."""

    def __init__(self, students: LoraStudents) -> None:
        super().__init__()
        self.students = students

    def forward(self, batch: dict) -> Tensor:
        return sum(loss_of(self.students, direction, batch) for direction in DIRECTIONS)


def train(model: nn.Module, students: LoraStudents, batch: dict) -> dict:
    """Two optimizer steps; gradients and weights of each student after the second."""
    optimizer = torch.optim.SGD([p for d in DIRECTIONS for p in students.parameters_of(d)], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    weights = {direction: students.named_parameters_of(direction) for direction in DIRECTIONS}
    return {
        "gradients": {direction: gradients(students, direction) for direction in DIRECTIONS},
        "weights": {a: {name: p.detach() for name, p in named.items()} for a, named in weights.items()},
    }


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo")
    results = {}
    for wrap, checkpointing in CASES:
        students = tiny_students(gradient_checkpointing=checkpointing).train()
        model = DistributedDataParallel(SummedLoss(students), **WRAPS[wrap])
        results[wrap, checkpointing] = train(model, students, part(tiny_batch(), slice(2 * rank, 2 * rank + 2)))
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ddp"))
    assert run_ranks(worker, folder) == [0, 0]
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def joined():
    students = tiny_students().train()
    return train(SummedLoss(students), students, tiny_batch())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_equal_one_with_the_joined_batch(ranks, joined, case):
    for rank in ranks:
        for direction in DIRECTIONS:
            assert_same_gradients(rank[case]["gradients"][direction], joined["gradients"][direction])
            assert_same_gradients(rank[case]["weights"][direction], joined["weights"][direction])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_processes_stay_together_bit_for_bit(ranks, case):
    first, second = (rank[case]["weights"] for rank in ranks)
    for direction in DIRECTIONS:
        assert all(torch.equal(weight, second[direction][name]) for name, weight in first[direction].items())
