"""What the baselines share: the protocol, and the way down along one branch of pictures, the target's, or two.

Of two branches the source's is the first: `x` then holds (2 B, C, h, w). A method's file says what `invert` keeps
beside the noise and what a step does; all else is here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from icd_lightning.diffusion import Denoiser, GuidanceSchedule, NoiseSchedule, OnStep, StepGuidance
from icd_lightning.editing.baselines.branches import Branch, descend
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.method import UNGUIDED, Method, PictureMethod, Seed
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt, PromptToPromptControl
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.family import Family

Control = PromptToPrompt | Sequence[PromptToPrompt] | Literal["auto"] | None
"""What an edit borrows of attention: for all pictures, for each, as the method does by default, or nothing."""


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

    `guidance` is any schedule of w, to which `edit` also fits what a method fits; `control` is what a target's branch
    borrows of its source's attention (None: nothing); by default both are the method's own. `seed` is of the first
    picture, or a seed for each. `on_step` is called after each step with the evaluations that it took of one picture
    (see `diffusion.sampling`).
    """

    few_step: ClassVar[bool] = False
    """Made for an LCM or Turbo; otherwise for the teacher."""
    needs_source: ClassVar[bool] = False
    """Descends along the source's branch too where no attention is borrowed."""
    fits_guidance: ClassVar[bool] = False
    """What `invert` gives is fit to the method's own guidance: see `guided_by`."""

    uses_students: bool = False
    """Runs on iCD's students, so that its results depend on them."""

    steps: Sequence[tuple[int, int]]
    """(t, s) of an edit's way down."""
    inversion_nfe: int
    """Evaluations of one picture on its way to noise, at most."""

    def __init__(self, parts: Parts, guidance_scale: float, control: PromptToPrompt | None = None) -> None:
        self.parts, self.control = parts, control
        self.guidance: GuidanceSchedule = StepGuidance(guidance_scale)
        self.autoencoder, self.conditioner = parts.autoencoder, parts.conditioner

    @classmethod
    def from_family(
        cls, family: Family, *, students: Mapping[str, str | None] | None = None, **settings: Any
    ) -> Baseline:
        """Load what the method needs of a family; settings are the constructor's.

        students: for methods that use them, what `InvertibleConsistency.from_pretrained` takes beside the family.
        """
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
        method = self.guided_by(guidance)
        followed = [method.guidance]
        if self.needs_source or self._control(control) is not None:
            followed.append(method.source_guidance(method.guidance))
        return method.inversion_nfe + sum(self.parts.network.cost(w, t) for t, _ in self.steps for w in followed)

    def guided_by(self: Method, guidance: GuidanceSchedule | None) -> Method:
        """This method with another guidance for its own, to which it then fits; all else is shared."""
        if guidance is None or guidance == self.guidance:
            return self
        method = copy(self)
        method.guidance = guidance
        return method

    @torch.no_grad()
    def invert(
        self, images: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Encode pictures (B, 3, H, W) with the prompts that describe them to what edits descend from."""
        latents = self.autoencoder.encode(images)
        return self.framed_for(latents).invert_latents(latents, prompts, seed=seed, on_step=on_step)

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
        return self.autoencoder.decode(self.framed_for(inversion.x0).generate_latents(prompts, inversion, **options))

    def edit(
        self,
        images: Tensor,
        source_prompts: Sequence[str],
        target_prompts: Sequence[str],
        *,
        guidance: GuidanceSchedule | None = None,
        control: Control = "auto",
        blended_words: Sequence[tuple[str, str] | None] | None = None,
        seed: Seed = 0,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Tensor:
        """Edit pictures (B, 3, H, W): invert with the source prompts, decode with the target's.

        blended_words: for each edit the words of source and target by which its local blend looks, where it blends at
            all; None: as `control` says.
        options: fields of `PromptToPrompt`, in the place of `control`'s; ValueError for any other.
        """
        method, borrowed = self.guided_by(guidance), self._control(control)
        if options:
            usual = PromptToPrompt() if borrowed is None else borrowed
            borrowed = [one.changed(options) for one in _for_each(usual, len(images))]
        if borrowed is not None and blended_words is not None:
            each = _for_each(borrowed, len(images))
            borrowed = [_blending(one, words) for one, words in zip(each, blended_words, strict=True)]
        inversion = method.invert(images, source_prompts, seed=seed, on_step=on_step)
        return method.generate(target_prompts, inversion, control=borrowed, on_step=on_step)

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


def _for_each(control: PromptToPrompt | Sequence[PromptToPrompt], count: int) -> Sequence[PromptToPrompt]:
    return [control] * count if isinstance(control, PromptToPrompt) else control


def _blending(control: PromptToPrompt, words: tuple[str, str] | None) -> PromptToPrompt:
    """With a local blend by these words, unless it has none: they say where to blend, not whether."""
    return control if words is None or control.blend is False else replace(control, blend=words)
