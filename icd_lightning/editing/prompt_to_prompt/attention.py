"""An attention processor of diffusers that lets the rows of a batch look where others look, and how to put it in place.

Only the last rows of a batch are touched; those before them, the unconditional ones of classifier-free
guidance, are attended as ever. Where nothing is to be done, the processor hands over to the one it stands for.

Shapes: R rows touched, N queries, M keys (N of self-attention, L tokens of cross-attention).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(B, heads, N, d) of queries (B, heads, N, d), keys and values (B, heads, M, d), and the scale of their products."""


Changes = Mapping[str, Callable[..., Any]]
"""How layers attend in a step, by the names of processors: what a stand-in calls; it returns None for as ever."""


class Rows(NamedTuple):
    """The rows (R,) among those touched whose queries, keys and values each row attends with; values None: its own."""

    query: Tensor
    key: Tensor
    value: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StandIn:
    """Stands for the processor `original`, and attends otherwise where `change` says how; None: not now."""

    original: Any
    change: Callable[..., Any]


class ControlledAttention(StandIn):
    """Of a UNet, by `Attend | None` = change()."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        attend = self.change()
        if attend is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask)
        assert attention_mask is None, "nothing here masks attention"
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        project, dropout = attn.to_out
        return dropout(project(attend(query, key, value, attn.scale).transpose(1, 2).flatten(2)))


def attend_rewritten(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, num_rows: int, rewrite: Callable[[Tensor], Tensor]
) -> Tensor:
    """Attend with the last rows' probabilities (R, heads, N, M) float32 as `rewrite` changes them.

    These rows leave the fused kernel, which never shows its probabilities.
    """
    free = free_rows(query, num_rows)
    scores = (query[free:] * scale) @ key[free:].transpose(-1, -2)
    attended = rewrite(scores.softmax(dim=-1, dtype=torch.float32)).to(value.dtype) @ value[free:]
    if not free:
        return attended
    others = scaled_dot_product_attention(query[:free], key[:free], value[:free], scale=scale)
    return torch.cat([others, attended])


def attend_borrowed(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, rows: Rows, both_halves: bool
) -> Tensor:
    """Attend with the queries, keys and values of other rows; `both_halves`: so do as many unconditional ones.

    Equal queries and keys make equal probabilities, so that this needs no look at them and stays in the fused kernel.
    """
    count = len(rows.query)
    free = free_rows(query, count)
    lent = []
    for x, whose in zip((query, key, value), rows, strict=True):
        halves = [x[:free], x[free:]]
        if whose is not None:
            halves[1] = halves[1][whose]
            if both_halves and free == count:
                halves[0] = halves[0][whose]
        lent.append(torch.cat(halves))
    return scaled_dot_product_attention(*lent, scale=scale)


@contextmanager
def attention_changed(network: nn.Module, changes: Changes, stand_in: type[StandIn]) -> Iterator[None]:
    """Attend as `changes` say, by the names of processors; afterwards, also after an error, as before."""
    layers = {name: network.get_submodule(name.removesuffix(".processor")) for name in changes}
    before = {name: layer.processor for name, layer in layers.items()}
    for name, processor in before.items():
        if isinstance(processor, (nn.Module, StandIn)):
            raise ValueError(
                f"attention of this network is already changed by {type(processor).__name__}, at {name}: unload "
                "IP-Adapters, and control one edit at a time"
            )
    try:
        for name, layer in layers.items():
            layer.set_processor(stand_in(before[name], changes[name]))
        yield
    finally:
        for name, layer in layers.items():
            layer.set_processor(before[name])


def free_rows(query: Tensor, num_rows: int) -> int:
    """How many rows come before the last `num_rows`, which are touched."""
    if len(query) < num_rows:
        raise ValueError(
            f"the network got a batch of {len(query)} while attention of {num_rows} rows, sources and "
            "targets, is controlled: evaluate them together"
        )
    return len(query) - num_rows


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
    """The layers of a UNet at latents of size (h, w); ValueError for a network of another kind.

    Published for 64 x 64 latents: self-attention is replaced in layers of up to 32 x 32 tokens, and the local blend
    reads the 16 x 16 maps of the down and up blocks. For larger latents the proportion counts, half and a quarter of a
    side, so that the same layers are meant; for smaller ones the numbers, since a map of 2 x 2 shows no place.
    """
    if "block_out_channels" not in network.config:
        raise ValueError(
            f"Prompt-to-Prompt changes the cross-attention of a UNet, which {type(network).__name__} does not have: "
            "borrow by an Injection on FLUX and SD3, else swap the prompt (icd_swap)"
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
