import json
from dataclasses import replace
from functools import partial

import lightning
import pytest
import torch
from golden_case import consistency, preservation
from lightning.pytorch.strategies import DDPStrategy
from training_case import FEW, distillation, frozen_weights, same, scenes_data, student_weights, trainer_for

from icd_lightning.callbacks.checkpoint import RunCheckpoint
from icd_lightning.diffusion import (
    VP,
    Boundaries,
    Consistency,
    DDIMJump,
    Loss,
    NoisedData,
    Preservation,
    StepGuidance,
)
from icd_lightning.diffusion.calls import Call
from icd_lightning.diffusion.draws import Draws
from icd_lightning.diffusion.losses import LossValues
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.editing.method import seeded_noise
from icd_lightning.models.family import Family
from icd_lightning.models.students import DIRECTIONS, FullStudents, LoraSettings, LoraStudents
from icd_lightning.tasks.base import OptimizerSettings
from icd_lightning.tasks.invertible_consistency import Losses
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
    return [p.grad for p in task.students.parameters_of(direction) if p.grad is not None and p.grad.any()]


def evaluate(task, batch, draws: Draws) -> dict[str, torch.Tensor]:
    """Each loss (B,)."""
    losses = task.evaluate(task.losses, task.inputs(batch, draws), draws)
    return {name: loss.values for name, loss in losses.items()}


# --- the losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_loss_that_is_null_is_not_computed(random_family, batch, name):
    task = distillation(random_family, losses=Losses(**{name: None}), students=FEW)
    calls = count_calls(task.students)
    assert evaluate(task, batch, Draws(0, 0)).keys() == EVALUATIONS.keys() - {name}
    evaluations = sum(EVALUATIONS.values()) - EVALUATIONS[name]
    assert sum(count for _, count in calls) == evaluations * len(batch.captions)


def test_ten_evaluations_take_five_calls_of_twice_the_batch(random_family, batch):
    task = distillation(random_family, students=FEW)
    calls = count_calls(task.students)
    evaluate(task, batch, Draws(0, 0))
    twice = 2 * len(batch.captions)
    assert calls[0] == ("teacher", twice)
    assert sorted(calls[1:]) == [("forward", twice), ("forward", twice), ("reverse", twice), ("reverse", twice)]


def count_calls(students: LoraStudents) -> list[tuple[str, int]]:
    """The network's calls from now on: role and number of samples."""
    calls = []
    students.network.register_forward_pre_hook(lambda _, args: calls.append((students.active, len(args[0]))))
    return calls


def test_each_loss_trains_the_student_it_is_named_after_alone(random_family, batch):
    task = distillation(random_family)
    for name, loss in evaluate(task, batch, Draws(0, 0)).items():
        task.zero_grad(set_to_none=True)
        loss.mean().backward(retain_graph=True)  # the losses share calls of the network
        own, other = directions(name)
        assert gradients(task, own), name
        assert not gradients(task, other), name
        assert not [key for key, p in task.named_parameters() if p.grad is not None and "lora_" not in key]


def by_hand(task, batch, draws: Draws, c: float) -> dict[str, torch.Tensor]:
    """The four losses as their equations say, from the pure functions and the draws."""
    count, ends = len(batch.captions), task.boundaries
    latents = task.autoencoder.encode(batch.images)
    data = NoisedData(latents, draws.of("noise").normal(*latents.shape), task.process)
    of = {name: draws.of(name) for name in EVALUATIONS}
    pairs = {d: ends.pairs[d][of[f"{d}_cd"].integers(count, len(ends.pairs[d]))] for d in DIRECTIONS}
    w = of["reverse_cd"].choice(count, task.guidance_scales)
    trips = {d: ends.trips[d][of[f"{d}_preservation"].integers(count, 4)] for d in DIRECTIONS}
    prompts, students = task.conditioner(batch.captions), task.students
    forward, reverse = (students.jump(direction, prompts, 1.0) for direction in DIRECTIONS)
    guided_reverse = students.jump("reverse", prompts, w)
    teacher, guided_teacher = (students.denoiser("teacher", prompts, scale) for scale in (1.0, w))
    solver = DDIMJump(teacher, task.process, set_alpha_to_one=False)
    guided_solver = replace(solver, denoise=guided_teacher)
    return {
        "reverse_cd": consistency(guided_reverse, guided_solver, data, pairs["reverse"], huber_c=c),
        "forward_cd": consistency(forward, solver, data, pairs["forward"], huber_c=c),
        "reverse_preservation": preservation(forward, reverse, data, trips["reverse"], huber_c=c),
        "forward_preservation": preservation(reverse, forward, data, trips["forward"], huber_c=c),
    }


