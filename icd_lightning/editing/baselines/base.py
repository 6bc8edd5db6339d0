"""What the baselines share: the protocol, and the way down along one branch of pictures, the target's, or more.

Of n branches, in `x` (n B, C, h, w), the source's is the first and the target's the last. A method's file says what
`invert` keeps beside the noise and what a step does; all else is here.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from icd_lightning.diffusion import VP, GuidanceSchedule, OnStep, Split, Step, StepGuidance, ddim_timesteps, falling
from icd_lightning.editing.baselines.parts import Branch, Move, Parts, descend
from icd_lightning.editing.injection import attention_control, usual_control
from icd_lightning.editing.limits import Control, for_each
from icd_lightning.editing.method import UNGUIDED, Method, PictureMethod, Seed, StudentPaths
from icd_lightning.editing.methods import PIE
from icd_lightning.editing.prompt_to_prompt import AttentionControl, BlendedWords, PromptToPrompt
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.family import Family

Borrowed = Control | Sequence[Control] | None
"""What an edit borrows of attention: for all pictures, for each, or nothing."""

Followed = list[tuple[Literal["source", "target"], GuidanceSchedule]]
"""Whose prompts each branch is told, and its guidance."""

PIE_CONTROL = PromptToPrompt(**PIE["control"])


@dataclass(frozen=True, eq=False)
class Inversion:
    """What B pictures became: noise (B, C, h, w) to descend from, or several, and what the method keeps beside it.

    prompts describe the pictures, x0 (B, C, h, w) are their latents, per_step holds one tensor for each step down:
    null embeddings, differences, or noise, as the method's file says.
    """

    prompts: Sequence[str]
    x0: Tensor
    noise: Tensor
    per_step: Sequence[Tensor] = ()


class Baseline(PictureMethod):
    """A training-free editing method. Pictures are (B, 3, H, W) in [-1, 1].

    `guidance` is any schedule of w, to which `edit` also fits what a method fits; `control` is what a target's branch
    borrows of its source's attention (None: nothing); by default both are the method's own. `seed` is of the first
    picture, or a seed for each.
    """

    few_step: ClassVar[bool] = False
    """Made for an LCM or Turbo; otherwise for the teacher."""
    guides_source: ClassVar[bool] = False
    """The source's branch is guided as the target's; otherwise not at all."""
    fits_guidance: ClassVar[bool] = False
    """What `invert` gives is fit to the method's own guidance: see `guided_by`."""
    paired: ClassVar[bool] = False
    """Where attention is borrowed and any branch is guided by a second evaluation, all branches have one."""

    steps: Sequence[tuple[int, int]]
    """(t, s) of an edit's way down."""
    skipped: int = 0
    """Steps before these, which the fractions of `control` are of, too."""

    def __init__(self, parts: Parts, guidance_scale: float, control: Control | None = None) -> None:
        self.check_process(parts.model.process)
        self.parts, self.control = parts, control
        self.guidance: GuidanceSchedule = StepGuidance(guidance_scale)
        self.network, self.process = parts.model.network, parts.model.process
        self.autoencoder, self.conditioner = parts.autoencoder, parts.conditioner

    @classmethod
    def from_family(cls, family: Family, *, students: StudentPaths = None, **settings: Any) -> Baseline:
        method = cls(Parts.load(family, few_step=cls.few_step), **settings)
        method.check_written()
        return method

    def check_written(self) -> None:
        """ValueError where a subclass left out what makes it a method."""
        name = type(self).__name__
        if lacking := [one for one in ("parts", "steps") if not hasattr(self, one)]:
            raise ValueError(
                f"{name} has no {lacking[0]}: call super().__init__ and set self.steps, (t, s) of each step"
            )
        try:
            inspect.signature(self.invert_latents).bind(None, (), seed=0, on_step=None)
        except TypeError as error:
            raise ValueError(
                f"{name}.invert_latents must take (x0, prompts, *, seed=0, on_step=None): {error}"
            ) from error

    def guided_by(self: Method, guidance: GuidanceSchedule | None) -> Method:
        """This method with another guidance for its own, to which it then fits; all else is shared."""
        method = copy(self)
        method.guidance = guidance or self.guidance
        return method

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], inversion: Inversion, **options: Any) -> Tensor:
        """Decode an inversion under prompts to pictures (B, 3, H, W), with the options of `generate_latents`.

        Under the inversion's own prompts this is a reconstruction.
        """
        if not isinstance(inversion, Inversion):
            name, kind = type(self).__name__, type(inversion).__name__
            raise ValueError(f"{name}.invert_latents gives a {kind}: return Inversion(prompts, x0, noise)")
        return self.autoencoder.decode(self.framed_for(inversion.x0).generate_latents(prompts, inversion, **options))

    def edit(
        self,
        images: Tensor,
        source_prompts: Sequence[str],
        target_prompts: Sequence[str],
        *,
        guidance: GuidanceSchedule | None = None,
        control: Borrowed | Literal["auto"] = "auto",
        blended_words: Sequence[BlendedWords] | None = None,
        seed: Seed = 0,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Tensor:
        """Edit pictures (B, 3, H, W): invert with the source prompts, decode with the target's.

        control: "auto" is the method's own.
        blended_words: for each edit the words of source and target by which its local blend looks, where it blends at
            all; None: as `control` says.
        options: fields of the control, in the place of its own; ValueError for any other.
        """
        method, borrowed = self.guided_by(guidance), self.control if control == "auto" else control
        if options and borrowed is None:
            borrowed = usual_control(self.network)
        if borrowed is not None:
            borrowed = for_each(borrowed, len(images), options, blended_words)
        inversion = method.invert(images, source_prompts, seed=seed, on_step=on_step)
        return method.generate(target_prompts, inversion, control=borrowed, on_step=on_step)

    # What makes a method, beside `invert_latents`, which returns an `Inversion`

    def move(self, x: Tensor, split: Split, index: int, inversion: Inversion) -> Tensor:
        """The branches' x (n B, C, h, w) after step `index`, given what the guided network sees in them."""
        raise ValueError(f"{type(self).__name__} has neither move nor mover: write move, what a step does with x")

    def mover(self, inversion: Inversion) -> Move:
        """`move` for one way down; to be overridden where a step needs what an earlier one found."""
        return lambda x, split, index: self.move(x, split, index, inversion)

    def _moved(self, x: Tensor, moved: object) -> Tensor:
        """What a step made of x; ValueError if that is no tensor of its shape."""
        if not isinstance(moved, Tensor) or moved.shape != x.shape:
            what = tuple(moved.shape) if isinstance(moved, Tensor) else type(moved).__name__
            raise ValueError(f"{type(self).__name__}.move gives {what}: return x after the step, {tuple(x.shape)}")
        return moved

    def followed(self, index: int, guidance: GuidanceSchedule, control: Borrowed) -> Followed:
        """The branches of step `index`, where the target's guidance is `guidance`.

        A branch may begin at any step; until then it is the source's.
        """
        source = ("source", guidance if self.guides_source else UNGUIDED)
        return [("target", guidance)] if control is None else [source, ("target", guidance)]

    def attention_control(
        self, control: Control | Sequence[Control], inversion: Inversion, prompts: Sequence[str]
    ) -> AttentionControl:
        edits, count = (inversion.prompts, prompts, inversion.noise), self.skipped + len(self.steps)
        return attention_control(control, *edits, tokenizer=self.conditioner.tokenizer, num_steps=count)

    def negative(self, index: int, inversion: Inversion, source: Conditioning, empty: Conditioning) -> Conditioning:
        """What guidance leads away from at step `index`, given the source's prompts and the empty one."""
        return empty

    def generate_latents(
        self,
        prompts: Sequence[str],
        inversion: Inversion,
        *,
        guidance: GuidanceSchedule | None = None,
        control: Borrowed = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Decode an inversion under prompts to latents (B, C, h, w); attention is borrowed where control is given."""
        guidance = guidance or self.guidance
        conditioning = {"source": self.conditioner(inversion.prompts), "target": self.conditioner(prompts)}
        empty = self.conditioner.unconditional(len(prompts))
        followed = [self.followed(index, guidance, control) for index in range(len(self.steps))]
        counts = [len(each) for each in followed] or [1]

        def branches(index: int) -> list[Branch]:
            negative = self.negative(index, inversion, conditioning["source"], empty)
            return [Branch(conditioning[whose], negative, w) for whose, w in followed[index]]

        step = self.mover(inversion)

        def move(x: Tensor, split: Split, index: int) -> Tensor:
            x = self._moved(x, step(x, split, index))
            begun = counts[min(index + 1, len(counts) - 1)] - counts[index]
            return torch.cat([*[x[: len(prompts)]] * begun, x]) if begun else x

        x, state = inversion.noise.repeat(counts[0] * len(prompts) // len(inversion.noise), 1, 1, 1), None
        with ExitStack() as attached:
            if control is not None:
                state = self.attention_control(control, inversion, prompts)
                attached.enter_context(state.attached(self.network))
            options = {"paired": self.paired and control is not None, "control": state, "on_step": on_step}
            x = descend(self.parts, x, self.steps, branches, move, **options)
        return x[-len(prompts) :]


class DDIMBaseline(Baseline):
    """A baseline that goes up and down DDIM's grid: num_inference_steps evaluations to noise."""

    needs = VP
    leads_from_prompts: ClassVar[bool] = False
    """Changes the prompt that guidance leads away from, which a network that takes w as an input does not have."""

    def __init__(
        self,
        parts: Parts,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        control: PromptToPrompt | None = PIE_CONTROL,
    ) -> None:
        super().__init__(parts, guidance_scale, control)
        if self.leads_from_prompts and parts.takes_guidance:
            raise ValueError(
                f"{type(self).__name__} changes what classifier-free guidance leads away from: it needs a network "
                "without guidance embedding, no LCM or guidance-distilled one"
            )
        self.steps = falling(ddim_timesteps(num_inference_steps, self.process.num_train_timesteps))

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Climb the grid, unguided; nothing is drawn, so `seed` has no effect."""
        return Inversion(prompts, x0, self.path(x0, self.conditioner(prompts), on_step=on_step)[-1])

    @torch.no_grad()
    def path(self, x0: Tensor, source: Conditioning, *, on_step: OnStep | None = None) -> list[Tensor]:
        """Every latent (B, C, h, w) of the way up, x0 first and the noise last; the noisier end's eps takes x there."""
        path = [x0]
        for t, s in reversed(self.steps):
            eps = self.parts.eps(path[-1], t, source)
            path.append(self.process.ddim_step(path[-1], eps, s, t, set_alpha_to_one=False))
            if on_step is not None:
                on_step(Step(s, t, path[-1], 1))
        return path

    def move(self, x: Tensor, split: Split, index: int, inversion: Inversion) -> Tensor:
        return self.ddim_step(x, split.eps, index)

    def ddim_step(self, x: Tensor, eps: Tensor, index: int) -> Tensor:
        """x (n B, C, h, w) down step `index` along eps (n B, C, h, w)."""
        return self.process.ddim_step(x, eps, *self.steps[index], set_alpha_to_one=False)
