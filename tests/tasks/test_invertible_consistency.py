import lightning
import pytest
import torch
from training_case import FEW, distillation, frozen_weights, same, scenes_data, student_weights, trainer_for

from icd_lightning.callbacks.checkpoint import RunCheckpoint
from icd_lightning.diffusion import Boundaries, NoisedData, StepGuidance, consistency, preservation
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.editing.method import seeded_noise
from icd_lightning.models.family import Family
from icd_lightning.models.students import ADAPTERS, LoraSettings
from icd_lightning.tasks.base import Draws, OptimizerSettings
from icd_lightning.tasks.invertible_consistency import LossWeights
from icd_lightning.tiny.datamodule import scene_batch
from icd_lightning.tiny.scenes import scene_at

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")

EVALUATIONS = {"reverse_cd": 3, "forward_cd": 3, "reverse_preservation": 2, "forward_preservation": 2}


@pytest.fixture(scope="module")
def batch():
    return scene_batch([scene_at(0, i) for i in range(3)], ["0", "1", "2"])


def directions(name: str) -> tuple[str, str]:
    """The student that a loss is named after, and the other one."""
    own = name.split("_")[0]
    return own, "forward" if own == "reverse" else "reverse"


def gradients(task, direction: str) -> list[torch.Tensor]:
    adapter = {d: a for a, d in ADAPTERS.items()}[direction]
    return [p.grad for p in task.students.parameters_of(adapter) if p.grad is not None and p.grad.any()]


# --- the losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_loss_without_weight_is_not_computed(random_family, batch, monkeypatch, name):
    task = distillation(random_family, losses=LossWeights(**{**dict.fromkeys(EVALUATIONS, 1.0), name: 0.0}), **FEW)
    calls = count_calls(task, monkeypatch)
    assert task.losses(batch, Draws(0, 0)).keys() == EVALUATIONS.keys() - {name}
    evaluations = sum(EVALUATIONS.values()) - EVALUATIONS[name]
    assert sum(count for _, count in calls) == evaluations * len(batch.captions)


def test_ten_evaluations_take_five_calls_of_twice_the_batch(random_family, batch, monkeypatch):
    task = distillation(random_family, **FEW)
    calls = count_calls(task, monkeypatch)
    task.losses(batch, Draws(0, 0))
    twice = 2 * len(batch.captions)
    assert calls[0] == (None, twice)
    assert sorted(calls[1:]) == [("cd", twice), ("cd", twice), ("fcd", twice), ("fcd", twice)]


def count_calls(task, monkeypatch) -> list[tuple[str | None, int]]:
    """The network's calls from now on: adapter and number of samples."""
    predict, calls = task.students.predict, []

    def counted(adapter, x, *args):
        calls.append((adapter, len(x)))
        return predict(adapter, x, *args)

    monkeypatch.setattr(task.students, "predict", counted)
    return calls


def test_each_loss_trains_the_student_it_is_named_after_alone(random_family, batch):
    task = distillation(random_family)
    for name, loss in task.losses(batch, Draws(0, 0)).items():
        task.zero_grad(set_to_none=True)
        loss.mean().backward(retain_graph=True)  # the losses share calls of the network
        own, other = directions(name)
        assert gradients(task, own), name
        assert not gradients(task, other), name
        assert not [key for key, p in task.named_parameters() if p.grad is not None and "lora_" not in key]


