"""`icd eval`: the students, the same jumps untrained, and DDIM-50, on the held-out picture world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from icd_lightning.data.manifest import sha256
from icd_lightning.editing.baselines.ddim import DDIMInversion
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.editing.method import EditingMethod
from icd_lightning.evaluation.methods import teacher_hash, untrained_pipeline
from icd_lightning.evaluation.report import print_table, wide_console
from icd_lightning.models.checkpoints import weights_file
from icd_lightning.models.family import Family
from icd_lightning.tiny.measuring import autoencoder_psnr, held_out
from icd_lightning.tiny.scene_network import SceneNetwork
from icd_lightning.tiny.study import StudySettings, remembered, study, write_json
from icd_lightning.tiny.tables import edit_table, generation_table, reconstruction_table

DDIM, UNTRAINED, TRAINED = "DDIM-50", "untrained", "iCD"


def evaluate_inversion(
    family: Family,
    settings: StudySettings,
    out: Path,
    *,
    forward: str | None = None,
    reverse: str | None = None,
    boundaries: str | None = None,
    ddim: bool = True,
) -> Path:
    """Measure, print the tables, and write results.json; return its path. What was measured before is reused."""
    trained = InvertibleConsistency.from_pretrained(family, forward=forward, reverse=reverse, boundaries=boundaries)
    network = SceneNetwork.from_pretrained(family.root / "scene_network")
    students = [
        weights_file(path or family.root / "students" / name)
        for path, name in ((forward, "forward"), (reverse, "reverse"))
    ]
    methods: dict[str, tuple[Callable[[], EditingMethod], str]] = {
        UNTRAINED: (lambda: untrained_pipeline(family, trained.boundaries), teacher_hash(family)),
        TRAINED: (lambda: trained, teacher_hash(family) + sha256(*students)),
    }
    if ddim:
        methods = {DDIM: (lambda: DDIMInversion(family), teacher_hash(family)), **methods}
    results = {}
    for index, (name, (make, weights)) in enumerate(methods.items()):
        key = {"method": name, "settings": settings, "weights": weights, "boundaries": trained.boundaries}
        results[name] = remembered(
            out / "parts" / f"{index}-{name.replace(' ', '-')}.json",
            key,
            lambda make=make: study(make(), network, settings),
        )
    ceiling = autoencoder_psnr(trained.autoencoder, held_out(settings.count, settings.seed))
    console = wide_console()
    print_table(reconstruction_table(results, settings, ceiling=ceiling, ours=TRAINED), console)
    print_table(edit_table(results, settings, ours=TRAINED), console)
    print_table(generation_table(results, settings, ours=TRAINED), console)
    write_json(out / "results.json", {"settings": vars(settings), "autoencoder_psnr": ceiling, "methods": results})
    return out / "results.json"
