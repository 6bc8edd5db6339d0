"""Stage 2 on two real gloo processes, through the Trainer, against one process with the joined batch."""

import shutil
from pathlib import Path

import pytest
import torch
from ddp_case import train, worker
from family_case import write_students
from flux_case import write_flux
from ranks_case import run_ranks
from sd3_case import write_sd3
from training_case import assert_the_same_in_diffusers, distillation, same

from icd_lightning.models.family import Family
from icd_lightning.models.student_file import StudentFile
from icd_lightning.models.students import ADAPTERS, DIRECTIONS, LoraSettings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


@pytest.fixture(scope="module")
def alone(random_family, tmp_path_factory):
    """One process with the joined batch: its folder, losses and metrics."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, *train(random_family, folder)


@pytest.fixture(scope="module", params=["ddp", pytest.param("sharded", marks=pytest.mark.slow)])
def pair(request, random_family, tmp_path_factory):
    """Strategy and folder of two processes, of which the second was interrupted in its first step."""
    folder = tmp_path_factory.mktemp(request.param)
    assert run_ranks(worker, random_family, folder, request.param) == [1, 1]
    assert (folder / "rank1.pt").is_file()
    return request.param, folder


@pytest.fixture(scope="module")
def ranks(pair):
    """What each process had after two steps: losses, students' weights, metrics, share of the base, what is sent."""
    return [torch.load(pair[1] / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def moved(weights: dict[str, torch.Tensor], start: dict[str, torch.Tensor], adapter: str) -> torch.Tensor:
    names = [name for name in start if f".{adapter}." in name]
    return torch.cat([(weights[name] - start[name]).flatten() for name in names])


@pytest.fixture(scope="module")
def start(random_family) -> dict[str, torch.Tensor]:
    """The students' weights before training, by the names of a checkpoint."""
    return {n: p.detach().clone() for n, p in distillation(random_family).named_parameters() if p.requires_grad}


def test_two_processes_equal_one_with_the_joined_batch(alone, start, pair, ranks):
    folder, losses, metrics = alone
    of_the_halves = [sum(halves) / 2 for halves in zip(*(rank[0] for rank in ranks), strict=True)]
    assert of_the_halves == pytest.approx(losses, rel=1e-4)
    found, expected = checkpoint(pair[1]), checkpoint(folder)
    for direction, adapter in ADAPTERS.items():
        assert same(*(rank[1][direction] for rank in ranks))
        for weights in ("state_dict", "current_model_state"):  # the average, and what is trained on
            two, one = (moved(saved[weights], start, adapter) for saved in (found, expected))
            assert (two - one).norm() < 1e-2 * one.norm()
        norms = [torch.as_tensor(values[f"grad_norm/{direction}"]) for values in (ranks[0][2], metrics)]
        torch.testing.assert_close(*norms, rtol=1e-3, atol=0)
    averages, trained = (moved(found[weights], start, "cd") for weights in ("state_dict", "current_model_state"))
    assert 0.5 < averages.norm() / trained.norm() < 0.9  # halfway between the first step and the second


def test_the_base_is_spread_over_both_processes(pair, ranks):
    expected = 1 if pair[0] == "ddp" else pytest.approx(0.5, abs=0.05)
    assert [rank[3] for rank in ranks] == [expected] * 2


def test_two_processes_stop_after_the_same_step_though_one_alone_was_interrupted(pair):
    assert checkpoint(pair[1])["global_step"] == 2


def test_frozen_weights_are_not_sent_from_one_process_to_the_other(ranks):
    assert [rank[4] for rank in ranks] == [[], []]


def test_two_processes_agree_on_what_is_logged(alone, ranks):
    first, second = (rank[2] for rank in ranks)
    names = [n for n in first if n.startswith(("reconstruction", "guidance_sweep", "generation", "val/", "train/"))]
    assert {
        "reconstruction/psnr",
        "reconstruction_guided/latent_mse",
        "guidance_sweep/psnr_w3",
        "generation/tiny-fd",
        "val/reverse_cd",
        "train/loss",
        "train/forward_cd",
    } <= set(names)
    assert all(first[name] == second[name] for name in names)
    for name in ("reconstruction/psnr", "generation/tiny-fd", "train/loss", "train/reverse_preservation"):
        assert float(first[name]) == pytest.approx(float(alone[2][name]), rel=1e-2)


@pytest.fixture(scope="module")
def longer(random_family, tmp_path_factory):
    """The folder of one process that makes three steps."""
    folder = tmp_path_factory.mktemp("longer")
    train(random_family, folder, max_steps=3)
    return folder


def assert_same_step(found: Path, expected: Path, start: dict[str, torch.Tensor]) -> None:
    """The same third step, within rounding, in what is trained and in its average."""
    ours, theirs = checkpoint(found), checkpoint(expected)
    assert ours["global_step"] == theirs["global_step"] == 3
    for adapter in ADAPTERS.values():
        for weights in ("state_dict", "current_model_state"):
            two, one = (moved(saved[weights], start, adapter) for saved in (ours, theirs))
            assert (two - one).norm() < 1e-2 * one.norm()


def test_what_two_processes_saved_goes_on_in_one(random_family, pair, longer, start, tmp_path):
    shutil.copytree(pair[1] / "checkpoints", tmp_path / "checkpoints")
    train(random_family, tmp_path, max_steps=3, ckpt_path="last")
    assert_same_step(tmp_path, longer, start)


def test_what_one_process_saved_goes_on_in_two(random_family, alone, pair, longer, start, tmp_path):
    if pair[0] == "ddp":
        pytest.skip("Lightning's own")
    shutil.copytree(alone[0] / "checkpoints", tmp_path / "checkpoints")
    assert run_ranks(worker, random_family, tmp_path, pair[0], 3) == [0, 0]
    assert_same_step(tmp_path, longer, start)
    exported, expected = (
        {d: StudentFile.read(folder / d).weights for d in DIRECTIONS} for folder in (tmp_path, longer)
    )
    for direction, weights in exported.items():
        assert all((w - expected[direction][name]).abs().max() < 2e-3 for name, w in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
@pytest.mark.parametrize("write", [write_flux, write_sd3])
def test_what_one_process_saved_of_a_transformer_goes_on_in_two_and_into_diffusers(write, strategy, tmp_path):
    folder = write(tmp_path / "family")
    family = Family(str(folder))
    write_students(folder / "students", family)
    start = {n: p.detach().clone() for n, p in distillation(folder).named_parameters() if p.requires_grad}
    train(folder, tmp_path / "two", max_steps=2)
    assert run_ranks(worker, folder, tmp_path / "two", strategy, 3) == [0, 0]
    train(folder, tmp_path / "longer", max_steps=3)
    assert_same_step(tmp_path / "two", tmp_path / "longer", start)
    told = torch.randn(2, 16, 8, 8), torch.tensor([259, 999]), family.load_conditioner()(["a star", "a ring"])
    assert_the_same_in_diffusers(family, tmp_path / "two", LoraSettings(rank=4), *told, torch.tensor([1.0, 3.0]))
