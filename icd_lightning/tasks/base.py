"""What all training tasks share: optimizer, clipping, guards, and checkpoints without frozen weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from icd_lightning.data.batch import Batch
from icd_lightning.data.decoding import EMBEDS, Sample, collate
from icd_lightning.diffusion import Draws
from icd_lightning.models.conditioning import Conditioning, Framing
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.sharding import shard
from icd_lightning.models.text import Conditioner
from icd_lightning.models.weights import check_fit, not_finite

log = logging.getLogger(__name__)

AGAIN = "write them again with `icd data cache-latents`"


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW; each parameter group is clipped to the norm `clip` by itself (None: not at all).

    `kind: adamw8bit` keeps its two averages in a byte for each weight instead of four: on a GPU, with bitsandbytes.
    A step whose gradients are not finite is skipped; after `max_skipped_steps` of them, resumed runs included, the
    training ends. Under 16-mixed the gradient scaler skips steps instead, as a part of its work, and none is counted.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    kind: Literal["adamw", "adamw8bit"] = "adamw"
    max_skipped_steps: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr {self.lr} must be positive and finite")
        check_not_negative("weight_decay", self.weight_decay)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must be 0 or more and less than 1")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip {self.clip} must be positive and finite; null turns clipping off")
        if min(self.warmup_steps, self.max_skipped_steps) < 0:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and max_skipped_steps {self.max_skipped_steps} must be 0 or more"
            )
        for name, known in (("decay", ("constant", "cosine")), ("kind", ("adamw", "adamw8bit"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")

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


def drop_captions(captions: Sequence[str], share: float, draws: Draws) -> list[str]:
    """The captions, this share of them empty; without a share nothing is drawn."""
    if share == 0:
        return list(captions)
    drawn = draws.uniform(len(captions)).tolist()
    return ["" if number < share else caption for number, caption in zip(drawn, captions, strict=True)]


def check_guidance_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """The w to draw from, or ValueError."""
    if not scales or not all(0 <= scale < math.inf for scale in scales):
        raise ValueError(
            f"guidance_scales {list(scales or ())} must be 0 (unconditional; 1 is unguided) or more, and at least one"
        )
    return tuple(scales)


def check_not_negative(name: str, value: float) -> float:
    """A finite number of 0 or more, or ValueError."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} {value} must be 0 or more, and finite")
    return value


def check_share(name: str, value: float) -> float:
    """A share of samples, of which some remain, or ValueError."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} {value} must be 0 or more and less than 1")
    return value


def _check_made_by(batch: Batch, part: str, ours: str, near: str) -> None:
    """Raise ValueError if what the data hold of the batch was made by another network than this family's."""
    if others := {of["moments"][part] for of in batch.metadata} - {ours}:
        what = {"autoencoder": "latents", "text_encoder": "captions"}[part]
        raise ValueError(
            f"{near}: the data's {what} were encoded by {part} {min(others)}, but this family's is {ours}: {AGAIN}"
        )


def _embeds(batch: Batch) -> dict[str, Tensor]:
    """The embeddings that the data hold, by name."""
    return {name: values for name in EMBEDS if (values := getattr(batch, name)) is not None}


