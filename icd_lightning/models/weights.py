"""Weights as files hold them: read, checked against a network, and told apart."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from icd_lightning.files import check_file
from icd_lightning.progress import without_bars

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_weights(file: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A state dict, in this type if one is given, safetensors or pickled; nothing in a pickle is run.

    Raises ValueError for a file of anything else, and for weights that are not finite.
    """
    try:
        check_file(file)
        weights = load_file(file) if file.suffix == ".safetensors" else read_pickled(file)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as a file of weights ({first_line(error)})") from error
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ValueError(f"{file} holds something else than one network's state dict, a dict of tensors by name")
    for name, weight in weights.items():
        if weight.is_complex() or (weight.is_floating_point() and weight.dtype not in FLOATS):
            raise ValueError(f"{file}: {name} is of {weight.dtype}: convert it to one of {', '.join(map(str, FLOATS))}")
    if wrong := not_finite(weights.items()):
        raise ValueError(f"{file}: {wrong} is not finite, so these are no trained weights")
    return {name: weight.to(dtype) for name, weight in weights.items()}


def read_header(file: Path) -> dict[str, str]:
    """What a safetensors file says of its weights, none of them being read; ValueError if it is damaged or cut."""
    try:
        check_file(file)
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as a file of weights ({first_line(error)})") from error


def read_pickled(file: Path) -> Any:
    """What torch.save wrote, on the CPU, nothing in it being run; ValueError with the reason if it cannot be read."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle ends in KeyError, UnicodeDecodeError, AssertionError ...
        raise ValueError(first_line(error)) from error


def check_fit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: Path | str, what: str) -> None:
    """Raise ValueError unless these weights of a file have the names, shapes and kinds expected, of `what`."""
    missing, unknown = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    both = expected.keys() & weights.keys()
    other = {name for name in both if _kind(weights[name]) != _kind(expected[name])}
    if wrong := [*sorted(missing), *sorted(unknown), *sorted(other)]:
        first, shapes = wrong[0], ""
        if first in other:
            shapes = f" of {_kind(weights[first])} in the place of {_kind(expected[first])}"
        raise ValueError(
            f"{file} is not of {what}: {len(missing)} weights missing, {len(unknown)} unknown, "
            f"{len(other)} of another shape or type, for example {first}{shapes}"
        )


def _kind(weight: Tensor) -> str:
    """Its shape, and its type unless it is one of floats, any of which is as good."""
    return f"{tuple(weight.shape)}{'' if weight.is_floating_point() else f' {weight.dtype}'}"


def refuse_missing(names: list[str], where: str) -> None:
    """Libraries would fill weights that are not there with random ones, and say so in a warning at most."""
    if names:
        raise ValueError(f"{where} lacks {len(names)} of the network's weights, for example {names[0]}")


def fingerprint(*networks: nn.Module, most: int | None = None) -> str:
    """Tells networks apart by the signs of their weights, which no rounding to another precision changes.

    most: how many to look at in each tensor; by default all.
    """
    digest = hashlib.sha256()
    for network in networks:
        for parameter in network.parameters():
            digest.update(np.packbits(torch.signbit(parameter.detach().flatten()[:most]).cpu().numpy()))
    return digest.hexdigest()[:16]


def refuse_not_finite(network: nn.Module, where: str) -> None:
    """ValueError for weights that no training leaves, and of which every picture would be made."""
    if wrong := not_finite(network.named_parameters()):
        raise ValueError(f"{where}: {wrong} is not finite, so these are no trained weights")


def not_finite(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first of these weights that is not finite."""

    def ends(weight: Tensor) -> Tensor:  # nan passes to both; `isfinite` of every number takes thirty times as long
        return torch.stack(torch.aminmax(weight.detach()))

    return next((name for name, weight in weights if weight.numel() and not ends(weight).isfinite().all()), None)


@contextmanager
def told_of(where: str) -> Iterator[None]:
    """Name the place of damaged files in whatever error a library has for them; it draws no bars of its own."""
    try:
        with without_bars():
            yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if "memory" in str(error).lower():
            raise
        raise ValueError(f"{where} cannot be loaded ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .:")
