"""What `icd demo` measures and shows: the students before and after their training, with DDIM-50 beside them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icd_lightning.data.images import to_pictures
from icd_lightning.data.manifest import sha256
from icd_lightning.diffusion import Boundaries
from icd_lightning.editing.baselines.ddim import DDIMInversion
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.editing.method import EditingMethod, seeded_noise
from icd_lightning.evaluation.curves import read_scalars
from icd_lightning.evaluation.methods import teacher_hash, untrained_pipeline
from icd_lightning.evaluation.report import (
    Curve,
    Panel,
    Report,
    markdown_table,
    print_table,
    wide_console,
    write_report,
)
from icd_lightning.models.checkpoints import WEIGHTS_NAME
from icd_lightning.models.family import Family
from icd_lightning.tiny.measuring import autoencoder_psnr, held_out, images_of, random_edits
from icd_lightning.tiny.scene_network import SceneNetwork
from icd_lightning.tiny.scenes import Scene
from icd_lightning.tiny.study import StudySettings, remembered, study, write_json, write_text
from icd_lightning.tiny.tables import edit_table, generation_table, reconstruction_table
from icd_lightning.tiny.tour import DDIM, TRAINED, UNTRAINED

GENERATION_STEPS = (1, 2, 3, 4)


class DemoStudy:
    """Measures into `root`/results, remembers what it measured, and draws `root`/report.html and .png."""

    def __init__(self, root: Path, count: int, family: Family | None = None) -> None:
        self.root, self.family = root, family or Family()
        defaults = self.family.load_defaults()
        self.settings = StudySettings(count, defaults.guidance_scale, edit_tau=defaults.tau)
        self.network = SceneNetwork.from_pretrained(self.family.root / "scene_network")
        self.boundaries = Boundaries.uniform(4)
        self.results: dict[str, dict] = {}
        self.methods: dict[str, EditingMethod] = {}

    def measure_before(self) -> None:
        """DDIM-50 with the teacher, and the untrained students: the teacher's weights through the students' jumps."""
        self.methods[DDIM] = DDIMInversion(self.family)
        self.methods[UNTRAINED] = untrained_pipeline(self.family, self.boundaries)
        teacher = teacher_hash(self.family)
        self._measure(DDIM, "ddim", teacher)
        self._measure(UNTRAINED, "untrained", teacher)

    def measure_after(self) -> None:
        """The students as the training left them."""
        forward, reverse = (self.root / "training" / name for name in ("forward", "reverse"))
        self.methods[TRAINED] = InvertibleConsistency.from_pretrained(
            self.family, forward=str(forward), reverse=str(reverse)
        )
        self._measure(TRAINED, "trained", sha256(forward / WEIGHTS_NAME, reverse / WEIGHTS_NAME))

    def _measure(self, name: str, file: str, weights: str) -> None:
        key = {"settings": self.settings, "weights": weights}
        self.results[name] = remembered(
            self.root / "results" / f"{file}.json", key, lambda: study(self.methods[name], self.network, self.settings)
        )

    def report(self, *, seconds: float | None) -> None:
        """Write metrics.json, report.html and report.png; print the table and the paths."""
        scenes = held_out(self.settings.count, self.settings.seed)
        ceiling = autoencoder_psnr(self.methods[DDIM].autoencoder, scenes)
        write_json(self.root / "metrics.json", self._metrics(ceiling))
        tables = (
            reconstruction_table(self.results, self.settings, ceiling=ceiling, ours=TRAINED),
            edit_table(self.results, self.settings, ours=TRAINED),
            generation_table(self.results, self.settings, ours=TRAINED),
        )
        panels = (
            self._reconstructions(scenes[:6]),
            self._edits(scenes[:6]),
            self._generations((scenes[6:] or scenes)[:5]),
        )
        curves = self._curves()
        report = Report(
            title="Invertible Consistency Distillation, in miniature",
            subtitle="Both students of the tiny family, trained on this machine: pictures to noise in 4 network "
            "evaluations, noise to pictures in 4, an edit in 8.",
            summary=self._summary(),
            sections=(panels[0], tables[0], panels[1], tables[1], panels[2], tables[2], *curves),
            facts=self._facts(seconds),
        )
        shown = (replace(panels[1], rows=panels[1].rows[:5]), replace(panels[0], rows=panels[0].rows[:3]), tables[0])
        paths = write_report(report, self.root, png_sections=shown)
        write_text(self.root / "tables.md", "\n".join(markdown_table(table) for table in tables))
        console = wide_console()
        for table in tables:
            print_table(table, console)
        for path in (*paths, self.root / "tables.md", self.root / "metrics.json", self.root / "training"):
            console.print(str(path), highlight=False)

    # Numbers

    def _metrics(self, ceiling: float) -> dict[str, Any]:
        return {
            "settings": vars(self.settings),
            "autoencoder_psnr": ceiling,
            "before": {DDIM: self.results[DDIM], "students": self.results[UNTRAINED]},
            "after": {"students": self.results[TRAINED]},
            "machine": self._facts(None),
        }

    def _summary(self) -> tuple[tuple[str, str], ...]:
        ddim, before, after = (self.results[name] for name in (DDIM, UNTRAINED, TRAINED))
        speed = ddim["edits"]["seconds"] / after["edits"]["seconds"]
        return (
            (str(after["edits"]["nfe"]), f"network evaluations an edit; DDIM-50 takes {ddim['edits']['nfe']}"),
            (f"{speed:.0f}x", "faster than DDIM-50, here"),
            (
                f"{after['reconstruction'][0]['psnr']:.1f} dB",
                f"to noise and back; {before['reconstruction'][0]['psnr']:.1f} dB before the training",
            ),
            (f"{100 * after['edits']['changed']:.0f} %", "of the edited attributes come out as asked"),
        )

    def _facts(self, seconds: float | None) -> dict[str, str]:
        facts = {
            "command": "make demo",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "held-out world": f"seed {self.settings.seed}",
        }
        return facts if seconds is None else {**facts, "took": f"{seconds / 60:.1f} minutes"}

    def _curves(self) -> tuple[Curve, ...]:
        scalars = read_scalars(self.root / "training")
        losses = ("reverse_cd", "forward_cd", "reverse_preservation", "forward_preservation")
        found = {name: scalars[f"train/{name}"] for name in losses if f"train/{name}" in scalars}
        quality = {
            label: scalars[key]
            for label, key in (("w 1", "reconstruction/psnr"), ("guided", "reconstruction_guided/psnr"))
            if key in scalars
        }
        curves = []
        if found:
            curves.append(Curve("The four losses", "As in Eq. 5, unweighted.", "step", "loss", found, log_y=True))
        if quality:
            curves.append(
                Curve("Reconstruction while training", "On validation pictures.", "step", "PSNR (dB)", quality)
            )
        return tuple(curves)

    # Pictures

    def _reconstructions(self, scenes: Sequence[Scene]) -> Panel:
        images, prompts = images_of(scenes), [scene.caption() for scene in scenes]
        columns = [images]
        for name in (DDIM, UNTRAINED, TRAINED):
            noise = self.methods[name].invert(images, prompts)
            columns.append(self.methods[name].generate(prompts, noise))
        heads = ("original", *self._heads("reconstruction", 0))
        return Panel("Reconstruction", "Encoded to noise and decoded, unguided.", heads, _rows(prompts, columns), (3,))

    def _edits(self, scenes: Sequence[Scene]) -> Panel:
        targets = random_edits(scenes)
        images, sources, prompts = images_of(scenes), [s.caption() for s in scenes], [s.caption() for s in targets]
        columns = [images]
        for name in (DDIM, UNTRAINED, TRAINED):
            result = self.methods[name].edit(
                images, sources, prompts, guidance=self.settings.editing, swap_tau=self.settings.edit_tau
            )
            columns.append(result)
        columns.append(images_of(targets))
        heads = ("original", *self._heads("edits", None), "true result")
        labels = [f"{target}\nwas: {source}" for source, target in zip(sources, prompts, strict=True)]
        return Panel(
            "Edits",
            "Only the prompt is swapped; the scene's own program draws the true result.",
            heads,
            _rows(labels, columns),
            (3,),
        )

    def _generations(self, scenes: Sequence[Scene]) -> Panel:
        prompts, trained = [scene.caption() for scene in scenes], self.methods[TRAINED]
        assert isinstance(trained, InvertibleConsistency)
        noise = seeded_noise(trained.latent_shape(len(scenes), 64, 64), 0)
        guidance = self.settings.editing
        columns = [self.methods[DDIM].generate(prompts, noise, guidance=guidance)]
        for steps in GENERATION_STEPS:
            pipeline = InvertibleConsistency(
                trained.students, trained.autoencoder, trained.conditioner, Boundaries.uniform(steps)
            )
            columns.append(pipeline.generate(prompts, noise, guidance=guidance))
        heads = (DDIM, *(f"{steps} step{'s' if steps > 1 else ''}" for steps in GENERATION_STEPS))
        note = "From drawn noise. The students learnt 4 segments: with fewer steps they jump further than that."
        return Panel("Generation", note, heads, _rows(prompts, columns), (4,))

    def _heads(self, part: str, index: int | None) -> list[str]:
        heads = []
        for name in (DDIM, UNTRAINED, TRAINED):
            result = self.results[name][part] if index is None else self.results[name][part][index]
            heads.append(f"{name}\n{result['nfe']} evaluations")
        return heads


def _rows(labels: Sequence[str], columns: Sequence[Tensor]) -> tuple[tuple[str, tuple[np.ndarray, ...]], ...]:
    """Columns of pictures (B, 3, H, W) in [-1, 1] to rows of uint8 (H, W, 3)."""
    arrays = [to_pictures(column) for column in columns]
    return tuple((label, tuple(array[i] for array in arrays)) for i, label in enumerate(labels))