class Task(lightning.LightningModule):
    """A LightningModule with one AdamW. Subclasses name their networks, parameter groups and loss."""

    def __init__(self, optimizer: OptimizerSettings = OptimizerSettings(), seed: int = 0) -> None:
        super().__init__()
        self.optimizer_settings = optimizer
        self.seed = seed
        self.steps_per_batch = 1
        self.skipped_steps = 0
        self._batch_keys: list[str] = []
        self._micro_batches: list[dict[str, Tensor]] = []

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, by a group's name; each group is clipped by itself."""
        return {"network": list(self.trained_parameters().values())}

    def diffusion_models(self) -> list[DiffusionModel]:
        return []

    def check_strategy(self, strategy: Strategy) -> None:
        """ValueError for one that cannot train this; asked before processes are started."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.check_strategy(self.trainer.strategy)
            # each process has frozen weights of its own; DDP would send them at the start, and buffers at every step
            frozen = dict([*self.named_parameters(), *self.named_buffers()]).keys() - self.trained_parameters().keys()
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen)
        if hasattr(self, "family") and hasattr(self.trainer.datamodule, "decoder"):
            self._look_at(self.trainer.datamodule.examples, self.trainer.datamodule.decoder.resolution)

    def _look_at(self, examples: Sequence[Sample], pixels: int) -> None:
        """Refuse data that do not fit; let go of the text side where they hold all that it would be asked for."""
        self.family.check_side(pixels)
        for sample in examples:
            if sample.moments is not None:
                self.check_encoded(collate([sample]), sample.name)
        if examples and all(sample.text for sample in examples):
            vars(self).pop("_text_side", None)  # `check_encoded` read it; a prompt to encode would have it read again
        else:
            _ = self.conditioner  # what is wrong with it is told of before the training begins

    def configure_model(self) -> None:
        """Under ShardedStrategy, spread the networks over its devices."""
        if self.device_mesh is None:
            return
        for model in self.diffusion_models():
            shard(model, self.device_mesh["data_parallel"])
        if unspread := next((n for n, p in self.trained_parameters().items() if not isinstance(p, DTensor)), None):
            raise ValueError(
                f"{type(self).__name__} trains more than its networks ({unspread}, ...), which this strategy cannot "
                "spread: take strategy ddp"
            )

    def configure_optimizers(self) -> dict:
        settings = self.optimizer_settings
        if half := next((n for n, p in self.trained_parameters().items() if p.dtype != torch.float32), None):
            raise ValueError(
                f"{half} would be trained in half precision, which loses small steps, under trainer.precision "
                f"{self.trainer.precision}: take bf16-mixed, and family.precision for frozen weights"
            )
        groups = [{"params": parameters, "name": name} for name, parameters in self.parameter_groups().items()]
        # with fp16 a fused one would unscale gradients by itself, after we clip them
        optimizer = settings.build(groups, fused=self.trainer.precision != "16-mixed")
        total = self.total_steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: settings.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def total_steps(self) -> float:
        """Optimizer steps until the training ends; infinite where nothing ends it."""
        batches = self.trainer.estimated_stepping_batches  # or max_steps, if that is less
        most = self.trainer.max_steps if self.trainer.max_steps >= 0 else math.inf
        return min(most, batches * self.steps_per_batch) if batches >= 0 else math.inf

    def on_train_start(self) -> None:
        """Let the configuration's optimizer settings apply to a run that goes on, whose checkpoint holds the old."""
        if self.trainer.ckpt_path is None:
            return
        settings = self.optimizer_settings
        for optimizer in self.trainer.optimizers:
            self._check_averages(optimizer)
        for scheduler in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            scheduler.base_lrs = [settings.lr] * len(scheduler.base_lrs)
            for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = settings.lr * factor(scheduler.last_epoch)
                group["betas"], group["weight_decay"] = settings.betas, settings.weight_decay

    def _check_averages(self, optimizer: torch.optim.Optimizer) -> None:
        """ValueError if AdamW's state, as a checkpoint held it, is not of these parameters, or not finite."""
        if self.optimizer_settings.kind != "adamw":  # eight bits have another form
            return
        whole = (item for item in optimizer.state.items() if not isinstance(item[0], DTensor))
        for parameter, values in whole:
            for name, value in values.items():
                fits = isinstance(value, Tensor) and value.shape in ((), parameter.shape)
                if not (fits and value.isfinite().all() and (name == "exp_avg" or (value >= 0).all())):
                    raise ValueError(
                        f"{name} of the checkpoint's optimizer is of another shape, or not finite: name another "
                        "ckpt_path, or give ckpt_path null to begin anew"
                    )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Remember whose gradients these are."""
        self._batch_keys = list(getattr(batch, "keys", ()))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip each group by itself: here gradients are whole (accumulated, unscaled, summed over ranks)."""
        for group in optimizer.param_groups:
            if all(parameter.grad is None for parameter in group["params"]):
                continue  # after each loss one student steps: the other's norm is no 0
            limit = self.optimizer_settings.clip or math.inf
            norm = torch.nn.utils.clip_grad_norm_(group["params"], limit)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            self.log(f"grad_norm/{group['name']}", norm)
            self.log(f"learning_rate/{group['name']}", group["lr"])
            # a gradient scaler (16-mixed) expects infinite gradients, and skips the step by itself
            if self.trainer.precision != "16-mixed" and not norm.isfinite():
                self._skip_step(optimizer)
                return

    def _skip_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take all gradients away, which leaves weights and averages as they are; all ranks come here together."""
        optimizer.zero_grad(set_to_none=True)
        self.skipped_steps += 1
        keys = ", ".join(self._batch_keys)
        log.warning("step %d skipped: a gradient is not finite; samples %s", self.trainer.global_step, keys)
        self.log("train/skipped_steps", float(self.skipped_steps))
        if self.skipped_steps > self.optimizer_settings.max_skipped_steps:
            raise ValueError(
                f"{self.skipped_steps} steps had gradients that are not finite, the last one with samples {keys}: look "
                "at these, take a smaller lr or precision bf16-mixed; optimizer.max_skipped_steps says how many may be"
            )

    def test_step(self, batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def draws(self) -> Draws:
        # not total_batch_idx: that counts a batch twice which was interrupted and is trained on again after a resume
        return self._draws(self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)

    @property
    def conditioner(self) -> Conditioner:
        """The family's frozen text side, read when it is first asked for, on this device; no part of the module."""
        with torch.inference_mode(False):  # a validation may be the first to ask, also after the device has changed
            return self._text_side.to(self.device)

    @cached_property
    def _text_side(self) -> Conditioner:
        return self.family.load_conditioner()

    @cached_property
    def _text_encoder(self) -> str:
        return self.conditioner.fingerprint

    @cached_property
    def _no_prompt(self) -> Conditioning:
        with torch.inference_mode(False):
            return self.conditioner.unconditional(1)

    def unconditional(self, framing: Framing) -> Conditioning:
        """What stands for no prompt beside pictures framed so; encoded once, and kept without the text side."""
        one = {name: values.to(self.device) for name, values in self._no_prompt.tensors.items()}
        empty = Conditioning(**one).repeat(len(framing.metadata))  # on the device: from the host goes a single one
        return empty.replace(time_ids=framing.time_ids().to(self.device)) if "time_ids" in one else empty

    def check_encoded(self, batch: Batch, near: str) -> None:
        """ValueError unless what the data hold of a batch is what this family's own encoders give."""
        _check_made_by(batch, "autoencoder", self.autoencoder.fingerprint, near)
        (_, *found), side = batch.moments.shape, batch.metadata[0]["moments"]["resolution"]
        channels, factor = self.autoencoder.latent_channels, self.autoencoder.downsampling
        # an encoder may give a variance too, and buckets have no more pixels than a square
        if found[0] not in (channels, 2 * channels) or not side**2 / 2 < found[1] * found[2] * factor**2 <= side**2:
            raise ValueError(
                f"{near}: the data's latents are {found}, which pictures of {side} pixels never give here, where they "
                f"have {channels} or {2 * channels} channels, and their sides are {factor} times smaller: {AGAIN}"
            )
        if batch.prompt_embeds is not None:
            _check_made_by(batch, "text_encoder", self._text_encoder, near)
            held, given = (
                {name: list(values.shape[1:]) for name, values in embeds.items()}
                for embeds in (_embeds(batch), self._no_prompt.embeds())
            )
            if held != given:
                raise ValueError(
                    f"{near}: the data's embeddings are {held}, and this family's text encoder gives {given}: {AGAIN}"
                )

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """Latents (B, C, h, w) to train on: encoded from the batch's images, or drawn from moments encoded before."""
        if batch.moments is None:
            return self.autoencoder.encode(batch.images, normal=draws.normal)
        self.check_encoded(batch, batch.keys[0])
        return self.autoencoder.sample(batch.moments, normal=draws.normal)

    def conditioning(self, batch: Batch, framing: Framing) -> Conditioning:
        """Of the batch's captions: encoded, or as they were encoded before; one left empty is no prompt."""
        if batch.prompt_embeds is None:
            return self.conditioner(batch.captions, framing)
        empty = self.unconditional(framing)
        encoded = empty.replace(**_embeds(batch))
        if all(batch.captions):
            return encoded
        captioned = torch.tensor([caption != "" for caption in batch.captions], device=batch.prompt_embeds.device)
        return encoded.where(captioned, empty)

    def encoded(self, batch: Batch, draws: Draws) -> tuple[Tensor, Conditioning, Framing]:
        """The latents (B, C, h, w), the conditioning of the captions, and how the pictures are framed."""
        latents = self.latents(batch, draws)
        framing = Framing.of_latents(batch.metadata, latents, self.autoencoder.downsampling)
        return latents, self.conditioning(batch, framing), framing

    def validation_draws(self, batch_idx: int) -> Draws:
        """The same random numbers for this batch in every validation."""
        return self._draws(-1 - batch_idx)

    def _draws(self, step: int) -> Draws:
        place = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        return Draws(self.seed, step, **place, device=self.device)

    def log_losses(self, total: Tensor, losses: dict[str, Tensor]) -> None:
        """Log `train/loss` to the progress bar and each part as `train/<name>`, over all samples of a step."""
        self._micro_batches.append({name: value.detach() for name, value in {"loss": total, **losses}.items()})
        if len(self._micro_batches) < self.trainer.accumulate_grad_batches and not self.trainer.is_last_batch:
            return  # Lightning would log the last micro-batch's alone
        names = list(self._micro_batches[0])
        means = torch.stack([torch.stack([values[name] for name in names]) for values in self._micro_batches]).mean(0)
        means = self.trainer.strategy.reduce(means, reduce_op="mean")  # over ranks, in one message
        for name, mean in zip(names, means, strict=True):
            self.log(f"train/{name}", mean, prog_bar=name == "loss")
        self._micro_batches = []

    def recipe(self) -> dict[str, Any]:
        """What a run that goes on must share with its checkpoint, since it says what is learned; plain values."""
        return {}

    def about(self) -> dict[str, Any]:
        made = {"steps": self.global_step, "optimizer": self._plain_settings(), "seed": self.seed}
        return {"family": self.family.model, **self.recipe(), **made}

    def check_recipe(self, checkpoint: dict) -> None:
        """ValueError if the checkpoint was trained for something else; a changed optimizer is told of."""
        ours = self.recipe()
        saved = {**ours, **checkpoint.get("recipe", {})}
        if "process" in ours and self.process.is_of(saved["process"]):  # older checkpoints tell less of it
            saved["process"] = ours["process"]
        if other := [f"{name} {saved[name]} (here {ours[name]})" for name in ours if saved[name] != ours[name]]:
            raise ValueError(
                f"the checkpoint of this run was trained with {', '.join(other)}: give this training another "
                "trainer.default_root_dir, or ckpt_path null"
            )
        now = self._plain_settings()
        before = checkpoint.get("optimizer_settings", now)
        if now["kind"] != before.get("kind", now["kind"]):
            raise ValueError(
                f"the checkpoint of this run holds the averages of optimizer.kind {before['kind']}, which "
                f"{now['kind']} cannot go on with: keep {before['kind']}, or give ckpt_path null"
            )
        for name in now:
            if now[name] != before.get(name):
                log.warning("optimizer.%s was %s, and goes on as %s", name, before.get(name), now[name])

    # Frozen weights come from their own files, so checkpoints leave them out.

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["recipe"] = self.recipe()
        checkpoint["optimizer_settings"] = self._plain_settings()
        checkpoint["skipped_steps"] = self.skipped_steps
        trained, wrong = self.trained_parameters(), None
        for key in ("state_dict", "current_model_state"):  # the second is the weight averaging callback's
            if key in checkpoint:
                checkpoint[key] = {name: value for name, value in checkpoint[key].items() if name in trained}
                wrong = wrong or not_finite(checkpoint[key].items())
        if wrong := self.trainer.strategy.broadcast(wrong):  # of spread weights the first process alone has the whole
            raise ValueError(
                f"{wrong} is not finite after step {checkpoint['global_step']}, so nothing is saved: the "
                "checkpoint before is whole; go on from it with a smaller lr, or precision bf16-mixed"
            )

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Complete the checkpoint with the frozen weights at hand; anything missing or unknown is an error."""
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self.check_recipe(checkpoint)
            self.skipped_steps = checkpoint.get("skipped_steps", 0)
        parameters, saved = self.trained_parameters(), checkpoint["state_dict"]
        if wrong := not_finite(saved.items()):
            raise ValueError(f"the checkpoint holds {wrong}, which is not finite: go on from another, or begin anew")
        check_fit(saved, parameters, "the checkpoint", "this task, its model and its LoRA rank")
        frozen = {name: value for name, value in self.state_dict().items() if name not in parameters}
        for key in ("state_dict", "current_model_state"):
            if key in checkpoint:
                checkpoint[key] = {**frozen, **checkpoint[key]}

    def _plain_settings(self) -> dict[str, Any]:
        """The optimizer's settings as a checkpoint and a card hold them."""
        return {**asdict(self.optimizer_settings), "betas": list(self.optimizer_settings.betas)}
