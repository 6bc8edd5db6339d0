"""What a baseline needs of a family, and how branches of pictures go through its network, down to the data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from icd_lightning.diffusion import GuidanceSchedule, OnStep, Split, Step, classifier_free_guidance
from icd_lightning.editing.method import UNGUIDED
from icd_lightning.editing.prompt_to_prompt import AttentionControl
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.diffusion_model import DiffusionModel, Network
from icd_lightning.models.family import Family
from icd_lightning.models.text import Conditioner

log = logging.getLogger(__name__)

Move = Callable[[Tensor, Split, int], Tensor]
"""The branches' x (n B, C, h, w) after step `index` = move(x, what the network sees in x, index)."""

LCM_SOLVER_TIMESTEPS = range(19, 1000, 20)  # the 50 steps that latent consistency models were distilled on


@dataclass(frozen=True, eq=False)
class Parts:
    """What a baseline needs of a family: its network, and the ways between pictures, prompts and numbers.

    `predict` is the model's network, or what runs in its place. With `takes_guidance` (guidance-distilled networks) w
    is an input of it and guiding costs nothing; else guiding costs a second evaluation.
    """

    model: DiffusionModel
    autoencoder: LatentAutoencoder
    conditioner: Conditioner
    predict: Network
    takes_guidance: bool

    @classmethod
    def load(cls, family: Family, *, few_step: bool = False) -> Parts:
        """From disk: the teacher, or what makes pictures in few steps.

        A family with a guidance-distilled network (tiny; SD1.5 and SDXL for iCD) is no LCM or Turbo, and that network
        stands in for one; the folder of an LCM or Turbo in diffusers' layout has but one network, and that is it. As in
        the code of InfEdit and ReNoise, an LCM is told no w, although it takes one.
        """
        guided = few_step and has_guided_network(family)
        without_w = few_step and not guided
        if guided:
            log.info("%s is no LCM or Turbo; its guidance-distilled network stands in for one", family.model)
        if without_w:
            log.warning(
                "%s has no guidance-distilled network, so its own is taken for an LCM or Turbo; if it is none, give "
                "one as --model, or a guidance-distilled network as --guided_unet",
                family.model,
            )
        parts = cls.of(family.load_model(guided=guided), family.load_autoencoder(), family.load_conditioner())
        if without_w:
            parts = replace(parts, predict=partial(_without_w, parts.model), takes_guidance=False)
        return parts

    @classmethod
    def of(cls, model: DiffusionModel, autoencoder: LatentAutoencoder, conditioner: Conditioner) -> Parts:
        return cls(model, autoencoder, conditioner, model.predict, model.takes_guidance)

    def eps(self, x: Tensor, t: Tensor | int, conditioning: Conditioning) -> Tensor:
        """The noise (N, C, h, w) in x (N, C, h, w) at t under N prompts, unguided."""
        return self.split(x, t, conditioning).eps

    def split(self, x: Tensor, t: Tensor | int, conditioning: Conditioning, w: Tensor | None = None) -> Split:
        """What the network sees in x (N, C, h, w) at t under N prompts; without w (N,) it is unguided."""
        times = torch.as_tensor(t, device=x.device).expand(len(x))
        if self.takes_guidance and w is None:
            w = torch.ones_like(times, dtype=torch.float32)
        return self.model.process.split(self.predict(x, times, conditioning, w), x, times)


@dataclass(frozen=True, eq=False)
class Branch:
    """What B pictures follow: their prompts, the prompts that guidance leads away from, and w(t)."""

    positive: Conditioning
    negative: Conditioning
    guidance: GuidanceSchedule = UNGUIDED


def predict_branches(
    parts: Parts, x: Tensor, t: int, branches: Sequence[Branch], *, paired: bool = False
) -> tuple[Split, int]:
    """The guided split of the n branches joined in x (n B, C, h, w), and its evaluations of one picture.

    All goes through the network at once: first the unconditional halves of the branches that are guided at t (if
    `paired`, of all branches or none), and then, as the last n B samples, all branches under their prompts.
    """
    scales = [branch.guidance.at(t) for branch in branches]
    positive = [branch.positive for branch in branches]
    if parts.takes_guidance:
        w = torch.tensor(scales, device=x.device).repeat_interleave(len(x) // len(branches))
        return parts.split(x, t, Conditioning.cat(positive), w), len(branches)
    guided = [i for i, scale in enumerate(scales) if scale != 1]
    if paired and guided:
        guided = list(range(len(branches)))
    each = x.chunk(len(branches))
    conditioning = Conditioning.cat([*(branches[i].negative for i in guided), *positive])
    both = parts.split(torch.cat([*(each[i] for i in guided), x]), t, conditioning)

    def combine(values: Tensor) -> Tensor:
        *unconditional, conditional = values.split([*(len(each[0]) for _ in guided), len(x)])
        found = list(conditional.chunk(len(branches)))
        for i, uncond in zip(guided, unconditional, strict=True):
            found[i] = classifier_free_guidance(uncond, found[i], scales[i])
        return torch.cat(found)

    return Split(combine(both.x0), combine(both.eps)), len(branches) + len(guided)


@torch.no_grad()
def descend(
    parts: Parts,
    x: Tensor,
    steps: Iterable[tuple[int, int]],
    branches: Callable[[int], Sequence[Branch]],
    move: Move,
    *,
    paired: bool = False,
    control: AttentionControl | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Take the joined branches x (n B, C, h, w) along steps (t, s): x = move(x, split, index), under branches(index).

    `move` may return more branches than it gets, for the next step. A control, attached to the network, ends each step:
    it knows which one it is by counting.
    """
    for index, (t, s) in enumerate(steps):
        split, nfe = predict_branches(parts, x, t, branches(index), paired=paired)
        x = move(x, split, index)
        if control is not None:
            x = control.step(x)
        if on_step is not None:
            on_step(Step(t, s, x, nfe))
    return x


def has_guided_network(family: Family) -> bool:
    """Whether a family has a guidance-distilled network, as iCD's have; FileNotFoundError if one is named in vain."""
    try:
        family.check()
    except FileNotFoundError:
        if family.guided_unet is not None:
            raise
        return False
    return True


def _without_w(model: DiffusionModel, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
    """A model's network, told no w even if it takes one."""
    time = model.process.network_time(t)
    return model.backbone.predict(model.network, x, time, conditioning, None).to(x.dtype)
