"""ReNoise (arXiv:2403.14602): invert a sampler step by fixed-point iteration, for samplers of few and large steps.

A step up from x_s should use the network's eps at the point x_t that it leads to. ReNoise asks at an estimate of x_t,
steps from x_s again, and so on; averages the last predictions; keeps their statistics those of noise; and, where the
sampler draws noise, corrects it towards what would bring x_s back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from icd_lightning.diffusion import VP, OnStep, Split, Step, ddim_timesteps, falling, lcm_timesteps, trailing_timesteps
from icd_lightning.editing.baselines.base import Baseline, Inversion
from icd_lightning.editing.baselines.parts import LCM_SOLVER_TIMESTEPS, Parts, has_guided_network
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.editing.method import Seed, seeded_noise, seeds_of
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.family import Family

log = logging.getLogger(__name__)

EARLY_TIMESTEP = 250
"""Steps from below here, the first on the way up, have fewer re-noisings and an average of their own."""


@dataclass(frozen=True)
class Sampler:
    """The sampler to invert: "ddim" draws no noise, "ancestral" (Turbo) what DDPM would, "lcm" all there is.

    "jumps" are iCD's: they draw none either, and go from boundary to boundary (`timesteps`, ascending) to the data.
    """

    kind: Literal["ddim", "ancestral", "lcm", "jumps"]
    num_inference_steps: int
    timesteps: tuple[int, ...] = ()

    @property
    def draws(self) -> bool:
        return self.kind in ("ancestral", "lcm")

    @property
    def steps(self) -> list[tuple[int, int]]:
        """(t, s) on the way down."""
        if self.kind == "jumps":
            return falling(self.timesteps)
        if self.kind == "lcm":
            return falling(lcm_timesteps(self.num_inference_steps, LCM_SOLVER_TIMESTEPS))
        return falling((ddim_timesteps if self.kind == "ddim" else trailing_timesteps)(self.num_inference_steps))


@dataclass(frozen=True)
class Renoising:
    """Re-noisings of a step and which predictions count, [first, last): the average of those, or else the last alone.

    Prediction 0 is plain inversion's, at x_s; each re-noising makes one more. `early_*` are for steps from t < 250,
    the first on the way up.
    """

    count: int = 9
    average: tuple[int, int] = (8, 10)
    early_count: int = 5
    early_average: tuple[int, int] = (0, 5)

    def __post_init__(self) -> None:
        if min(self.count, self.early_count) < 0:
            raise ValueError(f"re-noisings {self.count} and {self.early_count} must be 0 or more")


@dataclass(frozen=True)
class Regularization:
    """How predictions are made noise-like again: patches like the reference's, and no auto-correlation.

    The weights are published for latents of 64 x 64. A mean's gradient falls with the area, so that for others, where
    one step would be too long or too short, the weight of the auto-correlation grows with it.
    """

    rounds: int = 4
    rolls: int = 5
    patch_weight: float = 0.065
    correlation_weight: float = 20.0

    def __call__(self, eps: Tensor, reference: Tensor, rolls: Sequence[torch.Generator]) -> Tensor:
        """Descend both losses from eps (B, C, h, w); rolls are drawn from each sample's own generator."""
        rate = self.correlation_weight / self.rolls * eps[0, 0].numel() / 64**2
        for _ in range(self.rounds):
            gradient = _gradient(lambda x: patch_divergence(x, reference), eps)
            eps = eps - self.patch_weight * gradient.clamp(-100, 100)
            for _ in range(self.rolls):
                shifts = [_draw_rolls(eps.shape[-2], generator) for generator in rolls]
                gradient = _gradient(lambda x, shifts=shifts: auto_correlation(x, shifts), eps)
                eps = eps - rate * gradient
        return eps


TURBO, RENOISING, REGULARIZATION = Sampler("ancestral", 4), Renoising(), Regularization()


