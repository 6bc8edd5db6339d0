"""What a network is told besides x and t: a named bag of tensors, in the words of diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Conditioning:
    """Tensors by name, each with a batch axis of B: which they are is a matter of conditioner and backbone.

    SD1.5 has `prompt_embeds` (B, L, D); SDXL also `pooled_prompt_embeds` (B, P) and `time_ids` (B, 6), see `Framing`.
    """

    def __init__(self, **tensors: Tensor) -> None:
        if len({len(tensor) for tensor in tensors.values()}) != 1:
            counts = ", ".join(f"{len(tensor)} of {name}" for name, tensor in tensors.items())
            raise ValueError(f"conditioning of {counts or 'nothing'}: give one of each for every sample")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """The chosen samples, always as a batch: an int gives a batch of one."""
        if isinstance(index, int):
            index = range(len(self))[index]  # negative counts from the end, and out of range is an IndexError
            index = slice(index, index + 1)
        return Conditioning(**{name: tensor[index] for name, tensor in self.tensors.items()})

    def replace(self, **tensors: Tensor) -> Conditioning:
        return Conditioning(**{**self.tensors, **tensors})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join batches of B1, B2, ... to one of B1 + B2 + ..."""
        names = parts[0].tensors.keys()
        if other := next((part.tensors.keys() ^ names for part in parts if part.tensors.keys() != names), None):
            raise ValueError(f"{min(other)} is set in some of the conditionings to join and not in others")
        return Conditioning(**{name: torch.cat([part.tensors[name] for part in parts]) for name in names})

    def repeat(self, count: int) -> Conditioning:
        """The whole batch `count` times over, a b a b: of B samples to one of count B."""
        return Conditioning.cat([self] * count)

    def where(self, chosen: Tensor, other: Conditioning) -> Conditioning:
        """These samples where chosen (B,) is true, and those of the other batch elsewhere."""
        count = len(self)
        return Conditioning.cat([self, other])[torch.arange(count, device=chosen.device) + count * ~chosen]

    def embeds(self) -> dict[str, Tensor]:
        """What text encoders made, by name: all but the framing."""
        return {name: tensor for name, tensor in self.tensors.items() if name != "time_ids"}


@dataclass(frozen=True)
class Framing:
    """Where B pictures of target_size (h, w) were cut out of their originals; SDXL is conditioned on it.

    A sample's metadata, as the data made it, holds `original_size` (h, w) and `crop_top_left` (top, left).
    """

    metadata: Sequence[Mapping[str, Any]]
    target_size: tuple[int, int]

    @classmethod
    def of_latents(cls, metadata: Sequence[Mapping[str, Any]], latents: Tensor, downsampling: int) -> Framing:
        """Of pictures `downsampling` times as large as their latents (B, C, h, w)."""
        height, width = latents.shape[-2:]
        return cls(metadata, (height * downsampling, width * downsampling))

    @classmethod
    def whole(cls, count: int, size: tuple[int, int]) -> Framing:
        return cls([{"original_size": size, "crop_top_left": (0, 0)}] * count, size)

    def time_ids(self) -> Tensor:
        """As the network is told it, (B, 6) float32: original, crop, target (2.2, arXiv:2307.01952)."""
        try:
            rows = [[*of["original_size"], *of["crop_top_left"], *self.target_size] for of in self.metadata]
        except KeyError as error:
            raise ValueError(
                f"a sample's metadata lacks {error}, which SDXL is conditioned on: data must say how large a picture "
                "was (original_size) and where it was cut (crop_top_left), as shards of pictures do"
            ) from error
        return torch.tensor(rows, dtype=torch.float32)
