"""Students spread over two real gloo processes by FSDP2, half of the batch each, against one process with all of it."""

import pytest
import torch
import torch.distributed as dist
from ranks_case import WORLD, run_ranks
from students_case import loss_of, output_of, part, tiny_batch, tiny_students, tiny_unet
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from icd_lightning.models.sharding import assign, gather_weights, gathered, shard
from icd_lightning.models.students import DIRECTIONS, LoraStudents

CASES = [(torch.float32, False), (torch.bfloat16, True)]  # the base, checkpointing


def students_of(case, mesh=None) -> LoraStudents:
    dtype, checkpointing = case
    students = tiny_students(unet=tiny_unet().to(dtype), gradient_checkpointing=checkpointing).train()
    if mesh is not None:
        shard(students.model, mesh)
    return students


def named(students: LoraStudents) -> dict:
    return {f"{d} {name}": p for d in DIRECTIONS for name, p in students.named_parameters_of(d).items()}


def train(students: LoraStudents, batch: dict) -> dict:
    """Two steps over the sum of both students' losses, with the teacher running in between; what comes of it, whole."""
    optimizer = torch.optim.SGD([p for d in DIRECTIONS for p in students.parameters_of(d)], lr=0.1)
    start, gradients, norms, losses = copied(named(students)), [], [], []
    for _ in range(2):
        optimizer.zero_grad()
        first = loss_of(students, "forward", batch)
        teacher = output_of(students, "teacher", batch).detach()
        loss = first + loss_of(students, "reverse", batch) + loss_of(students, "forward", {**batch, "x": teacher})
        loss.backward()
        losses.append(loss.detach())
        gradients.append(copied({name: p.grad for name, p in named(students).items()}))
        norm = torch.nn.utils.clip_grad_norm_(students.parameters_of("reverse"), 0.1)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        optimizer.step()
    return {
        "gradients": gradients[0],
        "moved": {name: weight - start[name] for name, weight in gathered(named(students)).items()},
        "frozen": gathered({n: p for n, p in students.named_parameters() if not p.requires_grad}),
        "norms": torch.stack(norms),
        "losses": torch.stack(losses),
    }


def copied(tensors: dict) -> dict:
    return {name: tensor.clone() for name, tensor in gathered(tensors).items()}


def distance(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    found, expected = (torch.cat([v.flatten() for v in values.values()]) for values in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


def share(students: LoraStudents) -> dict[bool, float]:
    """Which part of the weights, trained and frozen, lies in this process."""
    found = {}
    for trained in (True, False):
        weights = [p for p in students.parameters() if p.requires_grad == trained]
        local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in weights)
        found[trained] = local / sum(p.numel() for p in weights)
    return found


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo")
    mesh, batch = init_device_mesh("cpu", (WORLD,)), part(tiny_batch(), slice(2 * rank, 2 * rank + 2))
    results = {}
    for case in CASES:
        students = students_of(case, mesh)
        shares = share(students)
        results[case] = {**train(students, batch), "shares": shares, "shares after": share(students)}
        shard(students.model, mesh)  # once more changes nothing
        fixed = {name: torch.arange(p.numel()).view(p.shape).float() for name, p in named(students).items()}
        for name, parameter in named(students).items():
            assign(parameter, fixed[name])
        gather_weights(students)
        assert not any(isinstance(value, DTensor) for value in students.state_dict().values())
        assert all(torch.equal(p, fixed[name]) for name, p in named(students).items())
        assert type(students.network).__name__ == "UNet2DConditionModel"
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sharded"))
    assert run_ranks(worker, folder) == [0, 0]
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_equal_one_with_the_joined_batch(ranks, case):
    joined, exact = train(students_of(case), tiny_batch()), case[0] == torch.float32
    first, second = (rank[case] for rank in ranks)
    # a residual's three gradients are added in another order, which in bfloat16 shows
    assert distance(first["gradients"], joined["gradients"]) < (1e-5 if exact else 0.02)
    assert distance(first["moved"], joined["moved"]) < (1e-4 if exact else 0.05)
    losses = (first["losses"] + second["losses"]) / 2
    torch.testing.assert_close(losses, joined["losses"], rtol=1e-5 if exact else 1e-3, atol=0)
    torch.testing.assert_close(first["norms"], joined["norms"], rtol=1e-4 if exact else 1e-2, atol=0)
    assert torch.equal(first["norms"], second["norms"])
    assert first["frozen"].keys() == joined["frozen"].keys()
    assert all(torch.equal(value, joined["frozen"][name]) for name, value in first["frozen"].items())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_process_keeps_half_of_the_base_and_of_the_adapters(ranks, case):
    for rank in ranks:
        for shares in (rank[case]["shares"], rank[case]["shares after"]):
            assert shares == {True: pytest.approx(0.5, abs=0.01), False: pytest.approx(0.5, abs=0.01)}


def test_the_whole_is_gathered_on_the_first_process_alone(ranks):
    first, second = (rank[CASES[0]] for rank in ranks)
    assert first["gradients"]
    assert not second["gradients"]
