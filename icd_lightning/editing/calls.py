"""What every call of the pipeline goes through: prompts and pictures made as many, steps followed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from icd_lightning.diffusion import Step
from icd_lightning.editing.pictures import OUTPUT_TYPES

OnStepEnd = Callable[..., dict[str, Any] | None]
"""callback(pipe, index, t, {"latents": ...}); latents that it returns replace those of the step."""


class Watch:
    """Follows a call's steps: counts evaluations, moves the progress bar, calls the callback; at the end, offloads."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        total: int,
        callback: OnStepEnd | None,
        output_type: str = OUTPUT_TYPES[0],
    ) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r} is none of {', '.join(OUTPUT_TYPES)}")
        self.pipe, self.total, self.callback = pipe, total, callback
        self.branches = 1  # rows of one picture in the network
        self.index = 0

    def __enter__(self) -> Watch:
        self.pipe.nfe = 0
        self.bar = self.pipe.progress_bar(total=self.total)
        return self

    def __call__(self, step: Step) -> None:
        self.pipe.nfe += step.nfe * self.branches
        self.bar.update()
        if self.callback is not None:
            changed = self.callback(self.pipe, self.index, step.t, {"latents": step.x}) or {}
            if "latents" in changed:
                if changed["latents"].shape != step.x.shape:
                    raise ValueError(
                        f"the callback returned latents of shape {tuple(changed['latents'].shape)} for those of "
                        f"{tuple(step.x.shape)}"
                    )
                step.x.copy_(changed["latents"])  # the loop goes on from it
        self.index += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        self.pipe.maybe_free_model_hooks()


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
