"""Prompt-to-Prompt's state while edits are decoded: the step, whose attention goes where, what the blend has seen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from icd_lightning.diffusion import GuidanceSchedule, Step
from icd_lightning.editing.limits import Control, PromptToPrompt
from icd_lightning.editing.prompt_to_prompt.alignment import Pair, PromptTokens
from icd_lightning.editing.prompt_to_prompt.attention import (
    Attend,
    Changes,
    ControlledAttention,
    Grid,
    Layers,
    Rows,
    StandIn,
    attend_borrowed,
    attend_rewritten,
    attention_changed,
    choose_layers,
)


@dataclass(frozen=True)
class PairedGuidance:
    """w (2 P,) of t (2 P,) for a batch [sources, targets]."""

    source: GuidanceSchedule
    target: GuidanceSchedule

    def __call__(self, t: Tensor) -> Tensor:
        source, target = t.chunk(2)
        return torch.cat([self.source(source), self.target(target)])


class LocalBlend:
    """The attention to the changed words of P pairs, summed over steps, layers and heads, and the masks it makes.

    Outside of what these words are about, the target is the source.
    """

    def __init__(self, pairs: Sequence[Pair], length: int, num_steps: int, device: torch.device) -> None:
        words = torch.stack([pair.blend_words(length) for pair in pairs], dim=1).to(device)  # (2, P, L)
        self._blended = words.any(dim=2).any(dim=0)
        self.any = bool(self._blended.any())
        self._words = words.flatten(0, 1)
        self._thresholds = torch.tensor([pair.settings.blend_threshold for pair in pairs], device=device).repeat(2)
        # after how many steps each pair's blending begins
        self._begins = torch.tensor([int(pair.settings.blend_from * num_steps) for pair in pairs], device=device)
        self.maps: Tensor | None = None

    def observe(self, probabilities: Tensor, grid: Grid) -> None:
        """Add the cross-attention (2 P, heads, h' w', L) of a layer whose grid is (h', w')."""
        seen = torch.einsum("bhnl,bl->bn", probabilities, self._words).unflatten(1, grid)
        self.maps = seen if self.maps is None else self.maps + seen

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """x (2 P, C, h, w), sources and targets, with the targets blended after the given number of steps."""
        if self.maps is None:
            return x
        maps = max_pool2d(self.maps[:, None], kernel_size=3, stride=1, padding=1)
        maps = interpolate(maps, size=x.shape[2:])
        masks = maps > self._thresholds.view(-1, 1, 1, 1) * maps.amax(dim=(2, 3), keepdim=True)
        edited = torch.logical_or(*masks.chunk(2))
        free = ~self._blended | (step <= self._begins)
        source, target = x.chunk(2)
        return torch.cat([source, torch.where(edited | free.view(-1, 1, 1, 1), target, source)])


class AttentionControl(ABC):
    """P edits while they are decoded: the targets borrow of their sources' attention.

    After each step what lies outside of the changed words is the source. The last 2 P rows of the network's batch are
    those that lend their attention, and the targets.

    Args:
        settings: for all pairs, or one for each.
        sources, targets: P prompts each.
        noise: (P, C, h, w), where decoding begins.
        tokenizer: the text encoder's.
        num_steps: how many steps decoding takes; the settings' fractions are of these.
    """

    stand_in: ClassVar[type[StandIn]]
    """What stands for the processors of the layers that change."""

    def __init__(
        self,
        settings: Control | Sequence[Control],
        sources: Sequence[str],
        targets: Sequence[str],
        noise: Tensor,
        *,
        tokenizer: Any,
        num_steps: int,
    ) -> None:
        each = [settings] * len(noise) if isinstance(settings, Control) else settings
        if not len(noise) == len(sources) == len(targets) == len(each):
            raise ValueError(
                f"{len(noise)} latents, {len(sources)} source prompts, {len(targets)} target prompts and {len(each)} "
                "settings make no pairs: give as many of each"
            )
        self.pairs = [
            Pair(PromptTokens.read(source, tokenizer), PromptTokens.read(target, tokenizer), one)
            for source, target, one in zip(sources, targets, each, strict=True)
        ]
        self.num_steps, self.length, self.device = num_steps, tokenizer.model_max_length, noise.device
        self.size = (noise.shape[-2], noise.shape[-1])
        self.blend = LocalBlend(self.pairs, self.length, num_steps, self.device)
        self._step = 0
        self._evaluated: set[str] = set()

    @abstractmethod
    def changes(self, network: nn.Module) -> Changes:
        """How attention differs, by the names of processors."""

    def step(self, x: Tensor) -> Tensor:
        """End a step: x (n P, C, h, w), sources first and targets last, to x with the targets blended."""
        self._step += 1
        self._evaluated.clear()
        return self.blend(x, self._step)

    def on_step(self, step: Step) -> None:
        """End a step of a loop of `diffusion.jumps`, which goes on from what is written into the step's x."""
        step.x.copy_(self.step(step.x))

    @contextmanager
    def attached(self, network: nn.Module) -> Iterator[None]:
        """Control the network's attention, from the first step on; afterwards every layer is as it was."""
        self._step, self.blend.maps = 0, None
        self._evaluated.clear()
        with attention_changed(network, self.changes(network), self.stand_in):
            yield

    def _note(self, name: str) -> None:
        """Maps would count twice, and the unconditional be taken for the conditional, without a word."""
        if name in self._evaluated:
            raise ValueError(
                "the network was evaluated twice in one step of an edit that borrows attention: evaluate all branches "
                "in one batch, the conditional ones last, and end each step by control.step or control.on_step"
            )
        if self._step >= self.num_steps:
            raise ValueError(f"this control was made for {self.num_steps} steps: give it the num_steps of the loop")
        self._evaluated.add(name)


