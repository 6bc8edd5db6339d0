"""The local blend: outside of what the changed words are about, the target is the source."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from icd_lightning.editing.prompt_to_prompt.alignment import Pair


class LocalBlend:
    """The attention to the changed words of P pairs, summed over steps, layers and heads, and the masks it makes."""

    def __init__(self, pairs: Sequence[Pair], length: int, num_steps: int, device: torch.device) -> None:
        words = torch.stack([pair.blend_words(length) for pair in pairs], dim=1).to(device)  # (2, P, L)
        self._blended = words.any(dim=2).any(dim=0)
        self.any = bool(self._blended.any())
        self._words = words.flatten(0, 1)
        self._thresholds = torch.tensor([pair.settings.blend_threshold for pair in pairs], device=device).repeat(2)
        # after how many steps each pair's blending begins
        self._begins = torch.tensor([int(pair.settings.blend_from * num_steps) for pair in pairs], device=device)
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self._maps: Tensor | None = None

    def observe(self, probabilities: Tensor, grid: tuple[int, int]) -> None:
        """Add the cross-attention (2 P, heads, h' w', L) of a layer whose grid is (h', w')."""
        seen = torch.einsum("bhnl,bl->bn", probabilities, self._words).unflatten(1, grid)
        self._maps = seen if self._maps is None else self._maps + seen

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """x (2 P, C, h, w), sources and targets, with the targets blended after the given number of steps."""
        if self._maps is None:
            return x
        maps = max_pool2d(self._maps[:, None], kernel_size=3, stride=1, padding=1)
        maps = interpolate(maps, size=x.shape[2:])
        masks = maps > self._thresholds.view(-1, 1, 1, 1) * maps.amax(dim=(2, 3), keepdim=True)
        edited = torch.logical_or(*masks.chunk(2))
        free = ~self._blended | (step <= self._begins)
        source, target = x.chunk(2)
        return torch.cat([source, torch.where(edited | free.view(-1, 1, 1, 1), target, source)])
