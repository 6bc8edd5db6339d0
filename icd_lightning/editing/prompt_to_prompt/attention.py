"""Attention processors of diffusers that let the rows of a batch look where others look, and how to put them in place.

Only the last rows of a batch are touched; those before them, the unconditional ones of classifier-free
guidance, are attended as ever. A processor that has nothing to do at an evaluation hands it to the one it stands for.

Shapes: R rows touched, N queries, M keys (N of self-attention, L tokens of cross-attention).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Rewrite = Callable[[Tensor], Tensor]
"""New attention probabilities (R, heads, N, M) float32 from those of the network."""


class Rows(NamedTuple):
    """The rows (R,) among those touched whose queries, keys and values each row attends with; values None: its own."""

    query: Tensor
    key: Tensor
    value: Tensor | None = None

    def twice(self) -> Rows:
        """For a batch of two halves, each with rows like these."""
        return Rows(*(None if rows is None else torch.cat([rows, rows + len(rows)]) for rows in self))


class _RowProcessor(ABC):
    """Stands for the processor `original`, and attends otherwise where `change()` says how; None: not now."""

    def __init__(self, original: Any, change: Callable[[], Any]) -> None:
        self.original, self.change = original, change

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        change = self.change()
        if change is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask)
        assert attention_mask is None, "nothing here masks attention"
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return _output(attn, self.attend(attn, _project(attn, hidden_states, context), change))

    @abstractmethod
    def attend(self, attn: Attention, projected: tuple[Tensor, ...], change: Any) -> Tensor:
        """(B, heads, N, d) of queries (B, heads, N, d), keys and values (B, heads, M, d)."""

    def free_rows(self, batch_size: int, num_rows: int) -> int:
        """How many rows come before the last `num_rows`, which are touched."""
        if batch_size < num_rows:
            raise ValueError(
                f"the network got a batch of {batch_size} while attention of {num_rows} rows, sources and "
                "targets, is controlled: evaluate them together"
            )
        return batch_size - num_rows


class CrossAttention(_RowProcessor):
    """Attends with probabilities that `rewrite()` changes: it returns how, or None to leave this evaluation alone.

    While it does, the rows touched leave the fused kernel, which never shows its probabilities.
    """

    def __init__(self, original: Any, num_rows: int, rewrite: Callable[[], Rewrite | None]) -> None:
        super().__init__(original, rewrite)
        self.num_rows = num_rows

    def attend(self, attn: Attention, projected: tuple[Tensor, ...], change: Rewrite) -> Tensor:
        query, key, value = projected
        free = self.free_rows(len(query), self.num_rows)
        scores = (query[free:] * attn.scale) @ key[free:].transpose(-1, -2)
        attended = change(scores.softmax(dim=-1, dtype=torch.float32)).to(value.dtype) @ value[free:]
        if not free:
            return attended
        others = scaled_dot_product_attention(query[:free], key[:free], value[:free], scale=attn.scale)
        return torch.cat([others, attended])


class SelfAttention(_RowProcessor):
    """Attends with the queries, keys and values of other rows: `borrow()` returns whose, or None for its own.

    `both_halves`: so do the unconditional rows, where there are as many. Equal queries and keys make equal
    probabilities, so that this needs no look at them and stays in the fused kernel.
    """

    def __init__(self, original: Any, borrow: Callable[[], Rows | None], *, both_halves: bool = False) -> None:
        super().__init__(original, borrow)
        self.both_halves = both_halves

    def attend(self, attn: Attention, projected: tuple[Tensor, ...], change: Rows) -> Tensor:
        free = self.free_rows(len(projected[0]), len(change.query))
        if self.both_halves and free == len(change.query):
            change, free = change.twice(), 0
        query, key, value = (_lent(x, whose, free) for x, whose in zip(projected, change, strict=True))
        return scaled_dot_product_attention(query, key, value, scale=attn.scale)


@contextmanager
def processors_in_place(network: nn.Module, processors: Mapping[str, _RowProcessor]) -> Iterator[None]:
    """Put processors in place by name; afterwards, also after an error, every layer has the one that it had."""
    layers = {name: layer_of(network, name) for name in processors}
    before = {name: layer.processor for name, layer in layers.items()}
    for name, processor in before.items():
        if isinstance(processor, (nn.Module, _RowProcessor)):
            raise ValueError(
                f"attention of this UNet is already changed by {type(processor).__name__}, at {name}: unload "
                "IP-Adapters, and control one edit at a time"
            )
    try:
        for name, processor in processors.items():
            layers[name].set_processor(processor)
        yield
    finally:
        for name, processor in before.items():
            layers[name].set_processor(processor)


def layer_of(network: nn.Module, name: str) -> Attention:
    """The layer of a processor, by the processor's name."""
    return network.get_submodule(name.removesuffix(".processor"))


def _project(attn: Attention, hidden_states: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    """Queries (B, heads, N, d), keys and values (B, heads, M, d) of a transformer block's attention."""
    projected = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
    return tuple(x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)


def _lent(x: Tensor, rows: Tensor | None, free: int) -> Tensor:
    """x (free + R, ...) with each of its last R rows taken from another of these; None: from itself."""
    if rows is None:
        return x
    lent = x[free:][rows]
    return torch.cat([x[:free], lent]) if free else lent


def _output(attn: Attention, attended: Tensor) -> Tensor:
    """(B, heads, N, d) to (B, N, D)."""
    project, dropout = attn.to_out
    return dropout(project(attended.transpose(1, 2).flatten(2)))
