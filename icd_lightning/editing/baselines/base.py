"""What the baselines share: a network not yet bound to prompts, branches of pictures, and the loop down to the data.

A method edits along one branch of pictures, the target's, or two, the source's first: `x` then holds (2 B, C, h, w).
Its file says what `invert` keeps beside the noise and what a step does; all else is here. Methods know no UNet: a
`ConditionalNetwork` is any eps = network(x, t, conditioning).
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from icd_lightning.diffusion import (
    Denoiser,
    GuidanceSchedule,
    NoiseSchedule,
    OnStep,
    Step,
    StepGuidance,
    classifier_free_guidance,
)
from icd_lightning.editing.method import UNGUIDED, PictureMethod, Seed
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt, PromptToPromptControl
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.backbone import predict
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.family import Family
from icd_lightning.models.students import Students
from icd_lightning.models.text import CLIPConditioner, DualCLIPConditioner

log = logging.getLogger(__name__)

Control = PromptToPrompt | Sequence[PromptToPrompt] | Literal["auto"] | None
"""What an edit borrows of attention: for all pictures, for each, as the method does by default, or nothing."""

LCM_SOLVER_TIMESTEPS = range(19, 1000, 20)
"""The 50 steps that latent consistency models were distilled on."""


@dataclass(frozen=True, eq=False)
class ConditionalNetwork:
    """eps (N, C, h, w) = network(x (N, C, h, w), t (N,), conditioning of N): unguided.

    `predict` also takes w (N,). With `takes_guidance` (a guidance-distilled UNet, an LCM) w is an input of the network
    and guiding costs nothing; else w is None, and guiding costs a second evaluation.
    """

    predict: Callable[[Tensor, Tensor, Conditioning, Tensor | None], Tensor]
    takes_guidance: bool = False

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        w = torch.ones_like(t, dtype=torch.float32) if self.takes_guidance else None
        return self.predict(x, t, conditioning, w)

    def cost(self, guidance: GuidanceSchedule, t: int) -> int:
        """Evaluations of one picture at t."""
        return 1 if self.takes_guidance or guidance.at(t) == 1 else 2


@dataclass(frozen=True, eq=False)
class Branch:
    """What B pictures follow: their prompts, the prompts that guidance leads away from, and w(t)."""

    positive: Conditioning
    negative: Conditioning
    guidance: GuidanceSchedule = UNGUIDED


def predict_branches(network: ConditionalNetwork, x: Tensor, t: int, branches: Sequence[Branch]) -> tuple[Tensor, int]:
    """Guided eps (n B, C, h, w) for the n branches joined in x (n B, C, h, w), and its evaluations of one picture.

    All goes through the network at once: first the unconditional halves of the branches that are guided at t, if w is
    no input of the network, and then, as the last n B samples, all branches under their prompts.
    """
    times = torch.full((len(x),), t, dtype=torch.long, device=x.device)
    scales = [branch.guidance.at(t) for branch in branches]
    positive = Conditioning.cat([branch.positive for branch in branches])
    nfe = sum(network.cost(branch.guidance, t) for branch in branches)
    if network.takes_guidance:
        w = torch.tensor(scales, device=x.device).repeat_interleave(len(x) // len(branches))
        return network.predict(x, times, positive, w), nfe
    if nfe == len(branches):
        return network(x, times, positive), nfe
    parts = x.chunk(len(branches))
    guided = [i for i, scale in enumerate(scales) if scale != 1]
    rows = torch.cat([*(parts[i] for i in guided), x])
    told = Conditioning.cat([*(branches[i].negative for i in guided), positive])
    eps = network(rows, torch.full((len(rows),), t, dtype=torch.long, device=x.device), told)
    eps_uncond, eps_cond = eps[: -len(x)].chunk(len(guided)), list(eps[-len(x) :].chunk(len(branches)))
    for i, uncond in zip(guided, eps_uncond, strict=True):
        eps_cond[i] = classifier_free_guidance(uncond, eps_cond[i], scales[i])
    return torch.cat(eps_cond), nfe


@torch.no_grad()
def descend(
    network: ConditionalNetwork,
    x: Tensor,
    steps: Iterable[tuple[int, int]],
    branches: Callable[[int], Sequence[Branch]],
    move: Callable[[Tensor, Tensor, int], Tensor],
    *,
    control: PromptToPromptControl | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Take the joined branches x (n B, C, h, w) down steps (t, s): x = move(x, eps, index), under branches(index).

    A control, attached to the network, ends each step: it knows which one it is by counting.
    """
    for index, (t, s) in enumerate(steps):
        eps, nfe = predict_branches(network, x, t, branches(index))
        x = move(x, eps, index)
        if control is not None:
            x = control.step(x)
        if on_step is not None:
            on_step(Step(t, s, x, nfe))
    return x


