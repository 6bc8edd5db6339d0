"""What a network is told besides x and t, in the words of diffusers. SD1.5 and SDXL differ in which fields are set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Prompt embeddings (B, L, D); for SDXL also pooled ones (B, P) and `time_ids` (B, 6), see `Framing`."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None
    time_ids: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.pooled_prompt_embeds is None) != (self.time_ids is None):
            raise ValueError("pooled_prompt_embeds and time_ids go together (SDXL): give both or neither")
        for name in ("pooled_prompt_embeds", "time_ids"):
            field = getattr(self, name)
            if field is not None and len(field) != len(self.prompt_embeds):
                raise ValueError(f"{name} holds {len(field)} samples, prompt_embeds {len(self.prompt_embeds)}")

    @classmethod
    def framed(cls, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor | None, framing: Framing) -> Conditioning:
        """Of embeddings made before; where there are pooled ones, the framing is told too."""
        ids = None if pooled_prompt_embeds is None else framing.time_ids().to(prompt_embeds.device)
        return cls(prompt_embeds, pooled_prompt_embeds, ids)

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """The chosen samples, always as a batch: an int gives a batch of one."""
        if isinstance(index, int):
            index = range(len(self))[index]  # negative counts from the end, and out of range is an IndexError
            index = slice(index, index + 1)
        return self._map(lambda field: field[index])

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join batches, (B1, L, D) and (B2, L, D) to (B1 + B2, L, D)."""

        def join(name: str) -> Tensor | None:
            fields = [getattr(part, name) for part in parts]
            if all(field is None for field in fields):
                return None
            if any(field is None for field in fields):
                raise ValueError(f"{name} is set in some of the conditionings to join and not in others")
            return torch.cat(fields)

        return Conditioning(join("prompt_embeds"), join("pooled_prompt_embeds"), join("time_ids"))

    def repeat(self, count: int) -> Conditioning:
        """The whole batch `count` times over, a b a b: (B, L, D) to (count B, L, D)."""
        return Conditioning.cat([self] * count)

    def where(self, chosen: Tensor, other: Conditioning) -> Conditioning:
        """These samples where chosen (B,) is true, and those of the other batch elsewhere."""
        count = len(self)
        return Conditioning.cat([self, other])[torch.arange(count, device=chosen.device) + count * ~chosen]

    def to(self, device: torch.device | str | None = None, *, dtype: torch.dtype | None = None) -> Conditioning:
        """Move, and cast the embeddings; time_ids keep their type, since 1023 is no bfloat16 number."""
        moved = self._map(lambda field: field.to(device=device))
        pooled = moved.pooled_prompt_embeds
        return Conditioning(
            moved.prompt_embeds.to(dtype=dtype), None if pooled is None else pooled.to(dtype=dtype), moved.time_ids
        )

    def embeds(self) -> dict[str, Tensor]:
        """What text encoders made, by name."""
        named = {"prompt_embeds": self.prompt_embeds, "pooled_prompt_embeds": self.pooled_prompt_embeds}
        return {name: embeds for name, embeds in named.items() if embeds is not None}

    def unet_kwargs(self) -> dict:
        """As keyword arguments of `UNet2DConditionModel`."""
        kwargs: dict = {"encoder_hidden_states": self.prompt_embeds}
        if self.pooled_prompt_embeds is not None:
            kwargs["added_cond_kwargs"] = {"text_embeds": self.pooled_prompt_embeds, "time_ids": self.time_ids}
        return kwargs

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        fields = (self.prompt_embeds, self.pooled_prompt_embeds, self.time_ids)
        return Conditioning(*(None if field is None else change(field) for field in fields))


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
        """Of pictures that are their own originals."""
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