def by_hand(task, batch, draws: Draws) -> dict[str, torch.Tensor]:
    """The four losses as their equations say, from the pure functions and the draws."""
    count, ends = len(batch.captions), task.boundaries
    latents = task.autoencoder.encode(batch.images)
    data = NoisedData(latents, draws.normal(*latents.shape), task.schedule)
    w = draws.choice(count, task.guidance_scales)
    i, j, k, n = (draws.integers(count, high) for high in (50, 49, 4, 4))
    prompts, students = task.conditioner(batch.captions), task.students
    teacher, forward, reverse = (students.denoiser(adapter, prompts, 1.0) for adapter in (None, "fcd", "cd"))
    guided_teacher, guided_reverse = (students.denoiser(adapter, prompts, w) for adapter in (None, "cd"))
    c = {"huber_c": task.huber_c}
    return {
        "reverse_cd": consistency(guided_reverse, guided_teacher, data, ends.reverse_pairs[i], **c),
        "forward_cd": consistency(forward, teacher, data, ends.forward_pairs[j], **c),
        "reverse_preservation": preservation(forward, reverse, data, ends.reverse_preservation[k], **c),
        "forward_preservation": preservation(reverse, forward, data, ends.forward_preservation[n], **c),
    }


def test_a_step_is_the_weighted_sum_of_the_pure_losses_with_the_same_draws(random_family, scenes, tmp_path):
    weights = {"reverse_cd": 1.0, "forward_cd": 0.5, "reverse_preservation": 2.0, "forward_preservation": 1.5}
    task = distillation(random_family, losses=LossWeights(**weights), seed=7, huber_c=0.01)
    expected = {}

    class Before(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            values = by_hand(task, batch, Draws(7, 0))
            expected.update({f"train/{name}": value.mean().detach() for name, value in values.items()})

    trainer = trainer_for(tmp_path, max_steps=1, callbacks=[Before()])
    trainer.fit(task, datamodule=scenes_data(scenes))
    logged = trainer.callback_metrics
    for name, value in expected.items():
        torch.testing.assert_close(logged[name], value)
    total = sum(weights[name.removeprefix("train/")] * value for name, value in expected.items())
    torch.testing.assert_close(logged["train/loss"], total)


def test_draws_depend_on_seed_and_step(random_family, batch):
    task = distillation(random_family)
    first, again, next_step, other_seed = (
        torch.stack(list(task.losses(batch, draws).values()))
        for draws in (Draws(0, 0), Draws(0, 0), Draws(0, 1), Draws(1, 0))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, next_step)
    assert not torch.equal(first, other_seed)


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("direction", "by"), [("forward", "losses"), ("reverse", "train")])
def test_one_student_alone_is_trained_from_given_weights(random_family, scenes, tmp_path, direction, by):
    _, other = directions(direction)
    others = LossWeights(**{name: float(name.startswith(direction)) for name in EVALUATIONS})
    task = distillation(random_family, **({"train": direction} if by == "train" else {"losses": others}))
    before, frozen = student_weights(task), frozen_weights(task)
    assert task.parameter_groups().keys() == {direction}
    trainer_for(tmp_path, max_steps=1).fit(task, datamodule=scenes_data(scenes))
    after = student_weights(task)
    assert same(after[other], before[other])
    assert not any(torch.equal(weight, before[direction][name]) for name, weight in after[direction].items())
    assert same(frozen_weights(task), frozen)
    task.export(tmp_path)
    assert (tmp_path / direction).is_dir()
    assert not (tmp_path / other).exists()


def test_the_base_never_moves(random_family, scenes, tmp_path, batch):
    task = distillation(random_family)
    frozen = frozen_weights(task)
    trainer_for(tmp_path, max_steps=2).fit(task, datamodule=scenes_data(scenes))
    assert same(frozen_weights(task), frozen)
    plain = Family(str(random_family)).load_unet(guided=True).state_dict()
    base = {
        name.replace(".base_layer", ""): p for name, p in task.students.unet.named_parameters() if "lora" not in name
    }
    assert same(base, {name: plain[name] for name in base})


def test_losses_that_train_nobody_are_refused(random_family):
    forward_only = LossWeights(reverse_cd=0.0, reverse_preservation=0.0)
    with pytest.raises(ValueError, match="none of the losses with a weight trains the reverse model"):
        distillation(random_family, train="reverse", losses=forward_only)
    with pytest.raises(ValueError, match="one at least positive"):
        LossWeights(0.0, 0.0, 0.0, 0.0)


