"""What an edit costs."""

from __future__ import annotations

import time

import torch

from icd_lightning.diffusion import Step


class Clock:
    """Counts evaluations and seconds since it was made; `count` is what methods take as `on_step`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.nfe, self.start = device, 0, 0.0
        self.start = self.seconds()

    def count(self, step: Step) -> None:
        self.nfe += step.nfe

    def seconds(self) -> float:
        """Passed so far, with all work of a GPU done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.start
