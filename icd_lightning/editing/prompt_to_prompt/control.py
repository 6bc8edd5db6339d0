"""The state of edits that borrow attention, while they are decoded: Prompt-to-Prompt's, and what is not its alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from icd_lightning.diffusion import GuidanceSchedule, Step
from icd_lightning.editing.limits import PromptToPrompt
from icd_lightning.editing.prompt_to_prompt.alignment import Pair, PromptTokens
from icd_lightning.editing.prompt_to_prompt.attention import (
    CrossAttention,
    Rewrite,
    Rows,
    SelfAttention,
    layer_of,
    processors_in_place,
)
from icd_lightning.editing.prompt_to_prompt.blend import LocalBlend
from icd_lightning.editing.prompt_to_prompt.layers import Grid, Layers, choose_layers
from icd_lightning.editing.prompt_to_prompt.replacement import CrossReplacement, SelfReplacement


@dataclass(frozen=True)
class PairedGuidance:
    """w (2 P,) of t (2 P,) for a batch [sources, targets]."""

    source: GuidanceSchedule
    target: GuidanceSchedule

    def __call__(self, t: Tensor) -> Tensor:
        source, target = t.chunk(2)
        return torch.cat([self.source(source), self.target(target)])


class AttentionControl(ABC):
    """P edits while they are decoded: which step it is, whose attention goes where, what the blend has seen.

    The last 2 P rows of the network's batch are those that lend their cross-attention, and the targets. A subclass sets
    `both_halves` where self-attention of unconditional rows goes as that of conditional ones.

    Args:
        settings: for all pairs, or one for each.
        sources, targets: P prompts each.
        noise: (P, C, h, w), where decoding begins.
        tokenizer: the text encoder's.
        num_steps: how many steps decoding takes; the settings' fractions are of these.
    """

    both_halves: ClassVar[bool] = False

    def __init__(
        self,
        settings: PromptToPrompt | Sequence[PromptToPrompt],
        sources: Sequence[str],
        targets: Sequence[str],
        noise: Tensor,
        *,
        tokenizer: Any,
        num_steps: int,
    ) -> None:
        each = [settings] * len(noise) if isinstance(settings, PromptToPrompt) else settings
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
        self.cross, self.own, self.blend = self.parts()
        self._step = 0
        self._evaluated: set[str] = set()

    @abstractmethod
    def parts(self) -> tuple[CrossReplacement, SelfReplacement, LocalBlend]:
        """Whose cross-attention the targets have at each step, whose self-attention all have, and how targets blend."""

    @abstractmethod
    def own_layers(self, layers: Layers) -> Sequence[str]:
        """The layers of self-attention that `own` speaks of."""

    @abstractmethod
    def seen(self, probabilities: Tensor, attended: Tensor) -> Tensor:
        """What the blend observes of a layer's cross-attention (2 P, heads, N, L), before and after replacement."""

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
        """Control the UNet's attention, from the first step on; afterwards every layer is as it was."""
        self._step = 0
        self._evaluated.clear()
        self.blend.reset()
        with processors_in_place(network, self._processors(network)):
            yield

    def _processors(self, network: nn.Module) -> dict[str, CrossAttention | SelfAttention]:
        """Processors, by name, for the layers that are ever read."""
        layers, rows = choose_layers(network, self.size), 2 * len(self.pairs)
        if self.blend.any and not layers.blend:
            raise ValueError(
                f"at latents of {self.size[0]} x {self.size[1]} this UNet has no cross-attention coarse enough for the "
                "local blend to look at: set blend to False"
            )
        looked_at = layers.blend if self.blend.any else {}
        processors: dict[str, CrossAttention | SelfAttention] = {
            name: CrossAttention(
                layer_of(network, name).processor, rows, partial(self._rewrite, name, looked_at.get(name))
            )
            for name in (layers.cross if self.cross.num_steps else looked_at)
        }
        for name in self.own_layers(layers):
            original, borrow = layer_of(network, name).processor, partial(self._borrow, name)
            processors[name] = SelfAttention(original, borrow, both_halves=self.both_halves)
        return processors

    def _rewrite(self, name: str, looked_at: Grid | None) -> Rewrite | None:
        """What happens to a layer's cross-attention in this step."""
        self._note(name)
        replace = partial(self.cross, step=self._step) if self._step < self.cross.num_steps else None
        if looked_at is None:
            return replace

        def observed(probabilities: Tensor) -> Tensor:
            attended = probabilities if replace is None else replace(probabilities)
            self.blend.observe(self.seen(probabilities, attended), looked_at)
            return attended

        return observed

    def _borrow(self, name: str) -> Rows | None:
        """Whose self-attention each row has in this step; None: its own."""
        self._note(name)
        return self.own(self._step)

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
    """Prompt-to-Prompt: of 2 P rows, sources and targets, the targets look where their sources do in the first steps.

    After each step what lies outside of the changed words is the source.
    """

    def parts(self) -> tuple[CrossReplacement, SelfReplacement, LocalBlend]:
        """From the source, for the first steps; as published, one step is counted beyond the last across."""
        steps = self.num_steps
        counts = [min(int(pair.settings.cross_replace * (steps + 1)), steps) for pair in self.pairs]
        return (
            CrossReplacement(self.pairs, self.length, counts, self.device),
            SelfReplacement(self.pairs, steps, self.device),
            LocalBlend(self.pairs, self.length, steps, self.device),
        )

    def own_layers(self, layers: Layers) -> Sequence[str]:
        """The coarse ones."""
        return layers.own_replaced if self.own.num_steps else ()

    def seen(self, probabilities: Tensor, attended: Tensor) -> Tensor:
        """As published, the replaced attention."""
        return attended