class ReNoise(Baseline):
    """Evaluations of a step up: 1 + its re-noisings, 1 to regularise, 1 to correct; of a step down: 1.

    Turbo's 4 + 4 steps take 44 calls of the network, as published. In four of them a second sample rides along, the
    regulariser's reference, so that 48 samples are counted. SDXL's 50 + 50 with one re-noising take 150;
    there predictions are regularised at t < 250 alone, where they are averaged, and 163 are counted.

    tiny has no Turbo and no LCM. There, and in all families that hold iCD's students, both settings invert the reverse
    student instead: it too makes a picture in 3 or 4 large steps. They keep their re-noisings; the steps are the
    student's jumps, which draw no noise, so that nothing is corrected.

    `regularization` is of the averaged prediction. `correction` is how far (L2) the noise of a step may move to bring
    the step back, from 0 to infinity, which is exact; the authors take ten gradient steps of 1.8.
    """

    needs = VP

    def __init__(
        self,
        parts: Parts,
        *,
        sampler: Sampler = TURBO,
        renoising: Renoising = RENOISING,
        regularization: Regularization | None = REGULARIZATION,
        correction: float = 18.0,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__(parts, guidance_scale)
        if not sampler.draws and correction:
            raise ValueError(f"a {sampler.kind} sampler draws no noise that could be corrected: set correction to 0")
        self.sampler, self.renoising, self.steps = sampler, renoising, sampler.steps
        self.regularization, self.correction = regularization, correction
        self.uses_students = sampler.kind == "jumps"

    @classmethod
    def from_family(
        cls,
        family: Family,
        *,
        sampler: Sampler = TURBO,
        students: Mapping[str, str | None] | None = None,
        **settings: Any,
    ) -> ReNoise:
        """Load what the sampler is for: the teacher (ddim), or the family's few-step network."""
        if not sampler.draws or not has_guided_network(family):
            return cls(Parts.load(family, few_step=sampler.draws), sampler=sampler, **settings)
        log.info("%s is no Turbo or LCM; iCD's reverse student stands in for one", family.model)
        icd = InvertibleConsistency.from_pretrained(family, **(students or {}))
        parts = Parts.of(icd.students.model, icd.autoencoder, icd.conditioner)
        parts = replace(parts, predict=partial(icd.students.predict, "reverse"))
        ends = icd.boundaries.boundary_timesteps[1:]
        return cls(parts, sampler=Sampler("jumps", len(ends), ends), **{**settings, "correction": 0.0})

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Climb the sampler's steps, unguided; per_step holds the noise (B, C, h, w) that its steps draw."""
        batch, *size = x0.shape
        reference, *drawn = seeded_noise((batch, 1 + len(self.steps), *size), seed, x0.device).unbind(1)
        rolls = [torch.Generator().manual_seed(one) for one in seeds_of(seed, batch)]
        source, x = self.conditioner(prompts), x0
        for index in reversed(range(len(self.steps))):
            t, s = self.steps[index]
            noised = self.process.add_noise(x0, reference, t)
            x, drawn[index], nfe = self._climb(x, drawn[index], index, source, noised, rolls)
            if on_step is not None:
                on_step(Step(s, t, x, nfe))
        return Inversion(prompts, x0, x, drawn)

    def _climb(self, below, noise, index, source, noised, rolls) -> tuple[Tensor, Tensor, int]:
        """From x_s (B, C, h, w), `below`, to x_t; with the step's noise corrected, and its evaluations."""
        t, s = self.steps[index]
        how = self._how(t, s)
        count, (first, last) = self.renoising.count, self.renoising.average
        if t < EARLY_TIMESTEP:
            count, (first, last) = min(count, self.renoising.early_count), self.renoising.early_average
        regularizes = self.regularization is not None and first <= count
        bare, x, predictions = below - how["noise_std"] * noise, below, []

        def up(eps: Tensor) -> Tensor:  # what the step down undoes at the same eps
            x0 = self.process.x0_from_eps(bare, eps, s, **how)
            return self.process.mix(x0, eps, t, set_alpha_to_one=how["set_alpha_to_one"])

        def regular(eps: Tensor) -> Tensor:
            return self.regularization(eps, reference, rolls) if regularizes else eps

        for i in range(count + 1):
            if i == 0 and regularizes:  # one call for both
                reference, eps = self.parts.eps(torch.cat([noised, x]), t, source.repeat(2)).chunk(2)
            else:
                eps = self.parts.eps(x, t, source)
            predictions.append(eps)
            x = up(eps if i < first else regular(eps))
        if averaged := predictions[first:last]:
            x = up(regular(torch.stack(averaged).mean(0)))
        if self.correction:
            noise = self._corrected(noise, x, below, index, source)
        return x, noise, len(predictions) + regularizes + bool(self.correction)

    def _corrected(self, noise: Tensor, x: Tensor, below: Tensor, index: int, source: Conditioning) -> Tensor:
        t, s = self.steps[index]
        eps, how = self.parts.eps(x, t, source), self._how(t, s)
        if s == 0:  # no noise is drawn here; the evaluation is in the published count
            return noise
        gap = (below - self.process.ddim_step(x, eps, t, s, **how)) / how["noise_std"] - noise
        length = torch.linalg.vector_norm(gap, dim=(1, 2, 3), keepdim=True)
        return noise + gap * (self.correction / length).clamp(max=1)

    def _how(self, t: int, s: int) -> dict[str, Any]:
        """Options of a step from t to s, without the noise that it draws: its deviation (1, 1, 1, 1), and what 0 is."""
        std = self.process.sigma(s) if self.sampler.draws else torch.zeros_like(self.process.sigma(s))
        if self.sampler.kind == "ancestral":
            std = self.process.posterior_std(t, s)
        return {"noise_std": std, "set_alpha_to_one": self.sampler.kind != "ddim"}

    def negative(self, index: int, inversion: Inversion, source: Conditioning, empty: Conditioning) -> Conditioning:
        """The source prompt, which matters where the edit is guided by a network that does not take w as an input."""
        return source

    def move(self, x: Tensor, split: Split, index: int, inversion: Inversion) -> Tensor:
        t, s = self.steps[index]
        how = self._how(t, s)
        noise = how["noise_std"] * inversion.per_step[index]
        return self.process.ddim_step(x, split.eps, t, s, **how) + noise.repeat(len(x) // len(noise), 1, 1, 1)


def patch_divergence(x: Tensor, reference: Tensor, size: int = 4) -> Tensor:
    """How the patches' means and variances differ from the reference's, (B,) of x and reference (B, C, h, w).

    Twice the divergence of two Gaussians, for each channel of each patch of size x size, in absolute value, summed.
    Latents narrower than that are cut into smaller patches; a single number has no variance, and no divergence.
    """
    size = min(size, *x.shape[2:])
    if size == 1:
        return x.new_zeros(len(x))

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        patches = x.unfold(2, size, size).unfold(3, size, size).flatten(4)
        return patches.mean(-1), patches.var(-1) + 1e-6

    (mean, variance), (wanted_mean, wanted_variance) = statistics(x), statistics(reference)
    divergence = (wanted_variance / variance).log() + (variance + (mean - wanted_mean) ** 2) / wanted_variance - 1
    return divergence.abs().sum((1, 2, 3))


def auto_correlation(x: Tensor, rolls: Sequence[Sequence[int]]) -> Tensor:
    """Squared correlation (B,) of x (B, C, h, w) with itself, rolled along either side, at each scale down to 8.

    rolls: for each sample, how far at each scale. The authors roll every channel by its own amount.
    """
    losses = []
    for sample, amounts in zip(x, rolls, strict=True):
        level, loss = sample, x.new_zeros(())
        for place, amount in enumerate(amounts):
            level = avg_pool2d(level, 2) if place else level
            for side in (1, 2):
                loss = loss + (level * level.roll(amount, side)).mean((1, 2)).square().sum()
        losses.append(loss)
    return torch.stack(losses)


def _draw_rolls(height: int, generator: torch.Generator) -> list[int]:
    """How far to roll at each scale of a latent: height, height / 2 ... down to 8."""
    sides = [height]
    while sides[-1] > 8:
        sides.append(sides[-1] // 2)
    return [int(torch.randint(0, max(side // 2, 1), (1,), generator=generator)) for side in sides]


def _gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(x).sum(), x)[0]
