"""An attention processor of diffusers that lets the rows of a batch look where others look, and how to put it in place.

Only the last rows of a batch are touched; those before them, the unconditional ones of classifier-free
guidance, are attended as ever. Where nothing is to be done, the processor hands over to the one it stands for.

Shapes: R rows touched, N queries, M keys (N of self-attention, L tokens of cross-attention).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
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
