"""What the tiny family must be able to do before students are distilled from it, measured on held-out scenes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icd_lightning.diffusion import NoisedData, StepGuidance, squared_error
from icd_lightning.editing.baselines.ddim import DDIMInversion
from icd_lightning.editing.method import seeded_noise
from icd_lightning.evaluation.examples import Example, stack
from icd_lightning.evaluation.runs import batches
from icd_lightning.metrics.reconstruction import psnr
from icd_lightning.models.family import Family
from icd_lightning.models.sources import shipped
from icd_lightning.progress import progress
from icd_lightning.tiny.benchmarks import scene_examples
from icd_lightning.tiny.scene_network import SceneNetwork, attribute_accuracy, label_tensor

GUIDANCE_SCALES = (1.0, 2.0, 3.0, 5.0)
TEACHER_BARS = {"object color": 0.95, "background color": 0.97, "object shape": 0.70, "background texture": 0.85}
BATCH_SIZE = 64


@dataclass(frozen=True)
class Bar:
    """A measured value and the least that it must be; None is reported only."""

    name: str
    value: float
    limit: float | None = None

    @property
    def passed(self) -> bool:
        return self.limit is None or self.value >= self.limit


@torch.no_grad()
def measure_family(family: Family, *, count: int, seed: int) -> list[Bar]:
    """All bars of a tiny family on the first `count` scenes of the world `seed`; no stage 1, none of its bars."""
    scenes = scene_examples(count, seed)
    own = family.root / "scene_network"
    network = SceneNetwork.from_pretrained(own if own.is_dir() else shipped() / "scene_network")
    teacher = DDIMInversion(family)
    bars = [*autoencoder_bars(teacher, scenes), *_teacher_bars(teacher, network, scenes)]
    return bars if teacher.model.takes_guidance else [*bars, *stage_one_bars(family, teacher, scenes)]


def _each(scenes: Sequence[Example], label: str) -> Iterator[tuple[int, Tensor, list[str]]]:
    """Batches with a bar on the terminal: place of the first, pictures, captions."""
    parts = batches(scenes, BATCH_SIZE)
    for number, part in enumerate(progress(parts, label, len(parts))):
        yield number * BATCH_SIZE, stack(part, 64), [example.caption for example in part]


def autoencoder_bars(teacher: DDIMInversion, scenes: Sequence[Example]) -> list[Bar]:
    """How much the autoencoder alone loses, and how its latents are spread."""
    values, latents = [], []
    for _, images, _ in _each(scenes, "autoencoder"):
        latents.append(teacher.autoencoder.encode(images))
        values.append(psnr(teacher.autoencoder.decode(latents[-1]), images))
    joined = torch.cat(latents).transpose(0, 1).flatten(1)
    return [
        Bar("autoencoder: PSNR (dB)", float(torch.cat(values).mean()), 31.0),
        Bar("autoencoder: largest absolute mean of a latent channel", float(joined.mean(1).abs().max())),
        Bar("autoencoder: smallest standard deviation of a latent channel", float(joined.std(1).min())),
        Bar("autoencoder: largest standard deviation of a latent channel", float(joined.std(1).max())),
    ]


def _teacher_bars(teacher: DDIMInversion, network: SceneNetwork, scenes: Sequence[Example]) -> list[Bar]:
    """What the scene network reads in true scenes and in the teacher's pictures; how near DDIM-50 comes back."""
    true, made, encoded, back = [], [], [], []
    for first, images, prompts in _each(scenes, "teacher"):
        true.append(network.read(images))
        noise = seeded_noise(teacher.latent_shape(len(images), 64, 64), first)
        made.append(network.read(teacher.generate(prompts, noise, guidance=StepGuidance(3.0))))
        encoded.append(teacher.invert(images, prompts))
        result = teacher.generate(prompts, encoded[-1])
        back.append(psnr(result, teacher.autoencoder.decode(teacher.autoencoder.encode(images))))
    labels, bars = label_tensor([example.picture for example in scenes]), []
    for name, share in attribute_accuracy(torch.cat(true), labels).items():
        bars.append(Bar(f"scene network on true scenes: {name} right", float(share), 0.97))
    for name, share in attribute_accuracy(torch.cat(made), labels).items():
        bars.append(Bar(f"teacher, DDIM-50 at w 3: {name} right", float(share), TEACHER_BARS.get(name)))
    spread = torch.cat(encoded).std((0, 2, 3))
    return [
        *bars,
        Bar(
            "DDIM-50 to noise and back at w 1: PSNR (dB) against the autoencoder's", float(torch.cat(back).mean()), 35.0
        ),
        Bar("DDIM-50 to noise: smallest standard deviation of a channel", float(spread.min())),
        Bar("DDIM-50 to noise: largest standard deviation of a channel", float(spread.max())),
    ]


def stage_one_bars(family: Family, teacher: DDIMInversion, scenes: Sequence[Example]) -> list[Bar]:
    """Mean squared errors of the network's output (eps or v) at uniform timesteps, against the guided teacher."""
    student, process = family.load_model(guided=True), teacher.process
    errors: dict[float, list[Tensor]] = {w: [] for w in GUIDANCE_SCALES}
    ignoring: dict[float, list[Tensor]] = {w: [] for w in GUIDANCE_SCALES}
    for first, images, prompts in _each(scenes, "stage 1"):
        latents, count = teacher.autoencoder.encode(images), len(images)
        conditioning, unconditional = teacher.conditioner(prompts), teacher.conditioner.unconditional(count)
        generator = torch.Generator().manual_seed(first // BATCH_SIZE)
        t = torch.randint(process.num_train_timesteps, (count,), generator=generator)
        x = NoisedData(latents, seeded_noise(latents.shape, first), process).at(t)

        def output(denoise, x=x, t=t):
            return process.target(*denoise(x, t), t)

        plain = output(teacher.model.denoiser(conditioning, 1.0, unconditional))
        for w in GUIDANCE_SCALES:
            target = output(teacher.model.denoiser(conditioning, w, unconditional))
            errors[w].append(squared_error(output(student.denoiser(conditioning, w)), target))
            ignoring[w].append(squared_error(plain, target))
    means = {w: float(torch.cat(errors[w]).mean()) for w in GUIDANCE_SCALES}
    bars = [Bar("stage 1: error at w 1", means[1.0])]
    for w in GUIDANCE_SCALES[1:]:
        share = means[w] / float(torch.cat(ignoring[w]).mean())
        bars.append(Bar(f"stage 1: error at w {w:g}, as a share of the error of ignoring w", share))
    return bars
