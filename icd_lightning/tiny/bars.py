"""What the tiny family must be able to do before students are distilled from it, measured on held-out scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from icd_lightning.diffusion import NoisedData, StepGuidance, squared_error
from icd_lightning.editing.baselines.ddim import DDIMInversion
from icd_lightning.editing.method import seeded_noise
from icd_lightning.metrics.reconstruction import psnr
from icd_lightning.models.backbone import cfg_denoiser, guided_denoiser
from icd_lightning.models.family import Family
from icd_lightning.tiny.attributes import attribute_accuracy, label_tensor
from icd_lightning.tiny.measuring import batches, held_out, images_of, measure_generation
from icd_lightning.tiny.scene_network import SceneNetwork
from icd_lightning.tiny.scenes import Scene

GUIDANCE_SCALES = (1.0, 2.0, 3.0, 5.0)
TEACHER_BARS = {"object color": 0.95, "background color": 0.97, "object shape": 0.70, "background texture": 0.85}


@dataclass(frozen=True)
class Bar:
    """A measured value and its limit: at least, or else at most; None is reported only."""

    name: str
    value: float
    limit: float | None = None
    at_least: bool = True

    @property
    def passed(self) -> bool:
        """True also where there is no limit."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@torch.no_grad()
def measure_family(family: Family, *, count: int, seed: int, batch_size: int = 64) -> list[Bar]:
    """All bars of a tiny family on the first `count` scenes of the world `seed`."""
    scenes = held_out(count, seed)
    network = SceneNetwork.from_pretrained(family.root / "scene_network")
    teacher = DDIMInversion(family)
    return [
        *_autoencoder(teacher, scenes, batch_size),
        *_scene_network(network, scenes, batch_size),
        *_teacher(teacher, network, scenes, batch_size),
        *_inversion(teacher, scenes, batch_size),
        *stage_one_bars(family, teacher, scenes, batch_size),
    ]


def _autoencoder(teacher: DDIMInversion, scenes: Sequence[Scene], batch_size: int) -> list[Bar]:
    values, latents = [], []
    for part in batches(scenes, batch_size):
        images = images_of(part)
        latents.append(teacher.autoencoder.encode(images))
        values.append(psnr(teacher.autoencoder.decode(latents[-1]), images))
    joined = torch.cat(latents).transpose(0, 1).flatten(1)
    return [
        Bar("autoencoder: PSNR (dB)", float(torch.cat(values).mean()), 31.0),
        Bar("autoencoder: largest absolute mean of a latent channel", float(joined.mean(1).abs().max())),
        Bar("autoencoder: smallest standard deviation of a latent channel", float(joined.std(1).min())),
        Bar("autoencoder: largest standard deviation of a latent channel", float(joined.std(1).max())),
    ]


def _scene_network(network: SceneNetwork, scenes: Sequence[Scene], batch_size: int) -> list[Bar]:
    found = torch.cat([network.read(images_of(part)) for part in batches(scenes, batch_size)])
    accuracy = attribute_accuracy(found, label_tensor(scenes))
    return [Bar(f"scene network on true scenes: {name} right", float(v), 0.97) for name, v in accuracy.items()]


def _teacher(teacher: DDIMInversion, network: SceneNetwork, scenes: Sequence[Scene], batch_size: int) -> list[Bar]:
    accuracy = measure_generation(teacher, network, scenes, StepGuidance(3.0), batch_size=batch_size)
    return [
        Bar(f"teacher, DDIM-50 at w 3: {name} right", value, TEACHER_BARS.get(name)) for name, value in accuracy.items()
    ]


def _inversion(teacher: DDIMInversion, scenes: Sequence[Scene], batch_size: int) -> list[Bar]:
    values = []
    for part in batches(scenes, batch_size):
        images, prompts = images_of(part), [scene.caption() for scene in part]
        result = teacher.generate(prompts, teacher.invert(images, prompts))
        values.append(psnr(result, teacher.autoencoder.decode(teacher.autoencoder.encode(images))))
    return [
        Bar(
            "DDIM-50 to noise and back at w 1: PSNR (dB) against the autoencoder's",
            float(torch.cat(values).mean()),
            35.0,
        )
    ]


def stage_one_bars(family: Family, teacher: DDIMInversion, scenes: Sequence[Scene], batch_size: int = 64) -> list[Bar]:
    """Mean squared errors of the network's output (eps or v) at uniform timesteps, against the guided teacher."""
    student, schedule = family.load_unet(guided=True), teacher.schedule
    errors: dict[float, list] = {w: [] for w in GUIDANCE_SCALES}
    ignoring: dict[float, list] = {w: [] for w in GUIDANCE_SCALES}
    for index, part in enumerate(batches(scenes, batch_size)):
        latents, prompts = teacher.autoencoder.encode(images_of(part)), [scene.caption() for scene in part]
        conditioning, unconditional = teacher.conditioner(prompts), teacher.conditioner.unconditional(len(part))
        generator = torch.Generator().manual_seed(index)
        t = torch.randint(schedule.num_train_timesteps, (len(part),), generator=generator)
        x = NoisedData(latents, seeded_noise(latents.shape, index * batch_size), schedule).at(t)

        def output(denoise, x=x, t=t):
            return schedule.output_from_eps(denoise(x, t), x, t)

        plain = output(cfg_denoiser(teacher.unet, schedule, conditioning, unconditional, 1.0))
        for w in GUIDANCE_SCALES:
            target = output(cfg_denoiser(teacher.unet, schedule, conditioning, unconditional, w))
            errors[w].append(squared_error(output(guided_denoiser(student, schedule, conditioning, w)), target))
            ignoring[w].append(squared_error(plain, target))
    means = {w: float(torch.cat(errors[w]).mean()) for w in GUIDANCE_SCALES}
    bars = [Bar("stage 1: error at w 1", means[1.0], 0.003, at_least=False)]
    for w in GUIDANCE_SCALES[1:]:
        share = means[w] / float(torch.cat(ignoring[w]).mean())
        bars.append(
            Bar(f"stage 1: error at w {w:g}, as a share of the error of ignoring w", share, 0.10, at_least=False)
        )
    return bars
