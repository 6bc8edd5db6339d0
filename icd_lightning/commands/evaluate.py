"""`icd eval`: methods over the held-out picture world."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


def evaluate(
    *,
    model: str = "tiny",
    forward: str | None = None,
    reverse: str | None = None,
    count: int = 128,
    guidance_scale: float = 3.0,
    tau: float = 0.8,
    seed: int = 1_000_003,
    ddim: bool = True,
    out: str = "outputs/eval-inversion",
) -> None:
    """To noise and back, generated and edited, on held-out scenes: two students, with DDIM-50 beside them.

    Args:
        model: "tiny" (shipped) or the folder of a family of the picture world.
        forward: the forward student, a folder or file; by default the family's own.
        reverse: the reverse student; by default the family's own.
        count: scenes to measure on.
        guidance_scale: w of the guided decodings; 1 is unguided.
        tau: dynamic guidance guides at t <= tau T only.
        seed: which world the scenes come from.
        ddim: measure DDIM-50 too, which takes most of the time.
        out: folder for results.json; what was measured before with the same settings and weights is reused.
    """
    from pathlib import Path

    from icd_lightning.evaluation.inversion import evaluate_inversion
    from icd_lightning.evaluation.study import StudySettings
    from icd_lightning.models.family import Family

    settings = StudySettings(count=count, guidance_scale=guidance_scale, tau=tau, swap_tau=tau, seed=seed)
    file = evaluate_inversion(Family(model), settings, Path(out), forward=forward, reverse=reverse, ddim=ddim)
    log.info("%s", file)
