"""What all training tasks share: optimizer, clipping, reproducible draws, and checkpoints without frozen weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from icd_lightning.data.batch import Batch
from icd_lightning.models.conditioning import Conditioning, Framing
from icd_lightning.models.sharding import shard_unets


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW; each parameter group is clipped to the norm `clip` by itself (None: not at all).

    `kind: adamw8bit` keeps its two averages in a byte for each weight instead of four: on a GPU, with bitsandbytes.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    kind: Literal["adamw", "adamw8bit"] = "adamw"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr {self.lr} must be positive")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip {self.clip} must be positive; null turns clipping off")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be 0 or more")
        if self.decay not in ("constant", "cosine"):
            raise ValueError(f"decay {self.decay!r} is not one of constant, cosine")
        if self.kind not in ("adamw", "adamw8bit"):
            raise ValueError(f"kind {self.kind!r} is not one of adamw, adamw8bit")

    def factor(self, step: int, total: float) -> float:
        """The learning rate at `step` of `total` (infinite: the cosine never falls), as a share of lr."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def build(self, groups: list[dict], *, fused: bool) -> torch.optim.Optimizer:
        """The optimizer of these parameter groups, on the device where they lie."""
        shared = {"lr": self.lr, "betas": self.betas, "weight_decay": self.weight_decay}
        if self.kind == "adamw":
            return torch.optim.AdamW(groups, fused=fused, **shared)
        parameters = [parameter for group in groups for parameter in group["params"]]
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            raise ValueError("optimizer kind adamw8bit cannot be spread over devices: take adamw, or strategy ddp")
        if any(not parameter.is_cuda for parameter in parameters):
            raise ValueError("optimizer kind adamw8bit needs a CUDA GPU: take adamw")
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(
                f"optimizer kind adamw8bit needs bitsandbytes ({error}): pip install bitsandbytes, or take adamw"
            ) from error
        return AdamW8bit(groups, **shared)


