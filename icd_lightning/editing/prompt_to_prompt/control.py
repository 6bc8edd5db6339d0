"""The state of Prompt-to-Prompt edits while they are decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from icd_lightning.diffusion import Step
from icd_lightning.editing.prompt_to_prompt.alignment import PromptTokens, align
from icd_lightning.editing.prompt_to_prompt.attention import (
    CrossAttention,
    Rewrite,
    SelfAttention,
    layer_of,
    processors_in_place,
)
from icd_lightning.editing.prompt_to_prompt.blend import LocalBlend
from icd_lightning.editing.prompt_to_prompt.layers import Grid, choose_layers
from icd_lightning.editing.prompt_to_prompt.settings import Pair, PromptToPrompt


class PromptToPromptControl:
    """P edits while they are decoded: which step it is, whose attention goes where, what the blend has seen.

    Args:
        settings: for all pairs, or one for each.
        sources, targets: P prompts each.
        noise: (P, C, h, w), where decoding begins.
        tokenizer: the text encoder's.
        num_steps: how many steps decoding takes; the settings' fractions are of these.
    """

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
        length, device = tokenizer.model_max_length, noise.device
        self.num_steps, self.size = num_steps, (noise.shape[-2], noise.shape[-1])
        self._cross = _CrossReplacement(self.pairs, length, num_steps, device)
        self._self = _SelfReplacement(self.pairs, num_steps, device)
        self._blend = LocalBlend(self.pairs, length, num_steps, device)
        self._begin()

    def step(self, x: Tensor) -> Tensor:
        """End a step: x (2 P, C, h, w), sources and targets, to x with the targets blended."""
        self._step += 1
        self._evaluated.clear()
        return self._blend(x, self._step)

    def on_step(self, step: Step) -> None:
        """End a step of a loop of `diffusion.sampling`, which goes on from what is written into the step's x."""
        step.x.copy_(self.step(step.x))

    @contextmanager
    def attached(self, unet: UNet2DConditionModel) -> Iterator[None]:
        """Control the UNet's attention, from the first step on; afterwards every layer is as it was."""
        self._begin()
        with processors_in_place(unet, self._processors(unet)):
            yield

    def _begin(self) -> None:
        self._step = 0
        self._evaluated: set[str] = set()
        self._blend.reset()

    def _processors(self, unet: UNet2DConditionModel) -> dict[str, CrossAttention | SelfAttention]:
        """Processors, by name, for the layers that are ever read."""
        layers, rows = choose_layers(unet, self.size), 2 * len(self.pairs)
        if self._blend.any and not layers.blend:
            raise ValueError(
                f"at latents of {self.size[0]} x {self.size[1]} this UNet has no cross-attention coarse enough for the "
                "local blend to look at: set blend to False"
            )
        looked_at = layers.blend if self._blend.any else {}
        found: dict[str, CrossAttention | SelfAttention] = {
            name: CrossAttention(
                layer_of(unet, name).processor, rows, partial(self._rewrite, name, looked_at.get(name))
            )
            for name in (layers.cross if self._cross.num_steps else looked_at)
        }
        for name in layers.own if self._self.num_steps else ():
            found[name] = SelfAttention(layer_of(unet, name).processor, rows, partial(self._borrow, name))
        return found

    def _rewrite(self, name: str, looked_at: Grid | None) -> Rewrite | None:
        """What happens to a layer's cross-attention in this step."""
        self._note(name)
        replace = partial(self._cross, step=self._step) if self._step < self._cross.num_steps else None
        if looked_at is None:
            return replace

        def observed(probabilities: Tensor) -> Tensor:
            # As published, the maps are those of the replaced attention.
            probabilities = probabilities if replace is None else replace(probabilities)
            self._blend.observe(probabilities, looked_at)
            return probabilities

        return observed

    def _borrow(self, name: str) -> Tensor | None:
        """Whose self-attention each row has in this step (2 P,); None: its own."""
        self._note(name)
        return self._self(self._step) if self._step < self._self.num_steps else None

    def _note(self, name: str) -> None:
        """Maps would count twice, and the unconditional be taken for the conditional, without a word."""
        if name in self._evaluated:
            raise ValueError(
                "the network was evaluated twice in one step of Prompt-to-Prompt: evaluate all branches in one batch, "
                "the conditional ones last, and end each step by control.step or control.on_step"
            )
        if self._step >= self.num_steps:
            raise ValueError(f"this control was made for {self.num_steps} steps: give it the num_steps of the loop")
        self._evaluated.add(name)


class _CrossReplacement:
    """New cross-attention of P targets, linear in the source's and its own."""

    def __init__(self, pairs: Sequence[Pair], length: int, num_steps: int, device: torch.device) -> None:
        counts = [int(pair.settings.cross_replace * (num_steps + 1)) for pair in pairs]
        self.num_steps = min(max(counts), num_steps)
        self._counts = torch.tensor(counts, device=device)
        alignments = [align(pair.source, pair.target, length, pair.settings.alignment) for pair in pairs]
        factors = torch.stack([pair.factors(length) for pair in pairs])
        aligned = torch.stack([alignment.aligned for alignment in alignments])
        mappers = torch.stack([alignment.mapper for alignment in alignments])
        self._from_source = (mappers * (aligned * factors)[:, None]).to(device)  # (P, L, L)
        self._from_target = ((1 - aligned) * factors).to(device)  # (P, L)

    def __call__(self, probabilities: Tensor, *, step: int) -> Tensor:
        """Probabilities (2 P, heads, N, L) of sources and targets, with the targets' replaced where it is time."""
        source, target = probabilities.chunk(2)
        replaced = source @ self._from_source[:, None] + target * self._from_target[:, None, None]
        now = (step < self._counts).view(-1, 1, 1, 1)
        return torch.cat([source, torch.where(now, replaced, target)])


class _SelfReplacement:
    """Whose self-attention P sources and P targets have: their own, or the targets their source's."""

    def __init__(self, pairs: Sequence[Pair], num_steps: int, device: torch.device) -> None:
        counts = [int(pair.settings.self_replace * num_steps) for pair in pairs]
        self.num_steps = max(counts)
        self._counts = torch.tensor(counts, device=device).repeat(2)
        self._own = torch.arange(2 * len(pairs), device=device)

    def __call__(self, step: int) -> Tensor:
        """The row (2 P,) of [sources, targets] that each row attends as."""
        return torch.where(step < self._counts, self._own % (len(self._own) // 2), self._own)
