"""What every task relies on: draws that know no ranks and no interruptions, clipping, and lean checkpoints."""

import importlib.util
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from icd_lightning.tasks.base import Draws, OptimizerSettings, Task, check_guidance_scales, drop_captions

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*does not have many workers")

# --- draws ------------------------------------------------------------------------------------------------------------


def sequence(draws: Draws, count: int) -> list[Tensor]:
    """What a step of a batch of `count` on each rank could ask for."""
    return [
        draws.normal(count, 4, 2),
        draws.integers(count, 50),
        draws.uniform(count),
        draws.choice(count, (1.0, 8.0, 20.0)),
        draws.normal(count),
    ]


def test_a_named_stream_is_another_and_begins_anew():
    """What one loss draws does not depend on what others drew before."""
    draws = Draws(3, 17)
    draws.normal(8)
    first, again, other = draws.of("a").normal(8), draws.of("a").normal(8), draws.of("b").normal(8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, Draws(3, 17).normal(8))
    with pytest.raises(ValueError, match="4 samples in a stream of 8"):
        draws.normal(4)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_draw_for_the_joined_batch(world_size):
    joined = sequence(Draws(3, 17), 8)
    ranks = [sequence(Draws(3, 17, rank=r, world_size=world_size), 8 // world_size) for r in range(world_size)]
    for whole, *parts in zip(joined, *ranks, strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_seed_and_step_alone_decide():
    torch.manual_seed(0)
    first = sequence(Draws(3, 17), 8)
    torch.manual_seed(1)
    assert all(map(torch.equal, first, sequence(Draws(3, 17), 8)))
    for seed, step in ((3, 18), (4, 17), (17, 3), (3, -18)):
        assert not torch.equal(first[0], Draws(seed, step).normal(8, 4, 2))


def test_draws_have_the_distributions_they_name():
    draws, count = Draws(0, 0), 20_000  # as many samples, each with a generator of its own
    normal, whole, uniform = draws.normal(count), draws.integers(count, 7), draws.uniform(count)
    chosen = draws.choice(count, [1, 8, 8, 20])
    assert normal.mean().abs() < 0.03
    assert normal.std() == pytest.approx(1, abs=0.03)
    assert whole.dtype == torch.long
    assert torch.bincount(whole, minlength=7).float().div(count) == pytest.approx([1 / 7] * 7, abs=0.015)
    assert 0 <= uniform.min() < 0.01 < 0.99 < uniform.max() < 1
    assert chosen.dtype == torch.float32
    assert [(chosen == w).float().mean().item() for w in (1, 8, 20)] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr 0.0 must be positive"),
        ({"lr": float("nan")}, "lr nan must be positive and finite"),
        ({"clip": -1.0}, "clip -1.0 must be positive and finite; null turns clipping off"),
        ({"weight_decay": float("inf")}, "weight_decay inf must be 0 or more"),
        ({"betas": (0.9, 1.0)}, r"betas \[0.9, 1.0\] must be 0 or more and less than 1"),
        ({"warmup_steps": -1}, "warmup_steps -1 and max_skipped_steps 10 must be 0 or more"),
        ({"decay": "linear"}, "decay 'linear' is not one of constant, cosine"),
        ({"kind": "sgd"}, "kind 'sgd' is not one of adamw, adamw8bit"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**settings)


@pytest.mark.parametrize("scales", [[], [1.0, -0.5], [float("nan")], None])
def test_guidance_scales_begin_at_zero(scales):
    with pytest.raises(ValueError, match=r"guidance_scales \[.*\] must be 0 \(unconditional.*\) or more, and at least"):
        check_guidance_scales(scales)
    assert check_guidance_scales([0, 8.0]) == (0, 8.0)


def test_the_learning_rate_rises_then_stays_or_falls_to_zero():
    cosine, constant = (OptimizerSettings(warmup_steps=4, decay=decay) for decay in ("cosine", "constant"))
    assert [cosine.factor(step, 24) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert cosine.factor(14, 24) == pytest.approx(0.5)
    assert cosine.factor(24, 24) == cosine.factor(30, 24) == pytest.approx(0)
    assert [constant.factor(step, 24) for step in range(0, 25, 8)] == [0.25, 1, 1, 1]
    assert cosine.factor(1000, float("inf")) == 1
    assert OptimizerSettings(decay="cosine").factor(0, 1) == 1


# --- with a Trainer ---------------------------------------------------------------------------------------------------


class Halves(Task):
    """Two layers in training, in groups of their own, behind one that is frozen; noise from the draws."""

    def __init__(self, width: int = 3, *, stop_at: int | None = None, **options) -> None:
        super().__init__(**options)
        torch.manual_seed(0)
        self.frozen = nn.Linear(2, 4).requires_grad_(False)
        self.left, self.right = nn.Linear(4, width), nn.Linear(4, width)
        self.stop_at = stop_at
        self.gradients: list[dict[str, float]] = []

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"left": [*self.left.parameters()], "right": [*self.right.parameters()]}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        draws = self.draws()
        hidden = self.frozen(batch + draws.normal(*batch.shape))
        if self.trainer.global_step == self.stop_at:
            raise RuntimeError("killed")
        losses = {"left": self.left(hidden).square().mean(), "right": 100 * self.right(hidden).square().mean()}
        total = losses["left"] + losses["right"]
        self.log_losses(total, losses)
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        before = self.norms(optimizer)
        super().on_before_optimizer_step(optimizer)
        self.gradients.append({"before": before, "after": self.norms(optimizer)})

    @staticmethod
    def norms(optimizer: torch.optim.Optimizer) -> dict[str, float]:
        groups = {group["name"]: [p.grad for p in group["params"]] for group in optimizer.param_groups}
        there = {name: [g.flatten() for g in gradients if g is not None] for name, gradients in groups.items()}
        return {name: torch.cat(gradients).norm().item() for name, gradients in there.items() if gradients}


def fit(task: Task, folder: Path, *, max_steps: int = 8, resume: Path | None = None, callbacks=(), val=None, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=3, save_on_exception=True)
    trainer = lightning.Trainer(
        max_steps=max_steps, default_root_dir=folder, callbacks=[save, *callbacks], **quiet, **options
    )
    batches = torch.randn(max_steps * options.get("accumulate_grad_batches", 1), 6, 2, generator=torch.Generator())
    trainer.fit(task, DataLoader(Stream(batches, trainer), batch_size=None), val, ckpt_path=resume)
    return trainer


class Stream(torch.utils.data.IterableDataset):
    """Batches from the trainer's place in the training on, as a data module gives them."""

    def __init__(self, batches: Tensor, trainer: lightning.Trainer) -> None:
        self.batches, self.trainer = batches, trainer

    def __iter__(self):
        yield from self.batches[self.trainer.fit_loop.epoch_loop.batch_progress.total.processed :]


def weights(task: Task) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in task.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def test_each_group_is_clipped_by_itself(tmp_path):
    task = Halves(optimizer=OptimizerSettings(clip=1.0))
    trainer = fit(task, tmp_path)
    assert len(task.gradients) == 8
    for norms in task.gradients:
        assert norms["before"]["right"] > 10 > 1 > norms["before"]["left"]
        assert norms["after"]["right"] == pytest.approx(1, abs=1e-4)
        assert norms["after"]["left"] == norms["before"]["left"]
    assert trainer.callback_metrics["grad_norm/right"] == pytest.approx(task.gradients[-1]["before"]["right"])
    assert {"train/loss", "train/left", "train/right", "grad_norm/left"} <= trainer.callback_metrics.keys()


def test_without_clip_gradients_stay_as_they_are(tmp_path):
    task = Halves(optimizer=OptimizerSettings(clip=None))
    fit(task, tmp_path, accumulate_grad_batches=2)
    assert len(task.gradients) == 8
    assert all(norms["before"] == norms["after"] for norms in task.gradients)


def test_nothing_is_trained_in_half_precision(tmp_path):
    with pytest.raises(ValueError, match=r"left.weight would be trained in half precision.* take bf16-mixed"):
        fit(Halves(), tmp_path, precision="bf16-true")


class Logged(lightning.Callback):
    """What each micro-batch lost, and what was logged when it ended."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        self.logged.append(float(trainer.callback_metrics.get("train/loss", -1)))


def test_the_losses_of_a_step_are_those_of_all_its_micro_batches(tmp_path):
    logged = Logged()
    fit(Halves(), tmp_path, callbacks=[logged], max_steps=2, accumulate_grad_batches=3)
    first, second = sum(logged.losses[:3]) / 3, sum(logged.losses[3:]) / 3
    assert logged.logged == pytest.approx([-1, -1, first, first, first, second])


class Recorded(lightning.Callback):
    """What the optimizer holds when it steps."""

    def __init__(self) -> None:
        self.groups: list[dict] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        (group,) = {
            tuple((key, group[key]) for key in ("lr", "betas", "weight_decay")) for group in optimizer.param_groups
        }
        self.groups.append(dict(group))


def test_the_optimizer_steps_by_the_settings(tmp_path):
    """Rate by warm-up and cosine at every step, betas, weight decay: as they reach AdamW in a training."""
    settings = OptimizerSettings(lr=0.1, betas=(0.8, 0.95), weight_decay=0.3, warmup_steps=2, decay="cosine")
    recorded = Recorded()
    trainer = fit(Halves(optimizer=settings), tmp_path, callbacks=[recorded], max_steps=6, accumulate_grad_batches=2)
    assert isinstance(trainer.optimizers[0].optimizer if hasattr(trainer.optimizers[0], "optimizer") else
                      trainer.optimizers[0], torch.optim.AdamW)  # fmt: skip
    expected = [0.1 * settings.factor(step, 6) for step in range(6)]
    assert [group["lr"] for group in recorded.groups] == pytest.approx(expected)
    assert all(group["betas"] == (0.8, 0.95) and group["weight_decay"] == 0.3 for group in recorded.groups)


def test_weight_decay_shrinks_what_has_no_gradient_to_speak_of(tmp_path):
    plain, decayed = Halves(optimizer=OptimizerSettings()), Halves(optimizer=OptimizerSettings(weight_decay=0.5))
    for task in (plain, decayed):
        fit(task, tmp_path / str(task.optimizer_settings.weight_decay), max_steps=4)
    assert decayed.left.weight.norm() < plain.left.weight.norm()
    torch.testing.assert_close(decayed.left.weight, plain.left.weight * (1 - 0.5e-4) ** 4, rtol=1e-3, atol=1e-4)


def test_a_run_that_goes_on_follows_the_configuration_and_says_so(tmp_path, caplog):
    fit(Halves(optimizer=OptimizerSettings(lr=0.1)), tmp_path, max_steps=3)
    recorded = Recorded()
    changed = Halves(optimizer=OptimizerSettings(lr=0.2, betas=(0.5, 0.9), weight_decay=0.1))
    fit(changed, tmp_path, max_steps=5, callbacks=[recorded], resume=tmp_path / "last.ckpt")
    assert [dict(group) for group in recorded.groups] == [{"lr": 0.2, "betas": (0.5, 0.9), "weight_decay": 0.1}] * 2
    for message in ("optimizer.lr was 0.1, and goes on as 0.2", "optimizer.weight_decay was 0.0, and goes on as 0.1"):
        assert message in caplog.text


class Diverging(Halves):
    """Gradients that are not finite at some steps."""

    def __init__(self, at: set[int], **options) -> None:
        super().__init__(**options)
        self.at = at

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if batch_idx in self.at else 1.0)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, caplog):
    task, steady = Diverging({1, 3}), Diverging(set())
    trainer = fit(task, tmp_path / "nan", max_steps=5)
    assert task.skipped_steps == trainer.callback_metrics["train/skipped_steps"] == 2
    assert all(value.isfinite().all() for value in weights(task).values())
    states = trainer.optimizers[0].state.values()
    assert {int(state["step"]) for state in states} == {3}, "the averages are of the steps that were made"
    fit(steady, tmp_path / "steady", max_steps=1)
    assert not torch.equal(task.left.weight, steady.left.weight)
    assert "step 1 skipped: a gradient is not finite" in caplog.text


def test_a_training_that_diverges_ends(tmp_path):
    task = Diverging({1, 2, 3}, optimizer=OptimizerSettings(max_skipped_steps=2))
    with pytest.raises(ValueError, match=r"3 steps had gradients that are not finite.*max_skipped_steps"):
        fit(task, tmp_path)


class Exploding(Halves):
    """Its gradients are finite, and its weights no more after the second step."""

    def on_train_batch_end(self, *_) -> None:
        if self.trainer.global_step == 2:
            self.left.weight.data.fill_(torch.inf)


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path):
    with pytest.raises(
        ValueError, match=r"left\.weight is not finite after step 3, so nothing is saved: .* smaller lr"
    ):
        fit(Exploding(), tmp_path / "exploding")
    assert not list(tmp_path.rglob("*.ckpt"))
    fit(Halves(), tmp_path, max_steps=6)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["left.weight"].fill_(torch.nan)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"the checkpoint holds left\.weight, which is not finite"):
        fit(Halves(), tmp_path, resume=tmp_path / "last.ckpt")


def test_what_is_frozen_neither_moves_nor_is_saved(tmp_path):
    task = Halves()
    before = weights(task)
    fit(task, tmp_path, max_steps=6)
    after = weights(task)
    assert {name for name in after if torch.equal(after[name], before[name])} == {"frozen.weight", "frozen.bias"}
    saved = torch.load(tmp_path / "last.ckpt")["state_dict"]
    assert saved.keys() == {f"{side}.{name}" for side in ("left", "right") for name in ("weight", "bias")}
    other = Halves()
    other.frozen.weight.data.add_(1)
    fit(other, tmp_path, max_steps=6, resume=tmp_path / "last.ckpt")
    assert torch.equal(other.left.weight, after["left.weight"])
    assert torch.equal(other.frozen.weight, before["frozen.weight"] + 1)  # the ones at hand, not those of the file


@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("stop_at", [4, 6])
def test_a_killed_and_resumed_run_equals_an_unbroken_one(tmp_path, averaging, stop_at):
    settings = OptimizerSettings(lr=1e-2, warmup_steps=3, decay="cosine")

    def callbacks():
        return [EMAWeightAveraging(decay=0.5)] if averaging else []

    whole, killed, resumed = (Halves(optimizer=settings, stop_at=stop) for stop in (None, stop_at, None))
    fit(whole, tmp_path / "whole", callbacks=callbacks())
    with pytest.raises(RuntimeError, match="killed"):
        fit(killed, tmp_path / "killed", callbacks=callbacks())
    trainer = fit(resumed, tmp_path / "killed", callbacks=callbacks(), resume=tmp_path / "killed" / "last.ckpt")
    assert trainer.global_step == 8
    assert resumed.gradients == whole.gradients[stop_at:]
    assert same(weights(resumed), weights(whole))


def test_averaged_weights_are_saved_lean_beside_the_current_ones(tmp_path):
    task = Halves(optimizer=OptimizerSettings(lr=1e-2))
    fit(task, tmp_path, callbacks=[EMAWeightAveraging(decay=0.5)], max_steps=6)
    saved = torch.load(tmp_path / "last.ckpt")
    assert saved["state_dict"].keys() == saved["current_model_state"].keys()
    assert not [name for name in saved["state_dict"] if name.startswith("frozen")]
    assert not same(saved["state_dict"], saved["current_model_state"])


def drop(state: dict[str, Tensor]) -> None:
    del state["left.bias"]


def add(state: dict[str, Tensor]) -> None:
    state["middle.bias"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("width", "spoil", "message"),
    [
        (3, drop, r"1 weights missing, 0 unknown, 0 of another shape or type, for example left.bias"),
        (3, add, r"0 weights missing, 1 unknown, 0 of another shape or type, for example middle.bias"),
        (
            5,
            lambda state: None,
            r"0 weights missing, 0 unknown, 4 of another shape or type, for example left.bias",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, width, spoil, message):
    fit(Halves(), tmp_path, max_steps=3)
    checkpoint = torch.load(tmp_path / "last.ckpt")
    spoil(checkpoint["state_dict"])
    torch.save(checkpoint, tmp_path / "spoilt.ckpt")
    with pytest.raises(ValueError, match=message):
        fit(Halves(width), tmp_path, resume=tmp_path / "spoilt.ckpt")


def test_validation_draws_the_same_every_time_and_nothing_that_training_draws(tmp_path):
    drawn: dict[str, list[Tensor]] = {"train": [], "val": []}

    class Watched(Halves):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            drawn["train"].append(self.draws().normal(6, 2))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            drawn["val"].append(self.validation_draws(batch_idx).normal(6, 2))

    every_four = {"val_check_interval": 4, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    fit(Watched(), tmp_path, val=DataLoader(torch.zeros(2, 6, 2), batch_size=None), **every_four)
    first, again = drawn["val"][:2], drawn["val"][2:]
    assert len(again) == 2
    assert all(map(torch.equal, first, again))
    assert len({tuple(noise.flatten().tolist()) for noise in drawn["train"] + first}) == 8 + 2


# --- options ----------------------------------------------------------------------------------------------------------


def test_captions_are_dropped_as_drawn_and_nothing_is_drawn_without_a_share():
    captions = [f"picture {i}" for i in range(2000)]
    draws, twin = Draws(0, 1), Draws(0, 1)
    assert drop_captions(captions, 0, draws) == captions
    assert torch.equal(draws.uniform(2000), twin.uniform(2000))
    dropped = drop_captions(captions, 0.25, draws)
    assert all(new in ("", old) for new, old in zip(dropped, captions, strict=True))
    assert dropped.count("") / len(captions) == pytest.approx(0.25, abs=0.03)


def test_averages_of_another_optimizer_are_refused_by_a_run_that_goes_on(tmp_path):
    fit(Halves(), tmp_path, max_steps=2)
    other = Halves(optimizer=OptimizerSettings(kind="adamw8bit"))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
    with pytest.raises(ValueError, match=r"averages of optimizer.kind adamw, .* keep adamw, or give ckpt_path null"):
        other.check_recipe(checkpoint)


def test_skipped_steps_are_counted_on_by_a_run_that_goes_on(tmp_path):
    fit(Diverging({1, 2}, optimizer=OptimizerSettings(max_skipped_steps=2)), tmp_path, max_steps=3)
    again = Diverging({3}, optimizer=OptimizerSettings(max_skipped_steps=2))
    with pytest.raises(ValueError, match="3 steps had gradients that are not finite"):
        fit(again, tmp_path, max_steps=6, resume=tmp_path / "last.ckpt")


def test_an_optimizer_of_8_bits_is_refused_where_it_cannot_work():
    groups = [{"params": [nn.Parameter(torch.zeros(4))], "name": "network"}]
    with pytest.raises(ValueError, match="adamw8bit needs a CUDA GPU"):
        OptimizerSettings(kind="adamw8bit").build(groups, fused=False)
    if torch.cuda.is_available():
        groups[0]["params"] = [nn.Parameter(torch.zeros(4, device="cuda"))]
        if importlib.util.find_spec("bitsandbytes") is None:
            with pytest.raises(ValueError, match=r"needs bitsandbytes .*: pip install bitsandbytes"):
                OptimizerSettings(kind="adamw8bit").build(groups, fused=False)
        else:
            assert OptimizerSettings(kind="adamw8bit").build(groups, fused=False).param_groups[0]["lr"] == 1e-4