KINDS = {"cd": Consistency, "preservation": Preservation}


def weighted(weights: dict[str, float], **options) -> Losses:
    """The usual losses with these weights."""
    made = {}
    for name, weight in weights.items():
        direction, kind = name.split("_")
        made[name] = KINDS[kind](direction, weight=weight, **options)
    return Losses(**made)


class Before(lightning.Callback):
    """The losses of the first batch by hand, as `train/<name>`."""

    def __init__(self, seed: int, c: float) -> None:
        self.seed, self.c = seed, c
        self.losses: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        values = by_hand(pl_module, batch, Draws(self.seed, 0), self.c)
        self.losses = {f"train/{name}": value.mean().detach() for name, value in values.items()}


def test_a_step_is_the_weighted_sum_of_the_pure_losses_with_the_same_draws(random_family, scenes, tmp_path):
    weights = {"reverse_cd": 1.0, "forward_cd": 0.5, "reverse_preservation": 2.0, "forward_preservation": 1.5}
    task, before = distillation(random_family, losses=weighted(weights, huber_c=0.01), seed=7), Before(7, 0.01)
    trainer = trainer_for(tmp_path, max_steps=1, callbacks=[before])
    trainer.fit(task, datamodule=scenes_data(scenes))
    logged = trainer.callback_metrics
    for name, value in before.losses.items():
        torch.testing.assert_close(logged[name], value)
    total = sum(weights[name.removeprefix("train/")] * value for name, value in before.losses.items())
    torch.testing.assert_close(logged["train/loss"], total)


class Steps(lightning.Callback):
    """How far each student moved at every optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, bool]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.gradients.append({direction: bool(gradients(pl_module, direction)) for direction in DIRECTIONS})


def test_by_the_references_schedule_each_loss_has_a_step_of_its_own(random_family, scenes, tmp_path):
    """Four steps an iteration, two of each student, the later losses seen by weights that the earlier moved."""
    steps, before = Steps(), Before(0, 0.001)
    task = distillation(random_family, step_after="each_loss")
    trainer = trainer_for(tmp_path, max_steps=4, callbacks=[before, steps])
    trainer.fit(task, datamodule=scenes_data(scenes))
    reverse, forward = {"forward": False, "reverse": True}, {"forward": True, "reverse": False}
    assert steps.gradients == [reverse, forward, reverse, forward]
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 1
    logged = trainer.callback_metrics
    assert all(logged[f"grad_norm/{direction}"] > 0 for direction in DIRECTIONS)  # of its own last step
    torch.testing.assert_close(logged["train/reverse_cd"], before.losses["train/reverse_cd"])
    torch.testing.assert_close(logged["train/forward_cd"], before.losses["train/forward_cd"])
    assert not torch.isclose(logged["train/reverse_preservation"], before.losses["train/reverse_preservation"])


@pytest.mark.parametrize(("limits", "total"), [({"max_epochs": 2}, 16), ({"max_epochs": 2, "max_steps": 6}, 6)])
def test_a_rate_that_falls_counts_the_steps_of_each_loss(random_family, scenes, tmp_path, limits, total):
    """Two batches an epoch, four steps each."""
    rates = []

    class Rates(lightning.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    settings = OptimizerSettings(lr=1e-3, decay="cosine")
    task = distillation(random_family, students=FEW, step_after="each_loss", optimizer=settings)
    trainer_for(tmp_path, limit_train_batches=2, callbacks=[Rates()], **limits).fit(task, scenes_data(scenes))
    assert rates[:total] == pytest.approx([1e-3 * settings.factor(step, total) for step in range(total)])


def test_steps_after_each_loss_want_a_ddp_that_expects_them(random_family):
    task = distillation(random_family, students=FEW, step_after="each_loss")
    with pytest.raises(ValueError, match=r"each_loss .* take trainer\.strategy ddp_find_unused_parameters_true"):
        task.check_strategy(DDPStrategy())
    task.check_strategy(DDPStrategy(find_unused_parameters=True))
    distillation(random_family, students=FEW).check_strategy(DDPStrategy())


class Identity(Loss):
    """How far the reverse student's jump moves the data: a loss from outside of the package, in one class."""

    def plan(self, inputs, draws):
        x, t = inputs.data.x0, torch.full((len(inputs.data),), 259)
        moved = yield Call(inputs.students[self.trains](1.0), x, t, torch.zeros_like(t), turn=2)
        return LossValues((moved - x).square().mean((1, 2, 3)), torch.zeros_like(t))


