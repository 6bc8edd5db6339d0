"""Stage 2: joint training of the forward and the reverse consistency model (Eq. 5, arXiv:2406.14539)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn

from icd_lightning.data.batch import Batch
from icd_lightning.diffusion import (
    Boundaries,
    Consistency,
    Direction,
    Draws,
    Loss,
    LossInputs,
    LossValues,
    NoisedData,
    Preservation,
    StepGuidance,
)
from icd_lightning.diffusion.calls import together
from icd_lightning.models.cards import write_student_card
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.family import Family
from icd_lightning.models.students import DIRECTIONS, LoraStudents, Students
from icd_lightning.models.weights import fingerprint
from icd_lightning.tasks.base import OptimizerSettings, Task, check_guidance_scales, check_share, drop_captions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Losses:
    """The losses by name; null leaves one out, uncomputed. `others` are any further ones, from wherever."""

    reverse_cd: Loss | None = field(default_factory=lambda: Consistency("reverse"))
    forward_cd: Loss | None = field(default_factory=lambda: Consistency("forward"))
    reverse_preservation: Loss | None = field(default_factory=lambda: Preservation("reverse", weight=1.5))
    forward_preservation: Loss | None = field(default_factory=lambda: Preservation("forward", weight=1.5))
    others: dict[str, Loss] = field(default_factory=dict)

    def named(self) -> dict[str, Loss]:
        """Those that there are; ValueError for none, and for one whose name says another student."""
        usual = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "others"}
        others = self.others or {}  # null in a configuration that has nothing below the key
        if twice := usual.keys() & others.keys():
            raise ValueError(f"losses.others names {min(twice)}, a usual loss: give it another name")
        for name, loss in usual.items():
            if loss is not None and loss.trains != name.partition("_")[0]:
                raise ValueError(f"losses.{name} trains {loss.trains}: give it a name of its own in losses.others")
        named = {name: loss for name, loss in {**usual, **others}.items() if loss is not None}
        if not named:
            raise ValueError("losses are all null: a training needs one at least")
        return named


class InvertibleConsistencyDistillation(Task):
    """Both students of one frozen guidance-distilled teacher, trained by a weighted sum of losses.

    Args:
        family: where the guidance-distilled teacher, the autoencoder and the text side come from.
        students: makes both students of the teacher: LoRA adapters, or `FullStudents`.
        losses: by name, each with its weight and the student that it trains; a student that none trains stays as it is.
        boundaries: the ends of the segments, e.g. [259, 519, 779, 999]. Off the solver grid their boundary conditions
            are never learnt, so there they are refused, unless `allow_off_grid` asks for them.
        guidance_scales: the w drawn for the reverse student's consistency loss; the forward student is unguided.
        caption_dropout: the share of captions that are left empty in training.
        step_after: an optimizer step after the sum of the losses (the paper), or after each loss (the reference's
            code), which counts each as a step of trainer.max_steps.
        decoding: the guidance with which validation decodes, beside w = 1; it has no part in training.
    """

    def __init__(
        self,
        family: Family,
        students: Callable[[DiffusionModel], Students] = LoraStudents,
        losses: Losses = Losses(),
        *,
        boundaries: Boundaries = Boundaries.uniform(4),
        guidance_scales: Sequence[float] = (1.0, 8.0, 12.0, 16.0, 20.0),
        caption_dropout: float = 0.0,
        step_after: Literal["sum", "each_loss"] = "sum",
        decoding: StepGuidance = StepGuidance(8.0, 0.8),
        optimizer: OptimizerSettings = OptimizerSettings(lr=8e-6),
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        self.losses = losses.named()
        self.guidance_scales = check_guidance_scales(guidance_scales)
        self.caption_dropout = check_share("caption_dropout", caption_dropout)
        self.automatic_optimization = step_after == "sum"
        self.steps_per_batch = 1 if step_after == "sum" else len(self.losses)
        self.family, self.boundaries, self.decoding = family, boundaries, decoding
        family.check()
        self.autoencoder = family.load_autoencoder()
        teacher = family.load_model(guided=True)
        self._teacher = fingerprint(teacher.network, most=4096)
        self.students = students(teacher)
        models = getattr(self.students, "models", {})
        if missing := [direction for direction in DIRECTIONS if direction not in models]:
            raise ValueError(
                f"{type(self.students).__name__} has no model of the {missing[0]} student: derive it from Students, "
                "and add the model to `models` in __init__, as FullStudents does"
            )
        self.process = self.students.process
        boundaries.check_process(self.process)
        for direction, ends in self.students.boundaries.items():
            if tuple(ends) != boundaries.boundary_timesteps:
                raise ValueError(
                    f"the {direction} model to begin with was made for boundaries {ends}, this training is for "
                    f"{list(boundaries.boundary_timesteps)}: give it those, or another model to begin with"
                )
        for direction in set(DIRECTIONS) - set(self.trained):  # else DDP would wait for its gradients
            self.students.freeze(direction)
            if direction not in self.students.boundaries:
                log.warning("no loss trains the %s model, and none is loaded: it stays the teacher itself", direction)

    def check_strategy(self, strategy: Strategy) -> None:
        several = self.steps_per_batch > 1 and isinstance(strategy, DDPStrategy)
        if several and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise ValueError(
                "step_after each_loss goes backward once for each loss, and DDP would wait each time for all gradients"
                ": take trainer.strategy ddp_find_unused_parameters_true"
            )

    @property
    def trained(self) -> list[Direction]:
        return [direction for direction in DIRECTIONS if direction in {loss.trains for loss in self.losses.values()}]

    def diffusion_models(self) -> list[DiffusionModel]:
        return self.students.diffusion_models()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {direction: self.students.parameters_of(direction) for direction in self.trained}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        draws = self.draws()
        captions = drop_captions(batch.captions, self.caption_dropout, draws.of("captions"))
        inputs = self.inputs(batch._replace(captions=captions), draws)
        if not self.automatic_optimization:
            return self._step_after_each(inputs, draws)
        means = {name: loss.values.mean() for name, loss in self.evaluate(self.losses, inputs, draws).items()}
        total = sum(self.losses[name].weight * mean for name, mean in means.items())
        self.log_losses(total, means)
        return total

    def _step_after_each(self, inputs: LossInputs, draws: Draws) -> None:
        """The reference's schedule: each loss sees the weights that the one before left."""
        optimizer, means = self.optimizers(), {}
        for name, loss in self.losses.items():
            means[name] = self.evaluate({name: loss}, inputs, draws)[name].values.mean()
            self.manual_backward(loss.weight * means[name])
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()
        self.log_losses(sum(self.losses[name].weight * mean for name, mean in means.items()), means)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, LossValues]:
        """Return, for callbacks, each sample's losses, and the segments of the time axis where they were taken."""
        draws = self.validation_draws(batch_idx)
        losses = self.evaluate(self.losses, self.inputs(batch, draws), draws)
        self.log_dict({f"val/{name}": loss.values.mean() for name, loss in losses.items()}, sync_dist=True)
        return losses

    def inputs(self, batch: Batch, draws: Draws) -> LossInputs:
        """The latents, their one noise, and the networks bound to the captions."""
        latents, conditioning, _ = self.encoded(batch, draws.of("latents"))
        return LossInputs(
            NoisedData(latents, draws.of("noise").normal(*latents.shape), self.process),
            self.boundaries,
            self.guidance_scales,
            partial(self.students.jump, "teacher", conditioning),
            {direction: partial(self.students.jump, direction, conditioning) for direction in DIRECTIONS},
        )

    @staticmethod
    def evaluate(losses: dict[str, Loss], inputs: LossInputs, draws: Draws) -> dict[str, LossValues]:
        """Each loss, on timesteps of its own, the noise shared by all."""
        plans = {name: loss.plan(inputs, draws.of(name)) for name, loss in losses.items()}
        values = together(plans)
        for name, value in values.items():
            losses[name].check(name, value, count=len(inputs.data))
        return values

    def recipe(self) -> dict[str, Any]:
        """Segments, losses, students and teacher; which students are trained follows."""
        return {
            "boundaries": list(self.boundaries.boundary_timesteps),
            "start_timestep": self.boundaries.start_timestep,
            "num_solver_steps": self.boundaries.num_solver_steps,
            "losses": {name: loss.settings() for name, loss in self.losses.items()},
            "guidance_scales": list(self.guidance_scales),
            "caption_dropout": self.caption_dropout,
            "step_after": "sum" if self.automatic_optimization else "each_loss",
            "teacher": self._teacher,
            "process": self.process.settings,
            **self.students.settings(),
        }

    def export(self, folder: Path) -> None:
        """Write each trained student as its kind is written, with a card."""
        about = {
            "boundaries": list(self.boundaries.boundary_timesteps),
            "start_timestep": self.boundaries.start_timestep,
            "family": self.family.model,
        }
        for direction in self.trained:
            self.students.export(direction, folder, about)
            write_student_card(folder / direction, direction, self.boundaries, self.about())
