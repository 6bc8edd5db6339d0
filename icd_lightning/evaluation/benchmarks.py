"""What each benchmark makes a method do with a batch of examples: to noise and back, generate, edit.

A benchmark is a function of a method and a batch that yields an `Outcome` for each decoding, so that what several
decodings share, such as the way to noise, is done once. Whatever is random depends on the examples' keys.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from icd_lightning.diffusion import GuidanceSchedule, Step, StepGuidance, ddim_invert
from icd_lightning.editing.baselines.base import Baseline
from icd_lightning.editing.baselines.ddim import DDIMInversion
from icd_lightning.editing.method import UNGUIDED, EditingMethod, PictureMethod, seeded_noise
from icd_lightning.evaluation.examples import Example, stack
from icd_lightning.metrics.latents import LatentNLL

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Outcome:
    """Results (B, 3, R, R) of one decoding; evaluations and seconds of one picture, and further `values` (B,)."""

    decoding: str
    images: Tensor
    nfe: int
    seconds: float
    values: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Clock:
    """Counts evaluations and seconds since it was made; `count` is what methods take as `on_step`."""

    device: torch.device
    nfe: int = 0

    def __post_init__(self) -> None:
        self.start = self._now()

    def count(self, step: Step) -> None:
        """Add the evaluations of one step."""
        self.nfe += step.nfe

    def seconds(self) -> float:
        """Passed so far, with all work of a GPU done."""
        return self._now() - self.start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Bench:
    """A method at its resolution, on its device, with the seed of the run."""

    method: PictureMethod
    resolution: int
    seed: int = 0
    device: torch.device = field(default=CPU)

    def images(self, batch: Sequence[Example]) -> Tensor:
        """The batch's pictures (B, 3, R, R)."""
        return stack(batch, self.resolution).to(self.device)

    def seeds(self, batch: Sequence[Example]) -> list[int]:
        """The examples' seeds."""
        return [example.seed(self.seed) for example in batch]


def inversion(bench: Bench, batch: Sequence[Example], guidances: Mapping[str, GuidanceSchedule]) -> Iterator[Outcome]:
    """To noise once, unguided, and back under each guidance (Tables 2 and 5; the MSE of Fig. 4).

    A method that fits itself to its guidance on the way to noise goes there for each.
    """
    images, prompts = bench.images(batch), [example.caption for example in batch]
    fitted = {bench.method: guidances}
    if isinstance(bench.method, Baseline) and bench.method.fits_guidance:
        fitted = {bench.method.guided_by(guidance): {name: guidance} for name, guidance in guidances.items()}
    for method, under in fitted.items():
        clock = Clock(bench.device)
        noise = method.invert(images, prompts, seed=bench.seeds(batch), on_step=clock.count)
        found = {"": (noise, clock.nfe, clock.seconds())}
        yield from _decoded(replace(bench, method=method), images, prompts, found, under)


def guided_inversion(
    bench: Bench, batch: Sequence[Example], guidances: Mapping[str, GuidanceSchedule]
) -> Iterator[Outcome]:
    """To noise by DDIM under each guidance, and back from each of these noises under each guidance (Table 1)."""
    method = bench.method
    if not isinstance(method, DDIMInversion):
        raise ValueError(f"guided encoding is measured on DDIM inversion, not on {type(method).__name__}")
    images, prompts, noises = bench.images(batch), [example.caption for example in batch], {}
    latents = method.autoencoder.encode(images)
    for name, guidance in guidances.items():
        clock = Clock(bench.device)
        denoise = method.denoiser(prompts, guidance)
        noise = ddim_invert(denoise, latents, method.timesteps, method.schedule, on_step=clock.count)
        noises[f"encoder {name}, decoder "] = (noise, clock.nfe, clock.seconds())
    yield from _decoded(bench, images, prompts, noises, guidances)


def _decoded(
    bench: Bench,
    images: Tensor,
    prompts: Sequence[str],
    inverted: Mapping[str, tuple[Any, int, float]],
    guidances: Mapping[str, GuidanceSchedule],
) -> Iterator[Outcome]:
    """Whatever pictures were inverted to, with the evaluations and seconds that it cost, under each guidance."""
    latents = bench.method.autoencoder.encode(images)
    for prefix, (inversion, nfe, seconds) in inverted.items():
        for name, guidance in guidances.items():
            clock = Clock(bench.device)
            result = bench.method.generate(prompts, inversion, guidance=guidance, on_step=clock.count)
            total = (seconds + clock.seconds()) / len(images)
            values = {
                "latent_mse": (bench.method.autoencoder.encode(result) - latents).square().mean((1, 2, 3)),
                "nll": LatentNLL().values(getattr(inversion, "noise", inversion)),
            }
            yield Outcome(prefix + name, result, nfe + clock.nfe, total, values)


def generation(bench: Bench, batch: Sequence[Example], guidances: Mapping[str, GuidanceSchedule]) -> Iterator[Outcome]:
    """From drawn noise, by the captions (Table 4)."""
    prompts, method = [example.caption for example in batch], bench.method
    if not isinstance(method, EditingMethod):
        raise ValueError(f"{type(method).__name__} edits pictures and makes none from drawn noise; choose icd or ddim")
    shape = method.latent_shape(len(batch), bench.resolution, bench.resolution)
    noise = seeded_noise(shape, bench.seeds(batch), bench.device)
    for name, guidance in guidances.items():
        clock = Clock(bench.device)
        images = method.generate(prompts, noise, guidance=guidance, on_step=clock.count)
        yield Outcome(name, images, clock.nfe, clock.seconds() / len(batch))


def editing(bench: Bench, batch: Sequence[Example], settings: Mapping[str, Mapping[str, Any]]) -> Iterator[Outcome]:
    """Edit towards the target captions; settings: name -> options of the method's `edit`."""
    images = bench.images(batch)
    sources, targets = [example.caption for example in batch], [example.target for example in batch]
    known = inspect.signature(bench.method.edit).parameters
    words = {"blended_words": [example.blended_words for example in batch]} if "blended_words" in known else {}
    for name, options in settings.items():
        clock = Clock(bench.device)
        result = bench.method.edit(
            images, sources, targets, seed=bench.seeds(batch), on_step=clock.count, **options, **words
        )
        yield Outcome(name, result, clock.nfe, clock.seconds() / len(batch))


# --- decodings --------------------------------------------------------------------------------------------------------


def step_guidances(guidance_scale: float, taus: Sequence[float]) -> dict[str, GuidanceSchedule]:
    """Unguided, then guided for t <= tau T with each tau, 1 being guided throughout."""
    named = {guidance_name(guidance_scale, tau): StepGuidance(guidance_scale, tau) for tau in taus}
    return {"w 1": UNGUIDED, **named}


def guidance_name(guidance_scale: float, tau: float) -> str:
    """As tables call it: "w 3", "w 3, tau 0.8"."""
    return f"w {guidance_scale:g}" + (f", tau {tau:g}" if tau < 1 else "")
