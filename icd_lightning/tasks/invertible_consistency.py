"""Stage 2: joint training of the forward and the reverse consistency model (Eq. 5, arXiv:2406.14539)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from icd_lightning.data.batch import Batch
from icd_lightning.diffusion import Boundaries, NoisedData, StepGuidance
from icd_lightning.diffusion.calls import Plan, together
from icd_lightning.diffusion.losses import consistency_plan, preservation_plan
from icd_lightning.models.backbone import evaluate_joined
from icd_lightning.models.cards import write_student_card
from icd_lightning.models.checkpoints import load_student, save_kohya, save_student
from icd_lightning.models.conditioning import Framing
from icd_lightning.models.family import Family
from icd_lightning.models.students import ADAPTERS, LoraSettings, Students
from icd_lightning.tasks.base import Draws, OptimizerSettings, Task, check_guidance_scales, drop_captions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LossWeights:
    """Weights of the four losses, each named after the student it trains; 0 leaves a loss out, uncomputed."""

    reverse_cd: float = 1.0
    forward_cd: float = 1.0
    reverse_preservation: float = 1.5
    forward_preservation: float = 1.5

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 0 or not any(asdict(self).values()):
            raise ValueError(f"loss weights must be 0 or more, and one at least positive; got {asdict(self)}")

    def of(self, direction: str) -> dict[str, float]:
        """Those of the losses that train the forward or the reverse student, where they are not 0."""
        return {name: value for name, value in asdict(self).items() if name.startswith(direction) and value > 0}


class InvertibleConsistencyDistillation(Task):
    """Both students, LoRA adapters on one frozen guidance-distilled UNet, trained by the sum of up to four losses.

    Args:
        family: where the guidance-distilled teacher, the autoencoder and the text side come from.
        boundaries: the upper ends of the segments, e.g. [259, 519, 779, 999]. Off the solver grid their boundary
            conditions are never learnt, so there they are refused, unless `allow_off_grid` asks for them.
        guidance_scales: the w drawn for the reverse student's consistency loss; the forward student is unguided.
        train: which student learns; the other one stays as `reverse_weights` or `forward_weights` left it.
        reverse_weights, forward_weights: a student to start from, ours or a released file.
        caption_dropout: the share of captions that are left empty in training.
        decoding: the guidance with which validation decodes, beside w = 1; it has no part in training.
    """

    def __init__(
        self,
        family: Family,
        boundaries: Sequence[int] = (259, 519, 779, 999),
        *,
        allow_off_grid: bool = False,
        guidance_scales: Sequence[float] = (1.0, 8.0, 12.0, 16.0, 20.0),
        losses: LossWeights = LossWeights(),
        huber_c: float = 0.001,
        lora: LoraSettings = LoraSettings(),
        train: Literal["both", "reverse", "forward"] = "both",
        reverse_weights: str | None = None,
        forward_weights: str | None = None,
        gradient_checkpointing: bool = False,
        caption_dropout: float = 0.0,
        decoding: StepGuidance = StepGuidance(8.0, 0.8),
        optimizer: OptimizerSettings = OptimizerSettings(lr=8e-6),
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        if huber_c <= 0:
            raise ValueError(f"huber_c {huber_c} must be positive (the paper's is 0.001)")
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"caption_dropout {caption_dropout} must be 0 or more and less than 1")
        ends = tuple(boundaries) if 0 in boundaries else (0, *boundaries)
        self.boundaries = Boundaries(ends, allow_off_grid=allow_off_grid)
        self.guidance_scales = check_guidance_scales(guidance_scales)
        self.huber_c, self.caption_dropout = huber_c, caption_dropout
        self.segments: dict[str, Tensor] = {}  # of the samples of the latest losses, (B,) each
        directions = [direction for direction in ADAPTERS.values() if train in ("both", direction)]
        self.weights = {name: value for direction in directions for name, value in losses.of(direction).items()}
        if not self.weights:
            raise ValueError(f"none of the losses with a weight trains the {train} model; got {asdict(losses)}")
        # a student that no loss reaches is not in training: DDP would wait for its gradients
        self.trained = [
            adapter for adapter, direction in ADAPTERS.items() if direction in directions and losses.of(direction)
        ]
        self.family, self.decoding = family, decoding
        family.check()
        self.schedule = family.load_schedule()
        self.autoencoder = family.load_autoencoder()
        self.conditioner = family.load_conditioner()
        self.students = Students(
            family.load_unet(guided=True), self.schedule, lora=lora, gradient_checkpointing=gradient_checkpointing
        )
        given = {"reverse": reverse_weights, "forward": forward_weights}
        for direction, weights in given.items():
            if train not in ("both", direction) and weights is None:
                log.warning("train: %s without %s_weights: the other student is the teacher itself", train, direction)
        for adapter, weights in (("cd", reverse_weights), ("fcd", forward_weights)):
            if weights is not None:
                load_student(self.students, adapter, weights)
        for adapter in set(ADAPTERS) - set(self.trained):
            for parameter in self.students.parameters_of(adapter):
                parameter.requires_grad_(False)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """One group for each student in training."""
        return {ADAPTERS[adapter]: self.students.parameters_of(adapter) for adapter in self.trained}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        draws = self.draws()
        batch = batch._replace(captions=drop_captions(batch.captions, self.caption_dropout, draws))
        losses = self.losses(batch, draws)
        total = sum(self.weights[name] * value.mean() for name, value in losses.items())
        self.log_losses(total, {name: value.mean() for name, value in losses.items()})
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return, for callbacks, each sample's losses; `segments` says where on the time axis they were taken."""
        losses = self.losses(batch, self.validation_draws(batch_idx))
        self.log_dict({f"val/{name}": value.mean() for name, value in losses.items()}, sync_dist=True)
        return losses

    def losses(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The losses that count, each (B,): timesteps drawn afresh for each, the noise shared by all."""
        latents = self.latents(batch, draws)
        data = NoisedData(latents, draws.normal(*latents.shape), self.schedule)
        framing = Framing.of_latents(batch.metadata, latents, self.autoencoder.downsampling)
        conditioning = self.conditioning(batch, framing)
        boundaries, count, c = self.boundaries, len(latents), self.huber_c
        w = draws.choice(count, self.guidance_scales)
        i, j = (draws.integers(count, len(pairs)) for pairs in (boundaries.reverse_pairs, boundaries.forward_pairs))
        k, n = (draws.integers(count, boundaries.num_segments) for _ in range(2))
        ends = torch.tensor(boundaries.boundary_timesteps, device=i.device)
        self.segments = {
            "reverse_cd": torch.bucketize(boundaries.reverse_pairs[i].boundary, ends),
            "forward_cd": torch.bucketize(boundaries.forward_pairs[j].boundary, ends) - 1,
            "reverse_preservation": k,
            "forward_preservation": n,
        }
        teacher = partial(self.students.teacher, conditioning)
        reverse = partial(self.students.reverse_model, conditioning)
        forward = partial(self.students.forward_model, conditioning)
        plans: dict[str, Plan] = {
            "reverse_cd": consistency_plan(reverse(w), teacher(w), data, boundaries.reverse_pairs[i], huber_c=c),
            "forward_cd": consistency_plan(forward(1.0), teacher(1.0), data, boundaries.forward_pairs[j], huber_c=c),
            "reverse_preservation": preservation_plan(
                forward(1.0), reverse(1.0), data, boundaries.reverse_preservation[k], huber_c=c
            ),
            "forward_preservation": preservation_plan(
                reverse(1.0), forward(1.0), data, boundaries.forward_preservation[n], huber_c=c
            ),
        }
        return together({name: plan for name, plan in plans.items() if name in self.weights}, evaluate_joined)

    def recipe(self) -> dict[str, Any]:
        """Segments and losses; which students they train follows."""
        return {
            "boundaries": list(self.boundaries.boundary_timesteps),
            "losses": self.weights,
            "guidance_scales": list(self.guidance_scales),
            "huber_c": self.huber_c,
            "caption_dropout": self.caption_dropout,
        }

    def export(self, folder: Path) -> None:
        """Write `forward/` and `reverse/`, which plain diffusers loads, a card in each, and `kohya/` for others."""
        ends = list(self.boundaries.boundary_timesteps)
        settings = {
            "family": self.family.model,
            **self.recipe(),
            "steps": self.global_step,
            "optimizer": asdict(self.optimizer_settings),
            "seed": self.seed,
        }
        metadata = {"boundaries": ends, "family": self.family.model}
        for adapter in self.trained:
            direction = ADAPTERS[adapter]
            save_student(self.students, adapter, folder / direction, metadata=metadata)
            save_kohya(self.students, adapter, folder / "kohya" / f"{direction}.safetensors", metadata=metadata)
            write_student_card(folder / direction, direction, self.boundaries, self.students.lora, settings)
