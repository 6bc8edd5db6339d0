"""Which attention layers of a UNet Prompt-to-Prompt acts on, at latents of any size.

Published for 64 x 64 latents: self-attention is replaced in layers of up to 32 x 32 tokens, and the local blend reads
the 16 x 16 maps of the down and up blocks. For larger latents the proportion counts, half and a quarter of a side, so
that the same layers are meant; for smaller ones the numbers, since a map of 2 x 2 shows no place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from weakref import WeakKeyDictionary

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

Grid = tuple[int, int]
"""Height and width of the places that a layer attends from."""
_FOUND: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Layers:
    """Names of processors: all of cross-attention, all and the replaced ones of self-attention, the maps blended by."""

    cross: list[str]
    own: list[str]
    own_replaced: list[str]
    blend: dict[str, Grid]


def choose_layers(network: nn.Module, size: Grid) -> Layers:
    """The layers of a UNet at latents of size (h, w); ValueError for a network of another kind."""
    if "block_out_channels" not in network.config:
        raise ValueError(
            f"Prompt-to-Prompt changes the cross-attention of a UNet, which {type(network).__name__} does not have: "
            "borrow by an Injection, or nothing"
        )
    last = len(network.config.block_out_channels) - 1

    def grid(name: str) -> Grid:
        block, index = name.split(".")[:2]
        if block == "mid_block":
            return _halved(size, last)
        return _halved(size, int(index) if block == "down_blocks" else last - int(index))

    grids = {f"{name}.processor": grid(name) for name in attention_layers(network)}
    cross = [name for name in grids if name.endswith(".attn2.processor")]
    own = [name for name in grids if name.endswith(".attn1.processor")]
    replaced = max(32 * 32, prod(_halved(size, 1)))
    blended = max(16 * 16, prod(_halved(size, 2)))
    sided = [name for name in cross if not name.startswith("mid_block") and prod(grids[name]) <= blended]
    finest = max((grids[name] for name in sided), key=prod, default=None)
    return Layers(
        cross,
        own,
        own_replaced=[name for name in own if prod(grids[name]) <= replaced],
        blend={name: grids[name] for name in sided if grids[name] == finest},
    )


def attention_layers(network: nn.Module) -> list[str]:
    """The names of a network's attention layers, from first to last: walked once, as long as small ones evaluate."""
    if network not in _FOUND:
        _FOUND[network] = list(_walk(network))
    return _FOUND[network]


def _walk(module: nn.Module, name: str = "") -> Iterator[str]:
    for child_name, child in module.named_children():
        if isinstance(child, (Attention, AttentionModuleMixin)):
            yield f"{name}{child_name}"
        else:
            yield from _walk(child, f"{name}{child_name}.")


def _halved(size: Grid, times: int) -> Grid:
    return ceil(size[0] / 2**times), ceil(size[1] / 2**times)  # as a convolution of stride 2 rounds
