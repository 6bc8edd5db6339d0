"""torch.compile for networks that carry adapters."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from icd_lightning.models.diffusion_model import DiffusionModel

VARIANTS = 64
"""Compiled versions of a network that may exist: teacher and students, with and without gradient, at some sizes."""


def why_not_compiled(device: torch.device, backend: str) -> str | None:
    """Try torch.compile on a few numbers, forward and backward; what is in the way, or None."""
    numbers = torch.ones(8, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: x.sin().sum(), backend=backend)(numbers).backward()
    except Exception as error:  # a compiler, Triton or Python headers may be missing; each says so in a way of its own
        return str(error).strip().splitlines()[0]
    return None


def compile_networks(models: Iterable[DiffusionModel], backend: str) -> None:
    """Compile every network as a whole and in place, so that names of weights stay as they are.

    Which adapter is on is a list that each LoRA layer reads, on which the compiled code is conditioned: a switch to
    another adapter compiles another version the first time, and from then on selects it. How many versions there may be
    has no public name in torch.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled after all runs as it is, with a warning
    for model in models:
        model.network.compile(backend=backend)