class Draws:
    """Random numbers of one training step, a pure function of (seed, step) for the joined batch of all ranks.

    Each rank draws the whole and keeps its share, so that N processes see what one process with the joined batch
    would see, and a resumed run sees what an unbroken one would have seen.
    """

    def __init__(self, seed: int, step: int, *, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"):
        state = np.random.SeedSequence((seed, step % 2**64)).generate_state(1, np.uint64)[0]
        self.generator = torch.Generator().manual_seed(int(state))  # on the CPU: the same numbers on any device
        self.rank, self.world_size, self.device = rank, world_size, device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float32; the first dimension is this rank's batch size."""
        return self._share(torch.randn(shape[0] * self.world_size, *shape[1:], generator=self.generator))

    def integers(self, count: int, high: int) -> Tensor:
        """Uniform over 0 ... high - 1, long (count,)."""
        return self._share(torch.randint(high, (count * self.world_size,), generator=self.generator))

    def uniform(self, count: int) -> Tensor:
        """Uniform over [0, 1), float32 (count,)."""
        return self._share(torch.rand(count * self.world_size, generator=self.generator))

    def choice(self, count: int, values: Iterable[float]) -> Tensor:
        """One of `values` for each sample, float32 (count,)."""
        options = torch.tensor(list(values), dtype=torch.float32)
        return options.to(self.device)[self.integers(count, len(options))]

    def _share(self, joined: Tensor) -> Tensor:
        return joined.chunk(self.world_size)[self.rank].to(self.device, non_blocking=True)


def drop_captions(captions: Sequence[str], share: float, draws: Draws) -> list[str]:
    """The captions, this share of them empty; without a share nothing is drawn."""
    if share == 0:
        return list(captions)
    drawn = draws.uniform(len(captions)).tolist()
    return ["" if number < share else caption for number, caption in zip(drawn, captions, strict=True)]


def check_guidance_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """The w to draw from, or ValueError."""
    if not scales or min(scales) < 0:
        raise ValueError(
            f"guidance_scales {list(scales)} must be 0 (unconditional; 1 is unguided) or more, and at least one"
        )
    return tuple(scales)


def check_weight(name: str, value: float) -> float:
    """What a loss is weighed by, or ValueError."""
    if value < 0:
        raise ValueError(f"{name} {value} must be 0 or more")
    return value


def _check_made_by(batch: Batch, part: str, ours: str) -> None:
    """Raise ValueError if what the data hold of the batch was made by another network than this family's."""
    if others := {of["moments"][part] for of in batch.metadata} - {ours}:
        what = {"autoencoder": "latents", "text_encoder": "captions"}[part]
        raise ValueError(
            f"the data's {what} were encoded by {part} {min(others)}, but this family's is {ours}: "
            "write them again with `icd data cache-latents`"
        )


class Task(lightning.LightningModule):
    """A LightningModule with one AdamW. Subclasses name their parameter groups and their loss."""

    def __init__(self, optimizer: OptimizerSettings = OptimizerSettings(), seed: int = 0) -> None:
        super().__init__()
        self.optimizer_settings = optimizer
        self.seed = seed

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, by name; each group is clipped by itself."""
        return {"network": [p for p in self.parameters() if p.requires_grad]}

    def configure_model(self) -> None:
        """Under ShardedStrategy, spread the networks over its devices."""
        if self.device_mesh is None:
            return
        shard_unets(self, self.device_mesh["data_parallel"])
        if whole := [n for n, p in self.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]:
            raise ValueError(
                f"{type(self).__name__} trains more than UNets ({whole[0]}, ...), which this strategy cannot spread: "
                "take strategy ddp"
            )

    def configure_optimizers(self) -> dict:
        settings = self.optimizer_settings
        if low := next((n for n, p in self.named_parameters() if p.requires_grad and p.dtype != torch.float32), None):
            raise ValueError(
                f"{low} would be trained in half precision, which loses small steps, under trainer.precision "
                f"{self.trainer.precision}: take bf16-mixed, and family.precision for frozen weights"
            )
        groups = [{"params": parameters, "name": name} for name, parameters in self.parameter_groups().items()]
        # with fp16 a fused one would unscale gradients by itself, after we clip them
        optimizer = settings.build(groups, fused=self.trainer.precision != "16-mixed")
        total = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: settings.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip each group by itself: here gradients are whole (accumulated, unscaled, summed over ranks)."""
        for group in optimizer.param_groups:
            limit = self.optimizer_settings.clip or math.inf
            norm = torch.nn.utils.clip_grad_norm_(group["params"], limit)
            self.log(f"grad_norm/{group['name']}", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def test_step(self, batch, batch_idx: int) -> None:
        """As validation, on the data module's test set."""
        self.validation_step(batch, batch_idx)

    def draws(self) -> Draws:
        """The random numbers of this micro-batch."""
        # not total_batch_idx: that counts a batch twice which was interrupted and is trained on again after a resume
        step = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        return Draws(
            self.seed, step, rank=self.trainer.global_rank, world_size=self.trainer.world_size, device=self.device
        )

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """Latents (B, C, h, w) to train on: encoded from the batch's images, or drawn from moments encoded before."""
        if batch.moments is None:
            return self.autoencoder.encode(batch.images, normal=draws.normal)
        _check_made_by(batch, "autoencoder", self.autoencoder.fingerprint)
        return self.autoencoder.sample(batch.moments, normal=draws.normal)

    def conditioning(self, batch: Batch, framing: Framing) -> Conditioning:
        """Of the batch's captions: encoded, or as they were encoded before; one left empty is no prompt."""
        if batch.prompt_embeds is None:
            return self.conditioner(batch.captions, framing)
        _check_made_by(batch, "text_encoder", self.conditioner.fingerprint)
        kept = Conditioning.framed(batch.prompt_embeds, batch.pooled_prompt_embeds, framing)
        if all(batch.captions):
            return kept
        said = torch.tensor([caption != "" for caption in batch.captions], device=batch.prompt_embeds.device)
        return kept.where(said, self.conditioner.unconditional(len(said), framing))

    def validation_draws(self, batch_idx: int) -> Draws:
        """The same random numbers for this batch in every validation."""
        return Draws(
            self.seed,
            -1 - batch_idx,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            device=self.device,
        )

    def log_losses(self, total: Tensor, losses: dict[str, Tensor]) -> None:
        """Log `train/loss` to the progress bar and each part as `train/<name>`."""
        self.log("train/loss", total.detach(), prog_bar=True)
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()})

    def recipe(self) -> dict[str, Any]:
        """What a run that goes on must share with its checkpoint, since it says what is learned; plain values."""
        return {}

    def check_recipe(self, checkpoint: dict) -> None:
        """ValueError if the checkpoint was trained for something else."""
        ours = self.recipe()
        saved = checkpoint.get("recipe", ours)
        if other := [f"{name} {saved.get(name)} (here {ours[name]})" for name in ours if saved.get(name) != ours[name]]:
            raise ValueError(
                f"the checkpoint of this run was trained with {', '.join(other)}: give this training another "
                "trainer.default_root_dir, or ckpt_path null"
            )

    # Frozen weights come from their own files, so checkpoints leave them out.

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep what was trained, and what for."""
        checkpoint["recipe"] = self.recipe()
        trained = self._trained_keys()
        for key in ("state_dict", "current_model_state"):  # the second is the weight averaging callback's
            if key in checkpoint:
                checkpoint[key] = {name: value for name, value in checkpoint[key].items() if name in trained}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Complete the checkpoint with the frozen weights at hand; anything missing or unknown is an error."""
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self.check_recipe(checkpoint)
        trained, found = self._trained_keys(), checkpoint["state_dict"].keys()
        shapes = {name: parameter.shape for name, parameter in self.named_parameters()}
        other = {name for name in trained & found if checkpoint["state_dict"][name].shape != shapes[name]}
        if wrong := sorted((trained ^ found) | other):
            raise ValueError(
                f"checkpoint does not fit this task: {len(trained - found)} trained tensors missing, "
                f"{len(found - trained)} unknown, {len(other)} of another shape, e.g. {wrong[0]}; "
                "was it made with another model or LoRA rank?"
            )
        frozen = {name: value for name, value in self.state_dict().items() if name not in trained}
        for key in ("state_dict", "current_model_state"):
            if key in checkpoint:
                checkpoint[key] = {**frozen, **checkpoint[key]}

    def _trained_keys(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}
