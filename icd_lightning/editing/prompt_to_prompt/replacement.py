"""What replaces the attention of P targets: probabilities across, queries and keys within."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icd_lightning.editing.limits import PromptToPrompt
from icd_lightning.editing.prompt_to_prompt.alignment import Pair, align
from icd_lightning.editing.prompt_to_prompt.attention import Rows


def self_counts(settings: Sequence[PromptToPrompt], num_steps: int) -> list[int]:
    """In how many of num_steps, for each edit, self-attention is the source's."""
    return [int(one.self_replace * num_steps) for one in settings]


class CrossReplacement:
    """New cross-attention of P targets, linear in the source's and its own, in each pair's first `counts` steps."""

    def __init__(self, pairs: Sequence[Pair], length: int, counts: Sequence[int], device: torch.device) -> None:
        self.num_steps = max(counts)
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
        now = (step < self._counts).view(-1, 1, 1, 1)
        return torch.cat([source, torch.where(now, self.replaced(source, target), target)])

    def replaced(self, source: Tensor, target: Tensor) -> Tensor:
        """The targets' probabilities (P, heads, N, L) as they would come from the sources'."""
        return source @ self._from_source[:, None] + target * self._from_target[:, None, None]


class SelfReplacement:
    """Whose self-attention P sources and P targets have: their own, or the targets their source's at first."""

    def __init__(self, pairs: Sequence[Pair], num_steps: int, device: torch.device) -> None:
        counts = self_counts([pair.settings for pair in pairs], num_steps)
        self.num_steps = max(counts)
        self._counts = torch.tensor(counts, device=device)
        self._source = torch.arange(len(pairs), device=device)

    def __call__(self, step: int) -> Rows | None:
        """The rows (2 P,) of [sources, targets] whose queries and keys each row attends with; None: its own."""
        if step >= self.num_steps:
            return None
        target = torch.where(step < self._counts, self._source, self._source + len(self._source))
        rows = torch.cat([self._source, target])
        return Rows(rows, rows)
