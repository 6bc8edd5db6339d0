"""What every call of the pipeline goes through: prompts and pictures made as many, steps followed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from icd_lightning.diffusion import OnStep, Step
from icd_lightning.editing.pictures import OUTPUT_TYPES

OnStepEnd = Callable[..., dict[str, Any] | None]
"""callback(pipe, index, t, {"latents": ...}); latents that it returns replace those of the step."""


@contextmanager
def followed(
    pipe: DiffusionPipeline, total: int, callback: OnStepEnd | None, output_type: str = OUTPUT_TYPES[0]
) -> Iterator[OnStep]:
    """What follows a call's steps: counts evaluations, moves the progress bar, calls the callback; then offloads."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type {output_type!r} is none of {', '.join(OUTPUT_TYPES)}")
    pipe.nfe, bar, numbers = 0, pipe.progress_bar(total=total), count()

    def on_step(step: Step) -> None:
        pipe.nfe += step.nfe
        bar.update()
        changed = callback(pipe, next(numbers), step.t, {"latents": step.x}) if callback is not None else None
        if changed and "latents" in changed:
            given, expected = tuple(changed["latents"].shape), tuple(step.x.shape)
            if given != expected:
                raise ValueError(f"the callback returned latents of shape {given} for those of {expected}")
            step.x.copy_(changed["latents"])  # the loop goes on from it

    try:
        yield on_step
    finally:
        bar.close()
        pipe.maybe_free_model_hooks()


def as_texts(prompt: str | Sequence[str], name: str) -> list[str]:
    """One prompt or several, as a list."""
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} {prompt!r} must be text, or a list of texts")
    return texts


def batch_size(**parts: Sequence | Tensor | None) -> int:
    """How many pictures these make: each part is of one, or of B."""
    counts = {name: len(part) for name, part in parts.items() if part is not None}
    most = max(counts.values())
    if set(counts.values()) - {1, most}:
        given = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise ValueError(f"{given} do not go together: give one, or as many of each")
    return most


def one_for_each(part: Any, count: int) -> Any:
    """One for all, as one for each."""
    if len(part) == count:
        return part
    return part.repeat(count, 1, 1, 1) if isinstance(part, Tensor) else part * count
