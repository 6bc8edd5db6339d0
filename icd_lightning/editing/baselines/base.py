"""What the baselines share: the protocol, and the way down along one branch of pictures, the target's, or more.

Of n branches, in `x` (n B, C, h, w), the source's is the first and the target's the last. A method's file says what
`invert` keeps beside the noise and what a step does; all else is here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from icd_lightning.diffusion import (
    GuidanceSchedule,
    OnStep,
    Split,
    StepGuidance,
    ddim_path,
    ddim_timesteps,
    falling,
)
from icd_lightning.editing.baselines.branches import Branch, descend
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.limits import for_each
from icd_lightning.editing.method import UNGUIDED, Method, PictureMethod, Seed
from icd_lightning.editing.prompt_to_prompt import AttentionControl, BlendedWords, PromptToPrompt, PromptToPromptControl
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.family import Family

Borrowed = PromptToPrompt | Sequence[PromptToPrompt] | None
"""What an edit borrows of attention: for all pictures, for each, or nothing."""

PIE_CONTROL = PromptToPrompt(
    cross_replace=0.4, self_replace=0.6, alignment="refine", amplify=2.0, amplified="blended", blend_from=0.2
)
"""As PIE-Bench (arXiv:2310.01506) sets Prompt-to-Prompt."""

Control = Borrowed | Literal["auto"]
"""The same, or what the method borrows by default."""


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
    (see `diffusion.jumps`).
    """

    few_step: ClassVar[bool] = False
    """Made for an LCM or Turbo; otherwise for the teacher."""
    needs_source: ClassVar[bool] = False
    """Descends along the source's branch too where no attention is borrowed."""
    fits_guidance: ClassVar[bool] = False
    """What `invert` gives is fit to the method's own guidance: see `guided_by`."""
    paired: ClassVar[bool] = False
    """Where attention is borrowed and any branch is guided by a second evaluation, all branches have one."""

    steps: Sequence[tuple[int, int]]
    """(t, s) of an edit's way down."""
    inversion_nfe: int
    """Evaluations of one picture on its way to noise, at most."""

    def __init__(self, parts: Parts, guidance_scale: float, control: PromptToPrompt | None = None) -> None:
        self.parts, self.control = parts, control
        self.guidance: GuidanceSchedule = StepGuidance(guidance_scale)
        self.process, self.autoencoder, self.conditioner = parts.model.process, parts.autoencoder, parts.conditioner

    @classmethod
    def from_family(
        cls, family: Family, *, students: Mapping[str, str | None] | None = None, **settings: Any
    ) -> Baseline:
        """As `PictureMethod.from_family`: the teacher, or a few-step network."""
        return cls(Parts.load(family, few_step=cls.few_step), **settings)

    def networks(self) -> Sequence[nn.Module]:
        return [self.parts.model.network]

    @property
    def control_steps(self) -> int:
        """The number of steps that the fractions of `control` are of."""
        return len(self.steps)

    def nfe(self, *, guidance: GuidanceSchedule | None = None, control: Control = "auto") -> int:
        """Evaluations that an edit of one picture takes, there and back (at most, where it stops by itself)."""
        method, borrowed = self.guided_by(guidance), self._control(control)
        return method.inversion_nfe + sum(
            self.parts.network.cost(
                [w.at(t) for _, w in method.followed(index, method.guidance, borrowed)],
                paired=self.paired and borrowed is not None,
            )
            for index, (t, _) in enumerate(self.steps)
        )

    def guided_by(self: Method, guidance: GuidanceSchedule | None) -> Method:
        """This method with another guidance for its own, to which it then fits; all else is shared."""
        if guidance is None or guidance == self.guidance:
            return self
        method = copy(self)
        method.guidance = guidance
        return method

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        inversion: Inversion,
        *,
        guidance: GuidanceSchedule | None = None,
        control: Borrowed = None,
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
        blended_words: Sequence[BlendedWords] | None = None,
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
        if options and borrowed is None:
            borrowed = PromptToPrompt()
        if borrowed is not None:
            borrowed = for_each(borrowed, len(images), options, blended_words)
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

    def followed(
        self, index: int, guidance: GuidanceSchedule, control: Borrowed
    ) -> list[tuple[Literal["source", "target"], GuidanceSchedule]]:
        """Whose prompts each branch is told at step `index`, and its guidance, where the target's is `guidance`.

        A branch may begin at any step; until then it is the source's.
        """
        target = [("target", guidance)]
        beside = self.needs_source or control is not None
        return [("source", self.source_guidance(guidance)), *target] if beside else target

    def attention_control(
        self, control: PromptToPrompt | Sequence[PromptToPrompt], inversion: Inversion, prompts: Sequence[str]
    ) -> AttentionControl:
        """What lends the targets attention on their way down."""
        edits = (inversion.prompts, prompts, inversion.noise)
        return PromptToPromptControl(
            control, *edits, tokenizer=self.conditioner.tokenizer, num_steps=self.control_steps
        )

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
        control: Borrowed = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Decode an inversion under prompts to latents (B, C, h, w)."""
        conditioning = {"source": self.conditioner(inversion.prompts), "target": self.conditioner(prompts)}
        empty = self.conditioner.unconditional(len(prompts))
        followed = [self.followed(index, guidance, control) for index in range(len(self.steps))]
        counts = [len(each) for each in followed] or [1]

        def branches(index: int) -> list[Branch]:
            negative = self.negative(index, inversion, conditioning["source"], empty)
            return [Branch(conditioning[whose], negative, w) for whose, w in followed[index]]

        def move(x: Tensor, eps: Tensor, index: int) -> Tensor:
            x = self.move(x, eps, index, inversion)
            begun = counts[min(index + 1, len(counts) - 1)] - counts[index]
            return torch.cat([*[x[: len(prompts)]] * begun, x]) if begun else x

        x, state = inversion.noise.repeat(counts[0], 1, 1, 1), None
        with ExitStack() as attached:
            if control is not None:
                state = self.attention_control(control, inversion, prompts)
                attached.enter_context(state.attached(self.parts.model.network))
            options = {"paired": self.paired and control is not None, "control": state, "on_step": on_step}
            x = descend(self.parts.network, x, self.steps, branches, move, **options)
        return x[-len(prompts) :]

    def _control(self, control: Control) -> Borrowed:
        return self.control if control == "auto" else control


class DDIMBaseline(Baseline):
    """A baseline that goes up and down DDIM's grid: num_inference_steps evaluations to noise."""

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
        if self.leads_from_prompts and parts.network.takes_guidance:
            raise ValueError(
                f"{type(self).__name__} changes what classifier-free guidance leads away from: it needs a network "
                "without guidance embedding, no LCM or guidance-distilled one"
            )
        self.timesteps = ddim_timesteps(num_inference_steps, self.process.num_train_timesteps)
        self.steps = falling(self.timesteps)

    @property
    def inversion_nfe(self) -> int:
        """One a step."""
        return len(self.steps)

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Climb the grid, unguided; nothing is drawn, so `seed` has no effect."""
        return Inversion(prompts, x0, self.path(x0, self.conditioner(prompts), on_step=on_step)[-1])

    def path(self, x0: Tensor, source: Conditioning, *, on_step: OnStep | None = None) -> list[Tensor]:
        """Every latent (B, C, h, w) of the way up, x0 first and the noise last."""

        def denoise(x: Tensor, t: Tensor) -> Split:
            return self.process.split_by_eps(x, self.parts.network(x, t, source), t)

        return ddim_path(denoise, x0, self.timesteps, self.process, on_step=on_step)

    def move(self, x: Tensor, eps: Tensor, index: int, inversion: Inversion) -> Tensor:
        """One DDIM step."""
        return self.ddim_step(x, eps, index)

    def ddim_step(self, x: Tensor, eps: Tensor, index: int) -> Tensor:
        """x (n B, C, h, w) down step `index` along eps (n B, C, h, w)."""
        return self.process.ddim_step(x, eps, *self.steps[index], set_alpha_to_one=False)
