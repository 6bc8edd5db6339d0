"""One training step of stage 2 in three forms: ours, in the reference's style, and by the reference's own functions.

Each form is a class that is built from a `Setting` and called with a step's number. All train both students by the four
losses on the same kind of batch.
"""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from icd_lightning.data.batch import Batch
from icd_lightning.diffusion import Boundaries, DDIMJump, Draws, NoisedData
from icd_lightning.diffusion.calls import alone
from icd_lightning.diffusion.losses import consistency_plan, preservation_plan
from icd_lightning.models.diffusion_model import compile_networks
from icd_lightning.models.family import Family
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents
from icd_lightning.tasks.invertible_consistency import InvertibleConsistencyDistillation

BOUNDARIES = (259, 519, 779, 999)
GUIDANCE_SCALES = (1.0, 8.0, 12.0, 16.0, 20.0)
HUBER_C, PRESERVATION_WEIGHT, LR, CLIP = 0.001, 1.5, 8e-6, 1.0
CAPTION = "a large red circle left of a small blue ring on a green checkered background"


@dataclass(frozen=True)
class Setting:
    """What is trained: a family, so many pictures with latents of `latent` x `latent`, the LoRA rank; where and how."""

    family: str = "tiny"
    batch: int = 16
    latent: int = 8
    rank: int = 16
    device: str = "cpu"
    precision: str = "float32"
    checkpointing: bool = False
    compiled: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)

    def load_family(self) -> Family:
        """The frozen parts, in the precision of the setting."""
        return Family(self.family, precision=self.precision)

    def autocast(self) -> torch.autocast:
        """Off in float32."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)


class Ours:
    """The task itself: one UNet, latents and text from disk, ten evaluations in five calls, one backward pass."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.task = InvertibleConsistencyDistillation(
            setting.load_family(),
            partial(
                LoraStudents,
                lora=LoraSettings(setting.rank, setting.rank),
                gradient_checkpointing=setting.checkpointing,
            ),
            boundaries=Boundaries(BOUNDARIES),
            guidance_scales=GUIDANCE_SCALES,
        ).to(setting.device)
        autoencoder, conditioner = self.task.autoencoder, self.task.conditioner
        made_by = {"autoencoder": autoencoder.fingerprint, "text_encoder": conditioner.fingerprint}
        made_by["resolution"] = setting.latent * autoencoder.downsampling
        channels = autoencoder.latent_channels
        moments = torch.zeros(setting.batch, channels * _moments(autoencoder), setting.latent, setting.latent)
        self.batch = Batch(
            None,
            [CAPTION] * setting.batch,
            [""] * setting.batch,
            [{"moments": made_by, **_framing(setting, autoencoder)}] * setting.batch,
            moments.to(setting.device),
            **{name: embeds.float() for name, embeds in conditioner([CAPTION] * setting.batch).embeds().items()},
        )
        for part in (autoencoder, conditioner):  # what they make comes from disk: they wait for validation
            part.to("cpu")
        if setting.compiled:
            compile_networks(self.networks(), torch.device(setting.device))
        self.loss, self.share = self._loss, {}
        groups = self.task.parameter_groups()
        self.optimizer = torch.optim.AdamW([{"params": group} for group in groups.values()], lr=LR, fused=True)

    def __call__(self, number: int) -> None:
        with self.setting.autocast():
            loss = self.loss(self.batch, Draws(0, number, device=self.setting.device, **self.share))
        loss.backward()
        for group in self.optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _loss(self, batch: Batch, draws: Draws) -> Tensor:
        losses = self.task.evaluate(self.task.losses, self.task.inputs(batch, draws), draws)
        return sum(self.task.losses[name].weight * loss.values.mean() for name, loss in losses.items())

    def networks(self) -> list[nn.Module]:
        """The UNets it holds."""
        return [self.task.students.network]

    def modules(self) -> list[nn.Module]:
        """All networks that it keeps where it computes."""
        return [self.task.students]

    def distribute(self) -> None:
        """Train together with the other processes of torch.distributed's group, each on a batch of its own."""
        self.share = {"rank": torch.distributed.get_rank(), "world_size": torch.distributed.get_world_size()}
        self.task.forward = self._loss  # what DistributedDataParallel calls
        self.loss = nn.parallel.DistributedDataParallel(self.task, init_sync=False)  # weights are of one seed