@dataclass(frozen=True, eq=False)
class Parts:
    """What a baseline needs of a family: its network, and the ways between pictures, prompts and numbers."""

    network: ConditionalNetwork
    schedule: NoiseSchedule
    autoencoder: LatentAutoencoder
    conditioner: CLIPConditioner | DualCLIPConditioner
    unet: nn.Module

    @classmethod
    def load(cls, family: Family, *, few_step: bool = False) -> Parts:
        """From disk: the teacher, or what makes pictures in few steps.

        A family with a guidance-distilled UNet (tiny; SD1.5 and SDXL for iCD) is no LCM or Turbo, and that UNet stands
        in for one; the folder of an LCM or Turbo in diffusers' layout has but one UNet, and that is it.
        """
        guided = few_step and has_guided_unet(family)
        if guided:
            log.info("%s is no LCM or Turbo; its guidance-distilled UNet stands in for one", family.model)
        return cls.of(
            family.load_unet(guided=guided),
            family.load_schedule(),
            family.load_autoencoder(),
            family.load_conditioner(),
        )

    @classmethod
    def of(
        cls,
        unet: nn.Module,
        schedule: NoiseSchedule,
        autoencoder: LatentAutoencoder,
        conditioner: CLIPConditioner | DualCLIPConditioner,
    ) -> Parts:
        """From loaded parts."""

        def eps(x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
            return schedule.eps_from_output(predict(unet, x, t, conditioning, w), x, t)

        network = ConditionalNetwork(eps, takes_guidance=unet.config.time_cond_proj_dim is not None)
        return cls(network, schedule, autoencoder, conditioner, unet)

    @classmethod
    def of_student(
        cls, students: Students, autoencoder: LatentAutoencoder, conditioner: CLIPConditioner | DualCLIPConditioner
    ) -> Parts:
        """With iCD's reverse student as the network."""

        def eps(x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor) -> Tensor:
            return students.schedule.eps_from_output(students.predict("cd", x, t, conditioning, w), x, t)

        network = ConditionalNetwork(eps, takes_guidance=True)
        return cls(network, students.schedule, autoencoder, conditioner, students.unet)


def has_guided_unet(family: Family) -> bool:
    """Whether a family is one of iCD's, with a guidance-distilled UNet."""
    try:
        family.check()
    except FileNotFoundError:
        return False
    return True


@dataclass(frozen=True, eq=False)
class Inversion:
    """What B pictures became: noise (B, C, h, w) to descend from, and what the method keeps beside it.

    prompts describe the pictures, x0 (B, C, h, w) are their latents, per_step holds one tensor for each step down:
    null embeddings, differences, or noise, as the method's file says.
    """

    prompts: Sequence[str]
    x0: Tensor
    noise: Tensor
    per_step: Sequence[Tensor] = ()


class Baseline(PictureMethod):
    """A training-free editing method: `invert`, `edit`, `nfe`. Pictures are (B, 3, H, W) in [-1, 1].

    `guidance` is any schedule of w, and `control` what a target's branch borrows of its source's attention (None:
    nothing); by default both are the method's own. `seed` is of the first picture, or a seed for each. `on_step` is
    called after each step with the evaluations that it took of one picture (see `diffusion.sampling`).
    """

    few_step: ClassVar[bool] = False
    """Made for an LCM or Turbo; otherwise for the teacher."""
    needs_source: ClassVar[bool] = False
    """Descends along the source's branch too where no attention is borrowed."""

    steps: Sequence[tuple[int, int]]
    """(t, s) of an edit's way down."""
    inversion_nfe: int
    """Evaluations of one picture on its way to noise, at most."""

    def __init__(self, parts: Parts, guidance_scale: float, control: PromptToPrompt | None = None) -> None:
        self.parts, self.guidance, self.control = parts, StepGuidance(guidance_scale), control
        self.autoencoder, self.conditioner = parts.autoencoder, parts.conditioner

    @classmethod
    def from_family(cls, family: Family, **settings: Any) -> Baseline:
        """Load what the method needs of a family; settings are the constructor's."""
        return cls(Parts.load(family, few_step=cls.few_step), **settings)

    def to(self, device: torch.device | str) -> Baseline:
        """Move all networks; returns itself."""
        for part in (self.parts.unet, self.schedule, self.autoencoder, self.conditioner):
            part.to(device)
        return self

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the network."""
        return self.parts.schedule

    @property
    def control_steps(self) -> int:
        """The number of steps that the fractions of `control` are of."""
        return len(self.steps)

    def nfe(self, *, guidance: GuidanceSchedule | None = None, control: Control = "auto") -> int:
        """Evaluations that an edit of one picture takes, there and back (at most, where it stops by itself)."""
        guidance = guidance or self.guidance
        followed = [guidance]
        if self.needs_source or self._control(control) is not None:
            followed.append(self.source_guidance(guidance))
        return self.inversion_nfe + sum(self.parts.network.cost(w, t) for t, _ in self.steps for w in followed)

    @torch.no_grad()
    def invert(
        self, images: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Encode pictures (B, 3, H, W) with the prompts that describe them to what edits descend from."""
        return self.invert_latents(self.autoencoder.encode(images), prompts, seed=seed, on_step=on_step)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        inversion: Inversion,
        *,
        guidance: GuidanceSchedule | None = None,
        control: PromptToPrompt | Sequence[PromptToPrompt] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Decode an inversion under prompts to pictures (B, 3, H, W); here no attention is borrowed unless it is given.

        Under the inversion's own prompts this is a reconstruction.
        """
        options = {"guidance": guidance or self.guidance, "control": control, "on_step": on_step}
        return self.autoencoder.decode(self.generate_latents(prompts, inversion, **options))

    def edit(
        self,
        images: Tensor,
        source_prompts: Sequence[str],
        target_prompts: Sequence[str],
        *,
        guidance: GuidanceSchedule | None = None,
        control: Control = "auto",
        seed: Seed = 0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Edit pictures (B, 3, H, W): invert with the source prompts, decode with the target's."""
        inversion = self.invert(images, source_prompts, seed=seed, on_step=on_step)
        return self.generate(
            target_prompts, inversion, guidance=guidance, control=self._control(control), on_step=on_step
        )

    # What makes a method

    @abstractmethod
    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """From latents (B, C, h, w) to what edits descend from."""

    @abstractmethod
    def move(self, x: Tensor, eps: Tensor, index: int, inversion: Inversion) -> Tensor:
        """The branches' x (n B, C, h, w) after step `index`, given their guided eps (n B, C, h, w)."""

    def source_guidance(self, guidance: GuidanceSchedule) -> GuidanceSchedule:
        """How the source's branch is guided beside a target's guided by `guidance`."""
        return UNGUIDED

    def negative(self, index: int, inversion: Inversion, source: Conditioning, empty: Conditioning) -> Conditioning:
        """What guidance leads away from at step `index`, given the source's prompts and the empty one."""
        return empty

    def generate_latents(
        self,
        prompts: Sequence[str],
        inversion: Inversion,
        *,
        guidance: GuidanceSchedule,
        control: PromptToPrompt | Sequence[PromptToPrompt] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Decode an inversion under prompts to latents (B, C, h, w)."""
        source, target = self.conditioner(inversion.prompts), self.conditioner(prompts)
        empty = self.conditioner.unconditional(len(prompts))
        followed = [(target, guidance)]
        if self.needs_source or control is not None:
            followed.insert(0, (source, self.source_guidance(guidance)))

        def branches(index: int) -> list[Branch]:
            negative = self.negative(index, inversion, source, empty)
            return [Branch(told, negative, w) for told, w in followed]

        def move(x: Tensor, eps: Tensor, index: int) -> Tensor:
            return self.move(x, eps, index, inversion)

        x, state = inversion.noise.repeat(len(followed), 1, 1, 1), None
        with ExitStack() as attached:
            if control is not None:
                tokenizer, steps = self.conditioner.tokenizer, self.control_steps
                told = (inversion.prompts, prompts, inversion.noise)
                state = PromptToPromptControl(control, *told, tokenizer=tokenizer, num_steps=steps)
                attached.enter_context(state.attached(self.parts.unet))
            x = descend(self.parts.network, x, self.steps, branches, move, control=state, on_step=on_step)
        return x[-len(prompts) :]

    def _control(self, control: Control) -> PromptToPrompt | Sequence[PromptToPrompt] | None:
        return self.control if control == "auto" else control

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        """The unguided network, bound to prompts."""
        return lambda x, t: self.parts.network(x, t, conditioning)