def test_boundaries_off_the_solver_grid_are_refused(random_family):
    with pytest.raises(ValueError, match=r"boundary 249 is not on the 50-step solver grid \(nearest: 239, 259\)"):
        distillation(random_family, boundaries=[249, 499, 699, 999])
    assert distillation(random_family, boundaries=[339, 679, 999]).boundaries == Boundaries((0, 339, 679, 999))


def test_each_student_is_clipped_by_itself(random_family, scenes, tmp_path):
    task = distillation(random_family, optimizer=OptimizerSettings(lr=1e-3, clip=1e-3))
    clipped = {}

    class After(lightning.Callback):
        def on_train_batch_end(self, *_) -> None:
            for direction in ADAPTERS.values():
                clipped[direction] = torch.cat([g.flatten() for g in gradients(task, direction)]).norm()

    trainer = trainer_for(tmp_path, max_steps=1, callbacks=[After()])
    trainer.fit(task, datamodule=scenes_data(scenes))
    for direction, norm in clipped.items():
        torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-2, atol=0)
        assert trainer.callback_metrics[f"grad_norm/{direction}"] > 1e-2


# --- checkpoints and files --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(random_family, scenes, tmp_path_factory):
    """A run of 2 steps: its folder, with a checkpoint and both students exported, and its task."""
    folder, task = tmp_path_factory.mktemp("trained"), distillation(random_family)
    trainer = trainer_for(folder, max_steps=2, callbacks=[RunCheckpoint()], enable_checkpointing=True)
    trainer.fit(task, datamodule=scenes_data(scenes))
    task.export(folder)
    return folder, task


def test_a_checkpoint_holds_the_students_alone(trained):
    folder, task = trained
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert len(state) == sum(len(task.students.parameters_of(adapter)) for adapter in ADAPTERS)
    assert all(".lora_A." in name or ".lora_B." in name for name in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.popitem(), "1 trained tensors missing, 0 unknown"),
        (lambda state: state.update({"unet.other": torch.zeros(1)}), "0 trained tensors missing, 1 unknown"),
        (lambda state: state.update({next(iter(state)): torch.zeros(1)}), "1 of another shape"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(random_family, trained, change, message):
    checkpoint = torch.load(trained[0] / "checkpoints" / "last.ckpt", weights_only=True)
    change(checkpoint["state_dict"])
    with pytest.raises(ValueError, match=message):
        distillation(random_family).on_load_checkpoint(checkpoint)


def test_a_checkpoint_of_another_rank_is_refused_by_the_trainer(random_family, scenes, trained, tmp_path):
    other = distillation(random_family, lora=LoraSettings(rank=2), forward_weights=None, reverse_weights=None)
    with pytest.raises(ValueError, match="was it made with another model or LoRA rank"):
        trainer_for(tmp_path, max_steps=3).fit(
            other, datamodule=scenes_data(scenes), ckpt_path=trained[0] / "checkpoints" / "last.ckpt"
        )


def test_exported_students_load_into_the_pipeline(random_family, trained, batch):
    folder, task = trained
    loaded = InvertibleConsistency.from_pretrained(
        Family(str(random_family)), forward=str(folder / "forward"), reverse=str(folder / "reverse")
    )
    assert loaded.boundaries.boundary_timesteps == task.boundaries.boundary_timesteps
    parts = (task.students, task.autoencoder, task.conditioner, task.boundaries)
    trained_now = InvertibleConsistency(*parts, merge=True)  # as loaded ones sample
    noise = seeded_noise(loaded.latent_shape(3, 64, 64), 0)
    guidance = StepGuidance(3.0, 0.8)
    pictures = [p.generate(batch.captions, noise, guidance=guidance) for p in (loaded, trained_now)]
    assert torch.equal(*pictures)
    assert torch.equal(*(p.invert(batch.images, batch.captions) for p in (loaded, trained_now)))