class ReferenceStyle:
    """Three UNets, prompts and pictures encoded in each iteration, four backward passes and optimizer steps."""

    def __init__(self, setting: Setting) -> None:
        self.setting, family = setting, setting.load_family()
        self.process = family.load_process().to(setting.device)
        self.autoencoder = family.load_autoencoder().to(setting.device)
        self.conditioner = family.load_conditioner().to(setting.device)
        self.model = family.load_model(guided=True)
        self.teacher = self.model.network.to(setting.device)
        self.students, self.optimizers = {}, {}
        targets = list(self.model.backbone.lora_targets)
        for direction in DIRECTIONS:
            unet = copy.deepcopy(self.teacher).float()
            unet.add_adapter(LoraConfig(r=setting.rank, lora_alpha=setting.rank, target_modules=targets))
            self.students[direction] = unet
            trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
            self.optimizers[direction] = torch.optim.AdamW(trained, lr=LR)
        self.boundaries = Boundaries((0, *BOUNDARIES))
        size = setting.latent * self.autoencoder.downsampling
        self.images = torch.zeros(setting.batch, 3, size, size, device=setting.device)

    def __call__(self, number: int) -> None:
        count, options = self.setting.batch, {"huber_c": HUBER_C}
        draws = Draws(0, number, device=self.setting.device)
        latents = self.autoencoder.encode(self.images, normal=draws.normal)
        conditioning = self.conditioner([CAPTION] * count)
        data = NoisedData(latents, draws.normal(*latents.shape), self.process)
        w = draws.choice(count, GUIDANCE_SCALES)
        jump, ends = partial(self._jump, conditioning), self.boundaries
        for direction, guidance in (("reverse", w), ("forward", 1.0)):
            pairs = ends.pairs[direction][draws.integers(count, len(ends.pairs[direction]))]
            student, solver = jump(direction, guidance), jump("teacher", guidance)
            self._step(direction, consistency_plan(student, solver, data, pairs, **options), 1.0)
        for direction, other in (("forward", "reverse"), ("reverse", "forward")):
            trips = ends.trips[direction][draws.integers(count, ends.num_segments)]
            away, back = jump(other, 1.0), jump(direction, 1.0)
            self._step(direction, preservation_plan(away, back, data, trips, **options), PRESERVATION_WEIGHT)

    def _jump(self, conditioning: Any, role: str, guidance: float | Tensor) -> DDIMJump:
        model = replace(self.model, network=self.students.get(role, self.teacher))
        denoise = model.denoiser(conditioning, guidance)
        return DDIMJump(denoise, self.process, set_alpha_to_one=role != "teacher")

    def _step(self, direction: str, loss: Any, weight: float) -> None:
        with self.setting.autocast():
            value = weight * alone(loss).mean()
        value.backward()
        nn.utils.clip_grad_norm_(self.students[direction].parameters(), CLIP)
        self.optimizers[direction].step()
        self.optimizers[direction].zero_grad(set_to_none=True)

    def networks(self) -> list[nn.Module]:
        """The UNets it holds."""
        return [self.teacher, *self.students.values()]

    def modules(self) -> list[nn.Module]:
        """All networks that it keeps where it computes."""
        return [*self.networks(), self.conditioner, self.autoencoder]


def reference_code(checkout: Path) -> tuple[ModuleType, ModuleType]:
    """The reference's modules `lcm` and `train`."""
    folder = checkout / "training"
    if not (folder / "src" / "train.py").is_file():
        raise ValueError(f"--peer {checkout} has no training/src/train.py: give a checkout of the reference's code")
    sys.path.insert(0, str(folder))
    from src import lcm, train

    return lcm, train


class Peer(ReferenceStyle):
    """The four step functions of the reference's own code, from a checkout of it, on the networks of another step.

    They know of epsilon prediction alone. A network that predicts v is timed as if it predicted epsilon: its losses
    mean nothing, its arithmetic is the same.
    """

    def __init__(self, style: ReferenceStyle, checkout: Path) -> None:
        vars(self).update(vars(style))
        lcm, self.functions = reference_code(checkout)
        alphas_cumprod = self.process.alphas.square()
        self.solver = lcm.DDIMSolver(
            alphas_cumprod.cpu().numpy(),
            timesteps=1000,
            ddim_timesteps=50,
            num_endpoints=len(BOUNDARIES),
            num_forward_endpoints=len(BOUNDARIES),
            endpoints=",".join(map(str, (0, *BOUNDARIES[:-1]))),
            forward_endpoints=",".join(map(str, BOUNDARIES)),
        ).to(self.setting.device)
        self.args = SimpleNamespace(
            num_ddim_timesteps=50,
            embed_guidance=True,
            loss_type="huber",
            huber_c=HUBER_C,
            max_grad_norm=CLIP,
            start_forward_timestep=19,
            forward_preserve_loss_coef=PRESERVATION_WEIGHT,
            reverse_preserve_loss_coef=PRESERVATION_WEIGHT,
        )
        self.accelerator = SimpleNamespace(
            backward=lambda loss: loss.backward(), sync_gradients=True, clip_grad_norm_=nn.utils.clip_grad_norm_
        )
        config = SimpleNamespace(num_train_timesteps=1000, prediction_type="epsilon")
        self.noise_scheduler = SimpleNamespace(
            config=config, alphas_cumprod=alphas_cumprod, add_noise=self.process.add_noise
        )
        self.no_schedule = SimpleNamespace(step=lambda: None)

    def __call__(self, number: int) -> None:
        count, device = self.setting.batch, self.setting.device
        draws = Draws(0, number, device=device)
        latents = self.autoencoder.encode(self.images, normal=draws.normal)
        embeds = self.conditioner([CAPTION] * count).tensors["prompt_embeds"]
        noise = draws.normal(*latents.shape)
        w = torch.tensor(random.choices([w - 1 for w in GUIDANCE_SCALES], k=count), device=device).view(-1, 1, 1, 1)
        first = (self.args, self.accelerator, latents, noise, embeds, embeds, {})
        reverse, forward = self.students["reverse"], self.students["forward"]
        last = {
            direction: (self.noise_scheduler, optimizer, self.no_schedule, self.setting.dtype, device)
            for direction, optimizer in self.optimizers.items()
        }
        none = torch.zeros_like(w)
        with self.setting.autocast():
            self.functions.reverse_train_step(*first, reverse, self.teacher, self.solver, w, *last["reverse"])
            self.functions.forward_train_step(*first, forward, self.teacher, self.solver, none, *last["forward"])
            both = (*first, forward, reverse, self.solver, w, none)
            self.functions.forward_preserve_train_step(*both, *last["forward"])
            self.functions.reverse_preserve_train_step(*both, *last["reverse"])


def _moments(autoencoder: Any) -> int:
    """2 where the autoencoder has a posterior: mean and log-variance."""
    return 2 if "quant_conv" in dict(autoencoder.vae.named_children()) else 1


def _framing(setting: Setting, autoencoder: Any) -> dict[str, tuple[int, int]]:
    size = setting.latent * autoencoder.downsampling
    return {"original_size": (size, size), "crop_top_left": (0, 0)}
