"""The frozen base in fewer bits, by torchao: adapters stay float32, and gradients reach them as before."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

Quantization = Literal["int8", "nf4"]
"""int8: a scale for each output; nf4: 4 bits with a scale for 64 weights (arXiv:2305.14314)."""
KINDS: tuple[Quantization, ...] = get_args(Quantization)
NF4_BLOCK = 64 * 256
"""Weights of a layer come in multiples of it: blocks of 64, whose scales are kept in blocks of 256."""


def quantize(network: nn.Module, blocks: tuple[type[nn.Module], ...], kind: Quantization) -> None:
    """Keep the weights of linear layers in a network's blocks in this kind, in place; for good.

    What lies outside of the blocks, convolutions, and layers that are too small for a kind's scales, stay as they are.
    Raises ValueError where torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_, to_nf4
    except ImportError as error:
        raise ValueError(f"quantization {kind} needs torchao: pip install 'icd_lightning[quantization]'") from error
    layers = quantized_layers(network, blocks)
    if kind == "int8":
        quantize_(network, Int8WeightOnlyConfig(), filter_fn=lambda part, _: part in layers)
        return
    with torch.no_grad():
        for layer in layers:
            layer.weight = nn.Parameter(to_nf4(layer.weight), requires_grad=False)


def quantized_layers(network: nn.Module, blocks: tuple[type[nn.Module], ...]) -> list[nn.Linear]:
    inside = {part for block in network.modules() if isinstance(block, blocks) for part in block.modules()}
    return [part for part in inside if isinstance(part, nn.Linear) and part.weight.numel() % NF4_BLOCK == 0]


def bytes_of(network: nn.Module, blocks: tuple[type[nn.Module], ...] = (), kind: Quantization | None = None) -> int:
    """Bytes of a network's weights and buffers as they are, or as `quantize` would leave them; also on `meta`."""
    total = sum(one.numel() * one.element_size() for one in (*network.parameters(), *network.buffers()))
    for weight in (layer.weight for layer in quantized_layers(network, blocks) if kind):
        count, scale = weight.numel(), weight.element_size()
        inner = count + len(weight) * scale if kind == "int8" else count // 2 + count // 64 + count // NF4_BLOCK * scale
        total += inner - count * scale
    return total
