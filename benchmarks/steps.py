"""One training step of stage 2 in three forms: ours, in the reference's style, and by the reference's own functions.

Each form is a class that is built from a `Setting` and called with a step's number. All train both students by the four
losses on the same kind of batch.
"""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from icd_lightning.data.batch import Batch
from icd_lightning.diffusion import Boundaries, NoisedData, consistency, preservation
from icd_lightning.models.backbone import guided_denoiser
from icd_lightning.models.family import Family
from icd_lightning.models.students import ADAPTERS, LoraSettings
from icd_lightning.tasks.base import Draws
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
            BOUNDARIES,
            guidance_scales=GUIDANCE_SCALES,
            lora=LoraSettings(setting.rank, setting.rank),
        ).to(setting.device)
        autoencoder, conditioner = self.task.autoencoder, self.task.conditioner
        made_by = {"autoencoder": autoencoder.fingerprint, "text_encoder": conditioner.fingerprint}
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
        self.losses, self.share = self.task.losses, {}
        groups = self.task.parameter_groups()
        self.optimizer = torch.optim.AdamW([{"params": group} for group in groups.values()], lr=LR, fused=True)

    def __call__(self, number: int) -> None:
        with self.setting.autocast():
            losses = self.losses(self.batch, Draws(0, number, device=self.setting.device, **self.share))
            total = sum(self.task.weights[name] * loss.mean() for name, loss in losses.items())
        total.backward()
        for group in self.optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def networks(self) -> list[nn.Module]:
        """The UNets it holds."""
        return [self.task.students.unet]

    def modules(self) -> list[nn.Module]:
        """All networks that it keeps where it computes."""
        return [self.task.students]

    def distribute(self) -> None:
        """Train together with the other processes of torch.distributed's group, each on a batch of its own."""
        self.share = {"rank": torch.distributed.get_rank(), "world_size": torch.distributed.get_world_size()}
        self.task.forward = self.task.losses  # what DistributedDataParallel calls
        self.losses = nn.parallel.DistributedDataParallel(self.task, init_sync=False)  # weights are of one seed


class ReferenceStyle:
    """Three UNets, prompts and pictures encoded in each iteration, four backward passes and optimizer steps."""

    def __init__(self, setting: Setting) -> None:
        self.setting, family = setting, setting.load_family()
        self.process = family.load_process().to(setting.device)
        self.autoencoder = family.load_autoencoder().to(setting.device)
        self.conditioner = family.load_conditioner().to(setting.device)
        self.teacher = family.load_unet(guided=True).to(setting.device)
        self.students, self.optimizers = {}, {}
        for adapter in ADAPTERS:
            unet = copy.deepcopy(self.teacher).float()
            unet.add_adapter(LoraSettings(setting.rank, setting.rank).config())
            self.students[adapter] = unet
            trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
            self.optimizers[adapter] = torch.optim.AdamW(trained, lr=LR)
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
        ends, segments = self.boundaries, self.boundaries.num_segments
        denoiser = partial(self._denoiser, conditioning)
        reverse_pairs = ends.reverse_pairs[draws.integers(count, len(ends.reverse_pairs))]
        self._step("cd", lambda: consistency(denoiser("cd", w), denoiser(None, w), data, reverse_pairs, **options), 1.0)
        forward_pairs = ends.forward_pairs[draws.integers(count, len(ends.forward_pairs))]
        self._step(
            "fcd", lambda: consistency(denoiser("fcd", 1.0), denoiser(None, 1.0), data, forward_pairs, **options), 1.0
        )
        down = ends.forward_preservation[draws.integers(count, segments)]
        self._step(
            "fcd",
            lambda: preservation(denoiser("cd", 1.0), denoiser("fcd", 1.0), data, down, **options),
            PRESERVATION_WEIGHT,
        )
        up = ends.reverse_preservation[draws.integers(count, segments)]
        self._step(
            "cd",
            lambda: preservation(denoiser("fcd", 1.0), denoiser("cd", 1.0), data, up, **options),
            PRESERVATION_WEIGHT,
        )

    def _denoiser(self, conditioning: Any, adapter: str | None, guidance: float | Tensor) -> Any:
        unet = self.teacher if adapter is None else self.students[adapter]
        return guided_denoiser(unet, self.process, conditioning, guidance)

    def _step(self, adapter: str, loss: Any, weight: float) -> None:
        with self.setting.autocast():
            value = weight * loss().mean()
        value.backward()
        nn.utils.clip_grad_norm_(self.students[adapter].parameters(), CLIP)
        self.optimizers[adapter].step()
        self.optimizers[adapter].zero_grad(set_to_none=True)

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
        alphas_cumprod = self.process.alphas_cumprod.cpu()
        self.solver = lcm.DDIMSolver(
            alphas_cumprod.numpy(),
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
            config=config, alphas_cumprod=self.process.alphas_cumprod, add_noise=self.process.add_noise
        )
        self.no_schedule = SimpleNamespace(step=lambda: None)

    def __call__(self, number: int) -> None:
        count, device = self.setting.batch, self.setting.device
        draws = Draws(0, number, device=device)
        latents = self.autoencoder.encode(self.images, normal=draws.normal)
        embeds = self.conditioner([CAPTION] * count).prompt_embeds
        noise = draws.normal(*latents.shape)
        w = torch.tensor(random.choices([w - 1 for w in GUIDANCE_SCALES], k=count), device=device).view(-1, 1, 1, 1)
        first = (self.args, self.accelerator, latents, noise, embeds, embeds, {})
        reverse, forward = self.students["cd"], self.students["fcd"]
        last = {
            adapter: (self.noise_scheduler, optimizer, self.no_schedule, self.setting.dtype, device)
            for adapter, optimizer in self.optimizers.items()
        }
        none = torch.zeros_like(w)
        with self.setting.autocast():
            self.functions.reverse_train_step(*first, reverse, self.teacher, self.solver, w, *last["cd"])
            self.functions.forward_train_step(*first, forward, self.teacher, self.solver, none, *last["fcd"])
            self.functions.forward_preserve_train_step(*first, forward, reverse, self.solver, w, none, *last["fcd"])
            self.functions.reverse_preserve_train_step(*first, forward, reverse, self.solver, w, none, *last["cd"])


def _moments(autoencoder: Any) -> int:
    """2 where the autoencoder has a posterior: mean and log-variance."""
    return 2 if "quant_conv" in dict(autoencoder.vae.named_children()) else 1


def _framing(setting: Setting, autoencoder: Any) -> dict[str, tuple[int, int]]:
    size = setting.latent * autoencoder.downsampling
    return {"original_size": (size, size), "crop_top_left": (0, 0)}