class PromptToPromptControl(AttentionControl):
    """The targets look where their sources do in the first steps."""

    stand_in = ControlledAttention
    steps_beyond = 1
    """As published, one step is counted beyond the last for cross-attention."""
    both_halves = False
    """Self-attention of unconditional rows goes as that of conditional ones."""

    def __init__(self, *edits: Any, tokenizer: Any, num_steps: int) -> None:
        super().__init__(*edits, tokenizer=tokenizer, num_steps=num_steps)
        each = [pair.settings for pair in self.pairs]
        counted = num_steps + self.steps_beyond
        cross_counts = [min(int(one.cross_replace * counted), num_steps) for one in each]
        self._cross_steps, self._cross_counts = max(cross_counts), torch.tensor(cross_counts, device=self.device)
        own_counts = self_counts(each, num_steps)
        self._own_steps, self._own_counts = max(own_counts), torch.tensor(own_counts, device=self.device)
        self._source = torch.arange(len(each), device=self.device)
        from_source, from_target = zip(*(pair.lent(self.length) for pair in self.pairs), strict=True)
        self._from_source = torch.stack(from_source).to(self.device)  # (P, L, L)
        self._from_target = torch.stack(from_target).to(self.device)  # (P, L)

    def replaced(self, source: Tensor, target: Tensor) -> Tensor:
        """The targets' cross-attention (P, heads, N, L) as it would come from the sources'."""
        return source @ self._from_source[:, None] + target * self._from_target[:, None, None]

    def rows(self, step: int) -> Rows | None:
        """Whose queries and keys each of [sources, targets] attends with in self-attention; None: its own."""
        if step >= self._own_steps:
            return None
        target = torch.where(step < self._own_counts, self._source, self._source + len(self._source))
        rows = torch.cat([self._source, target])
        return Rows(rows, rows)

    def own_layers(self, layers: Layers) -> Sequence[str]:
        """The layers of self-attention that `rows` speaks of: the coarse ones."""
        return layers.own_replaced if self._own_steps else ()

    def seen(self, probabilities: Tensor, attended: Tensor) -> Tensor:
        """What the blend observes of cross-attention (2 P, heads, N, L): as published, what has been replaced."""
        return attended

    def changes(self, network: nn.Module) -> Changes:
        """Of cross-attention where it is the sources' or looked at, and of self-attention where it is the sources'."""
        layers = choose_layers(network, self.size)
        if self.blend.any and not layers.blend:
            raise ValueError(
                f"at latents of {self.size[0]} x {self.size[1]} this UNet has no cross-attention coarse enough for the "
                "local blend to look at: set blend to False"
            )
        looked_at = layers.blend if self.blend.any else {}
        changes: dict[str, Callable[[], Attend | None]] = {
            name: partial(self._rewrite, name, looked_at.get(name))
            for name in (layers.cross if self._cross_steps else looked_at)
        }
        return changes | {name: partial(self._borrow, name) for name in self.own_layers(layers)}

    def _rewrite(self, name: str, looked_at: Grid | None) -> Attend | None:
        self._note(name)
        replaces = self._step < self._cross_steps
        if not replaces and looked_at is None:
            return None

        def rewrite(probabilities: Tensor) -> Tensor:
            attended = probabilities
            if replaces:
                source, target = probabilities.chunk(2)
                now = (self._step < self._cross_counts).view(-1, 1, 1, 1)
                attended = torch.cat([source, torch.where(now, self.replaced(source, target), target)])
            if looked_at is not None:
                self.blend.observe(self.seen(probabilities, attended), looked_at)
            return attended

        return partial(attend_rewritten, num_rows=2 * len(self.pairs), rewrite=rewrite)

    def _borrow(self, name: str) -> Attend | None:
        self._note(name)
        rows = self.rows(self._step)
        return None if rows is None else partial(attend_borrowed, rows=rows, both_halves=self.both_halves)


def self_counts(settings: Sequence[PromptToPrompt], num_steps: int) -> list[int]:
    """In how many of num_steps, for each edit, self-attention is the source's."""
    return [int(one.self_replace * num_steps) for one in settings]
