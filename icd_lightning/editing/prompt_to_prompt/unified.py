"""Unified attention control (InfEdit, arXiv:2312.04965, section 4): layout and content pass to the target by a branch.

Between source and target stands a third branch, the mutual one. It is told the source's prompt and has the source's
keys and values in self-attention, but, once the target's self-attention is free, the target's queries: the source's
content in the target's layout. At words the target looks as the mutual branch does, and what it does not change is it.

As long as the target's self-attention is the source's, nothing sets the mutual branch apart from the source. Until then
it is the source, and is not run; `mutual_begins` says when it is. A batch is at first [sources, targets] and then
[sources, mutuals, targets]. Where as many unconditional rows come before these, their self-attention goes the same way,
as in the authors' code; their cross-attention is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from icd_lightning.editing.limits import PromptToPrompt
from icd_lightning.editing.prompt_to_prompt.alignment import Pair
from icd_lightning.editing.prompt_to_prompt.attention import Grid, Layers, Rows
from icd_lightning.editing.prompt_to_prompt.control import LocalBlend, PromptToPromptControl, self_counts

BLUR = 0.15
"""The blend's threshold is at least this over alpha(t): where noise is high, maps are vague and no place is changed."""


def mutual_begins(settings: PromptToPrompt | Sequence[PromptToPrompt], num_steps: int) -> int:
    """The first step, of num_steps, at which a mutual branch differs from its source."""
    return min(self_counts([settings] if isinstance(settings, PromptToPrompt) else settings, num_steps))


class UnifiedAttentionControl(PromptToPromptControl):
    """What goes between the branches of P edits, as `PromptToPromptControl`; alphas are alpha(t) of each step."""

    steps_beyond, both_halves = 0, True

    def __init__(self, *edits: Any, tokenizer: Any, alphas: Sequence[float]) -> None:
        super().__init__(*edits, tokenizer=tokenizer, num_steps=len(alphas))
        self._mutual_begins = mutual_begins([pair.settings for pair in self.pairs], len(alphas))
        self.blend = MutualBlend(self.pairs, self.length, alphas, self.device)

    def rows(self, step: int) -> Rows | None:
        """Of [sources, targets] while all targets have their source's, then of [sources, mutuals, targets]."""
        if step < self._mutual_begins:
            return super().rows(step)
        source = self._source
        target = source + 2 * len(source)
        looking = torch.where(step < self._own_counts, source, target)
        return Rows(
            torch.cat([source, looking, looking]),
            torch.cat([source, source, looking]),
            torch.cat([source, source, target]),
        )

    def own_layers(self, layers: Layers) -> Sequence[str]:
        return layers.own

    def seen(self, probabilities: Tensor, attended: Tensor) -> Tensor:
        """At every step the mutual branch's attention (P, heads, N, L) as the target would have it."""
        return self.replaced(*probabilities.chunk(2))


class MutualBlend(LocalBlend):
    """The mutual branch's attention to the target's changed words, summed over steps, layers and heads; its masks.

    Nothing is blended after the first step, whose maps say little, nor after the last, whose result is the picture.
    """

    def __init__(self, pairs: Sequence[Pair], length: int, alphas: Sequence[float], device: torch.device) -> None:
        super().__init__(pairs, length, len(alphas), device)
        self._words = self._words[len(pairs) :]  # (P, L), the targets'
        self._blended = self._words.any(dim=1)
        self.any = bool(self._blended.any())
        self._begins = self._begins.clamp(min=1)
        self._by_step = [self._thresholds[: len(pairs)].clamp(min=BLUR / alpha) for alpha in alphas]

    def observe(self, probabilities: Tensor, grid: Grid) -> None:
        """Add the targets' cross-attention (P, heads, h' w', L) of a layer whose grid is (h', w')."""
        target = probabilities.sum(dim=1) * self._words[:, None]
        seen = target.transpose(1, 2).unflatten(2, grid)  # (P, L, h', w')
        self.maps = seen if self.maps is None else self.maps + seen

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """x (n P, C, h, w), mutual branches and targets last, with the targets blended after so many steps."""
        if self.maps is None or step == len(self._by_step):
            return x
        maps = interpolate(self.maps.amax(dim=1, keepdim=True), size=x.shape[2:])
        threshold = self._by_step[step - 1].view(-1, 1, 1, 1)
        changed = maps > threshold * maps.amax(dim=(2, 3), keepdim=True)
        free = ~self._blended | (step <= self._begins)
        *others, mutual, target = x.split(len(self._words))
        return torch.cat([*others, mutual, torch.where(changed | free.view(-1, 1, 1, 1), target, mutual)])