def test_a_loss_from_outside_of_the_package_is_one_class(random_family, scenes, tmp_path):
    losses = Losses(None, None, None, None, others={"identity": Identity("reverse", weight=2.0)})
    task = distillation(random_family, losses=losses, students=FEW)
    before = student_weights(task)
    trainer = trainer_for(tmp_path, max_steps=1)
    trainer.fit(task, datamodule=scenes_data(scenes))
    assert trainer.callback_metrics["train/loss"] == 2 * trainer.callback_metrics["train/identity"] > 0
    after = student_weights(task)
    assert same(after["forward"], before["forward"])
    assert not same(after["reverse"], before["reverse"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_students_may_be_networks_of_their_own(random_family, scenes, tmp_path):
    """Full fine-tuning through the same task: both copies move, the teacher does not, files load in diffusers."""
    task = distillation(random_family, students=FullStudents)
    networks = {d: task.students.diffusion_models()[1 + i].network for i, d in enumerate(DIRECTIONS)}
    frozen = frozen_weights(task)
    before = {d: network.conv_in.weight.detach().clone() for d, network in networks.items()}
    trainer_for(tmp_path, max_steps=1).fit(task, datamodule=scenes_data(scenes))
    assert same(frozen_weights(task), frozen)
    assert not any(torch.equal(networks[d].conv_in.weight, before[d]) for d in DIRECTIONS)
    task.export(tmp_path)
    for direction, network in networks.items():
        loaded = type(network).from_pretrained(tmp_path / direction)
        assert same(loaded.state_dict(), network.state_dict())
        assert "load_lora_weights" not in (tmp_path / direction / "README.md").read_text()


def test_students_of_ones_own_without_a_model_are_refused(random_family):
    class Half(FullStudents):
        def __init__(self, teacher):
            super().__init__(teacher)
            del self.models["reverse"]

    with pytest.raises(ValueError, match="Half has no model of the reverse student: derive it from Students, and add"):
        distillation(random_family, students=Half)
    with pytest.raises(ValueError, match="Linear has no model of the forward student: derive it from Students"):
        distillation(random_family, students=lambda teacher: torch.nn.Linear(1, 1))


def test_the_checkpointing_that_is_asked_for_is_on(random_family):
    for asked in (False, True):
        students = partial(LoraStudents, gradient_checkpointing=asked)
        assert distillation(random_family, students=students).students.network.is_gradient_checkpointing is asked


def test_draws_depend_on_seed_and_step(random_family, batch):
    task = distillation(random_family)
    first, again, next_step, other_seed = (
        torch.stack(list(evaluate(task, batch, draws).values()))
        for draws in (Draws(0, 0), Draws(0, 0), Draws(0, 1), Draws(1, 0))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, next_step)
    assert not torch.equal(first, other_seed)


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_student_alone_is_trained_from_given_weights(random_family, scenes, tmp_path, direction):
    _, other = directions(direction)
    task = distillation(random_family, losses=Losses(**{f"{other}_cd": None, f"{other}_preservation": None}))
    before, frozen = student_weights(task), frozen_weights(task)
    assert task.parameter_groups().keys() == {direction}
    assert not any(parameter.requires_grad for parameter in task.students.parameters_of(other))
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
    plain = Family(str(random_family)).load_model(guided=True).network.state_dict()
    base = {
        name.replace(".base_layer", ""): p for name, p in task.students.network.named_parameters() if "lora" not in name
    }
    assert same(base, {name: plain[name] for name in base})


def test_losses_that_are_none_named_twice_or_for_another_student_are_refused(random_family):
    with pytest.raises(ValueError, match="losses are all null: a training needs one at least"):
        distillation(random_family, losses=Losses(None, None, None, None))
    with pytest.raises(ValueError, match=r"losses\.others names forward_cd, a usual loss"):
        distillation(random_family, losses=Losses(others={"forward_cd": Consistency("forward")}))
    with pytest.raises(ValueError, match=r"losses\.reverse_cd trains forward: .* in losses\.others"):
        distillation(random_family, losses=Losses(reverse_cd=Consistency("forward")))
    assert Losses(others=None).named().keys() == Losses().named().keys()
    distillation(random_family, losses=Losses(reverse_cd=None, others={"mine": Consistency("forward")}))


def test_boundaries_must_be_those_of_the_students_to_begin_with(random_family):
    with pytest.raises(ValueError, match=r"the forward model to begin with was made for boundaries \[0, 259, .*for "):
        distillation(random_family, boundaries=Boundaries((339, 679, 999)))
    other = distillation(random_family, students=FEW, boundaries=Boundaries((339, 679, 999)))
    assert other.boundaries.boundary_timesteps == (0, 339, 679, 999)


def test_each_student_is_clipped_by_itself(random_family, scenes, tmp_path):
    task = distillation(random_family, optimizer=OptimizerSettings(lr=1e-3, clip=1e-3))
    clipped = {}

    class After(lightning.Callback):
        def on_train_batch_end(self, *_) -> None:
            for direction in DIRECTIONS:
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
    assert len(state) == sum(len(task.students.parameters_of(direction)) for direction in DIRECTIONS)
    assert all(".lora_A." in name or ".lora_B." in name for name in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.popitem(), "1 weights missing, 0 unknown"),
        (lambda state: state.update({"unet.other": torch.zeros(1)}), "0 weights missing, 1 unknown"),
        (lambda state: state.update({next(iter(state)): torch.zeros(1)}), "1 of another shape"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(random_family, trained, change, message):
    checkpoint = torch.load(trained[0] / "checkpoints" / "last.ckpt", weights_only=True)
    change(checkpoint["state_dict"])
    with pytest.raises(ValueError, match=message):
        distillation(random_family).on_load_checkpoint(checkpoint)


def test_a_checkpoint_of_another_rank_is_refused_by_the_trainer(random_family, scenes, trained, tmp_path):
    other = distillation(random_family, students=partial(LoraStudents, lora=LoraSettings(rank=2)))
    with pytest.raises(ValueError, match=r"was trained with rank 4 \(here 2\)"):
        trainer_for(tmp_path, max_steps=3).fit(
            other, datamodule=scenes_data(scenes), ckpt_path=trained[0] / "checkpoints" / "last.ckpt"
        )


def test_a_run_goes_on_with_the_process_that_it_was_trained_for(random_family, trained):
    checkpoint = torch.load(trained[0] / "checkpoints" / "last.ckpt", weights_only=True)
    task = distillation(random_family)
    trained_for = task.process.prediction_type
    changed = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[trained_for]
    for process, named in (
        (VP(prediction_type=changed), changed),
        (VP(prediction_type=trained_for, beta_end=0.02), "beta_end': 0.02"),
    ):
        task.process = process
        with pytest.raises(ValueError, match=rf"was trained with process .*\(here .*{named}"):
            task.check_recipe(checkpoint)
    checkpoint["recipe"]["process"] = {"prediction_type": trained_for}  # as older versions wrote them
    task.check_recipe(checkpoint)
    del checkpoint["recipe"]["process"]
    task.check_recipe(checkpoint)


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


def test_an_export_says_where_its_forward_model_begins(random_family, tmp_path):
    """A student trained from timestep 39 on is inverted from there, whether or not the boundaries are named."""
    ends = Boundaries((479, 999), start_timestep=39, num_solver_steps=25)
    task = distillation(random_family, students=FEW, boundaries=ends)
    task._trainer = lightning.Trainer(logger=False, enable_checkpointing=False)
    task.export(tmp_path)
    paths = {direction: str(tmp_path / direction) for direction in DIRECTIONS}
    for named in (None, "479,999"):
        method = InvertibleConsistency.from_pretrained(Family(str(random_family)), **paths, boundaries=named)
        assert method.boundaries.jumps["forward"] == ends.jumps["forward"] == ((39, 479), (479, 999))


def test_a_loss_may_hold_what_no_card_can(random_family, tmp_path):
    """A network or a path of its own is named by its kind, in the recipe and in the card."""

    class Weighed(Preservation):
        def __init__(self) -> None:
            super().__init__("forward")
            self.network, self.file, self.scales = torch.nn.Linear(2, 2), tmp_path, (1, 2)

    stated = Weighed().settings()
    assert json.loads(json.dumps(stated)) == stated
    assert [stated[name] for name in ("kind", "network", "scales")] == ["Weighed", "Linear", [1, 2]]
