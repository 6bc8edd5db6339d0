"""Which attention layers of a UNet Prompt-to-Prompt acts on, at latents of any size.

Published for 64 x 64 latents: self-attention is replaced in layers of up to 32 x 32 tokens, and the local blend reads
the 16 x 16 maps of the down and up blocks. For larger latents the proportion counts, half and a quarter of a side, so
that the same layers are meant; for smaller ones the numbers, since a map of 2 x 2 shows no place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from diffusers.models.attention_processor import Attention
from torch import nn

Grid = tuple[int, int]
"""Height and width of the places that a layer attends from."""


@dataclass(frozen=True)
class Layers:
    """Names of processors: all of cross-attention, all and the replaced ones of self-attention, the maps blended by."""

    cross: tuple[str, ...]
    own: tuple[str, ...]
    own_replaced: tuple[str, ...]
    blend: dict[str, Grid]


def choose_layers(network: nn.Module, size: Grid) -> Layers:
    """The layers of a UNet at latents of size (h, w)."""
    grids = {name: _grid(size, _halvings(name, network)) for name in processor_names(network)}
    cross = {name: grid for name, grid in grids.items() if name.endswith(".attn2.processor")}
    own = {name: grid for name, grid in grids.items() if name.endswith(".attn1.processor")}
    replaced = _up_to(max(32 * 32, _area(_grid(size, 1))), own)
    sided = {name: grid for name, grid in cross.items() if not name.startswith("mid_block")}
    coarse = _up_to(max(16 * 16, _area(_grid(size, 2))), sided)
    finest = max(coarse.values(), key=_area, default=None)
    blend = {name: grid for name, grid in coarse.items() if grid == finest}
    return Layers(tuple(cross), tuple(own), tuple(replaced), blend)


def processor_names(module: nn.Module, name: str = "") -> Iterator[str]:
    """The keys of `attn_processors`, which takes as long to make as a small network to evaluate: it enters all LoRA."""
    for child_name, child in module.named_children():
        if isinstance(child, Attention):
            yield f"{name}{child_name}.processor"
        else:
            yield from processor_names(child, f"{name}{child_name}.")


def _halvings(name: str, network: nn.Module) -> int:
    """How often the latents were halved where a layer is."""
    last = len(network.config.block_out_channels) - 1
    block, index = name.split(".")[:2]
    if block == "mid_block":
        return last
    return int(index) if block == "down_blocks" else last - int(index)


def _grid(size: Grid, halvings: int) -> Grid:
    height, width = size
    return ceil(height / 2**halvings), ceil(width / 2**halvings)  # as a convolution of stride 2 rounds


def _area(grid: Grid) -> int:
    return grid[0] * grid[1]


def _up_to(limit: int, grids: dict[str, Grid]) -> dict[str, Grid]:
    return {name: grid for name, grid in grids.items() if _area(grid) <= limit}
