"""One method over the held-out picture world: reconstruction, generation and edits, as plain numbers."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from icd_lightning.diffusion import GuidanceSchedule, StepGuidance
from icd_lightning.editing.method import EditingMethod
from icd_lightning.evaluation.benchmarks import guidance_name, step_guidances
from icd_lightning.files import write_whole
from icd_lightning.tiny.measuring import (
    held_out,
    measure_edits,
    measure_generation,
    measure_reconstruction,
    random_edits,
)
from icd_lightning.tiny.scene_network import SceneNetwork
from icd_lightning.tiny.scenes import HELD_OUT_SEED

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudySettings:
    """How much to measure, on which held-out scenes, and with which guidance.

    `tau` is of dynamic guidance in reconstructions, beside guidance throughout; `edit_tau` of generations and edits,
    which follow the source prompt while t > edit_tau T.
    """

    count: int = 64
    guidance_scale: float = 3.0
    tau: float = 0.8
    edit_tau: float = 1.0
    seed: int = HELD_OUT_SEED

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count {self.count} must be 1 or more")

    def guidances(self) -> dict[str, GuidanceSchedule]:
        """Of reconstructions: unguided, guided throughout, and dynamically guided."""
        return step_guidances(self.guidance_scale, (1.0, self.tau))

    @property
    def editing(self) -> StepGuidance:
        """Of generations and edits."""
        return StepGuidance(self.guidance_scale, self.edit_tau)

    @property
    def edited(self) -> str:
        """The name of that."""
        return guidance_name(self.guidance_scale, self.edit_tau)


def study(method: EditingMethod, network: SceneNetwork, settings: StudySettings) -> dict[str, Any]:
    """Measure a method; returns {"reconstruction": rows, "generation": shares, "edits": scores}, fit for JSON."""
    scenes = held_out(settings.count, settings.seed)
    edits = measure_edits(method, network, scenes, random_edits(scenes), settings.editing, swap_tau=settings.edit_tau)
    return {
        "reconstruction": measure_reconstruction(method, scenes, settings.guidances()),
        "generation": measure_generation(method, network, scenes, settings.editing),
        "edits": asdict(edits),
    }


def remembered(file: Path, key: Any, compute: Callable[[], dict]) -> dict:
    """What `file` holds, if it was computed under the same key (any JSON value); else compute it and write it."""
    fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    if file.is_file():
        stored = json.loads(file.read_text())
        if stored.get("fingerprint") == fingerprint:
            log.info("%s: reused", file)
            return stored["result"]
    result = compute()
    write_json(file, {"fingerprint": fingerprint, "key": key, "result": result})
    return result


def write_json(file: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(file, json.dumps(value, indent=2, default=str) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write text, whole or not at all."""
    write_whole(file, lambda temporary: temporary.write_text(text))
