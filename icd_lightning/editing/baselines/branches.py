"""A network not yet bound to prompts, the branches of pictures that go through it, and their loop down to the data.

Networks know no UNet: a `ConditionalNetwork` is any eps = network(x, t, conditioning).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icd_lightning.diffusion import GuidanceSchedule, OnStep, Step, classifier_free_guidance
from icd_lightning.editing.method import UNGUIDED
from icd_lightning.editing.prompt_to_prompt import AttentionControl
from icd_lightning.models.conditioning import Conditioning


@dataclass(frozen=True, eq=False)
class ConditionalNetwork:
    """eps (N, C, h, w) = network(x (N, C, h, w), t (N,), conditioning of N): unguided.

    `predict` also takes w (N,). With `takes_guidance` (guidance-distilled networks) w is an input of the network and
    guiding costs nothing; else w is None, and guiding costs a second evaluation.
    """

    predict: Callable[[Tensor, Tensor, Conditioning, Tensor | None], Tensor]
    takes_guidance: bool = False

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        w = torch.ones_like(t, dtype=torch.float32) if self.takes_guidance else None
        return self.predict(x, t, conditioning, w)

    def guided(self, scales: Sequence[float], *, paired: bool = False) -> list[int]:
        """Which of the branches with these w need a second evaluation, unconditional; `paired`: all of them, or none.

        Where w is 1 guidance takes nothing, and where w is an input it takes no evaluation.
        """
        chosen = [] if self.takes_guidance else [i for i, scale in enumerate(scales) if scale != 1]
        return list(range(len(scales))) if paired and chosen else chosen

    def cost(self, scales: Sequence[float], *, paired: bool = False) -> int:
        """Evaluations of one picture on branches with these w."""
        return len(scales) + len(self.guided(scales, paired=paired))


@dataclass(frozen=True, eq=False)
class Branch:
    """What B pictures follow: their prompts, the prompts that guidance leads away from, and w(t)."""

    positive: Conditioning
    negative: Conditioning
    guidance: GuidanceSchedule = UNGUIDED


def predict_branches(
    network: ConditionalNetwork, x: Tensor, t: int, branches: Sequence[Branch], *, paired: bool = False
) -> tuple[Tensor, int]:
    """Guided eps (n B, C, h, w) for the n branches joined in x (n B, C, h, w), and its evaluations of one picture.

    All goes through the network at once: first the unconditional halves of the branches that are guided at t (see
    `ConditionalNetwork.guided`), and then, as the last n B samples, all branches under their prompts.
    """
    times = torch.full((len(x),), t, dtype=torch.long, device=x.device)
    scales = [branch.guidance.at(t) for branch in branches]
    positive = Conditioning.cat([branch.positive for branch in branches])
    guided, nfe = network.guided(scales, paired=paired), network.cost(scales, paired=paired)
    if network.takes_guidance:
        w = torch.tensor(scales, device=x.device).repeat_interleave(len(x) // len(branches))
        return network.predict(x, times, positive, w), nfe
    if not guided:
        return network(x, times, positive), nfe
    parts = x.chunk(len(branches))
    rows = torch.cat([*(parts[i] for i in guided), x])
    conditioning = Conditioning.cat([*(branches[i].negative for i in guided), positive])
    eps = network(rows, torch.full((len(rows),), t, dtype=torch.long, device=x.device), conditioning)
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
    paired: bool = False,
    control: AttentionControl | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Take the joined branches x (n B, C, h, w) down steps (t, s): x = move(x, eps, index), under branches(index).

    `move` may return more branches than it gets, for the next step. A control, attached to the network, ends each step:
    it knows which one it is by counting.
    """
    for index, (t, s) in enumerate(steps):
        eps, nfe = predict_branches(network, x, t, branches(index), paired=paired)
        x = move(x, eps, index)
        if control is not None:
            x = control.step(x)
        if on_step is not None:
            on_step(Step(t, s, x, nfe))
    return x
