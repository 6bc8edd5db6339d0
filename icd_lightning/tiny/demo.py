"""What `icd demo` measures and shows: the students before and after their training, with DDIM-50 beside them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from icd_lightning.data.images import to_pictures
from icd_lightning.diffusion import Boundaries, StepGuidance
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.editing.method import seeded_noise
from icd_lightning.evaluation.benchmark import Measured, Settings
from icd_lightning.evaluation.curves import read_scalars
from icd_lightning.evaluation.examples import Example, stack
from icd_lightning.evaluation.methods import Models
from icd_lightning.evaluation.report import Curve, Panel, Report, Table, markdown_table, print_tables, write_report
from icd_lightning.evaluation.results import read_results
from icd_lightning.evaluation.suite import Suite
from icd_lightning.files import write_json, write_text
from icd_lightning.models.family import Family
from icd_lightning.tiny.benchmarks import LABELS, about, ceiling, figures, tour_tables

DDIM, UNTRAINED, TRAINED = LABELS.values()
GENERATION_STEPS = (1, 2, 3, 4)
LOSSES = ("reverse_cd", "forward_cd", "reverse_preservation", "forward_preservation")


class DemoStudy:
    """Measures into `root`/results, goes on from what it measured, and draws `root`/report.html and .png."""

    def __init__(self, root: Path, count: int, family: Family) -> None:
        self.root, self.settings = root, Settings("scenes", count=count)
        students = {name: str(root / "training" / name) for name in ("forward", "reverse")}
        self.teacher, self.models = Models(family), Models(family, **students)

    def measure_before(self) -> Measured:
        """DDIM-50 with the teacher, and the untrained students: the teacher's weights through the students' jumps."""
        ends = ",".join(map(str, Boundaries.uniform(4).boundary_timesteps[1:]))
        return self._measure(("ddim", "untrained"), replace(self.teacher, boundaries=ends))

    def measure_after(self) -> Measured:
        return self._measure(("icd",), self.models)

    def _measure(self, methods: tuple[str, ...], models: Models) -> Measured:
        return Suite(replace(self.settings, methods=methods), models, self.root / "results").measure()

    def report(self, before: Measured, after: Measured, *, seconds: float | None) -> None:
        """Write metrics.json, tables.md, report.html and report.png; print the tables and the paths."""
        both = {task: [*before.results[task], *after.results[task]] for task in before.results}
        self.measured = measured = replace(before, results=both)
        self.results, self.about, self.examples = figures(measured), about(measured), measured.data.examples
        write_json(self.root / "metrics.json", self._metrics())
        tables = [section for section in tour_tables(self.measured) if isinstance(section, Table)]
        panels = (
            self._reconstructions(self.examples[:6]),
            self._edits(self.examples[:6]),
            self._generations((self.examples[6:] or self.examples)[:5]),
        )
        report = Report(
            title="Invertible Consistency Distillation, in miniature",
            subtitle=f"Both students of {self.models.family.model}, trained on this machine: pictures to noise in 4 "
            "network evaluations, noise to pictures in 4, an edit in 8.",
            summary=self._summary(),
            sections=(panels[0], tables[0], panels[1], tables[1], panels[2], tables[2], *self._curves()),
            facts=self._facts(seconds),
        )
        shown = (replace(panels[1], rows=panels[1].rows[:5]), replace(panels[0], rows=panels[0].rows[:3]), tables[0])
        paths = write_report(report, self.root, png_sections=shown)
        write_text(self.root / "tables.md", "\n".join(markdown_table(table) for table in tables))
        console = print_tables(tables)
        for path in (*paths, self.root / "tables.md", self.root / "metrics.json", self.root / "training"):
            console.print(str(path), highlight=False)

    def _metrics(self) -> dict[str, Any]:
        return {
            "settings": {name: value for name, value in self.about.items() if name != "decoding"},
            "autoencoder_psnr": ceiling(self.measured),
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
            "command": f"icd demo --model {self.models.family.model}",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "held-out world": f"seed {self.about['seed']}",
        }
        return facts if seconds is None else {**facts, "took": f"{seconds / 60:.1f} minutes"}

    def _curves(self) -> list[Curve]:
        scalars, curves = read_scalars(self.root / "training"), []
        losses = {name: scalars[f"train/{name}"] for name in LOSSES if f"train/{name}" in scalars}
        if losses:
            curves.append(Curve("The four losses", "As in Eq. 5, unweighted.", "step", "loss", losses, log_y=True))
        kinds = (("w 1", "reconstruction/psnr"), ("guided", "reconstruction_guided/psnr"))
        quality = {label: scalars[key] for label, key in kinds if key in scalars}
        if quality:
            note = "On validation pictures."
            curves.append(Curve("Reconstruction while training", note, "step", "PSNR (dB)", quality))
        return curves

    def _columns(self, task: str, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """The originals, and each method's pictures in its first decoding, by its name and what they cost."""
        columns = {"original": stack(examples, 64)}
        for result in self.measured.results[task]:
            first = result.decodings[0]
            head = f"{LABELS[result.name]}\n{int(result.values('nfe', first)[0])} evaluations"
            columns[head] = read_results(result.folder, first, examples)
        return {head: to_pictures(images) for head, images in columns.items()}

    def _reconstructions(self, examples: Sequence[Example]) -> Panel:
        columns = self._columns("reconstruction", examples)
        captions = [example.caption for example in examples]
        return Panel.of_columns("Reconstruction", "Encoded to noise and decoded, unguided.", columns, captions, (3,))

    def _edits(self, examples: Sequence[Example]) -> Panel:
        columns = self._columns("edits", examples)
        columns["true result"] = np.stack([example.truth.draw(64) for example in examples if example.truth])
        labels = [f"{example.target}\nwas: {example.caption}" for example in examples]
        note = "Only the prompt is swapped; the scene's own program draws the true result."
        return Panel.of_columns("Edits", note, columns, labels, (3,))

    @torch.no_grad()
    def _generations(self, examples: Sequence[Example]) -> Panel:
        prompts, trained = [example.caption for example in examples], self.models.load("icd_swap")
        noise = seeded_noise(trained.latent_shape(len(examples), 64, 64), 0)
        guidance = StepGuidance(self.about["guidance_scale"], self.about["edit_tau"])
        columns = {DDIM: to_pictures(self.models.load("ddim").generate(prompts, noise, guidance=guidance))}
        for steps in GENERATION_STEPS:
            parts = (trained.students, trained.autoencoder, trained.conditioner)
            method = InvertibleConsistency(*parts, Boundaries.uniform(steps))
            name = f"{steps} step{'s' if steps > 1 else ''}"
            columns[name] = to_pictures(method.generate(prompts, noise, guidance=guidance))
        note = "From drawn noise. The students learnt 4 segments: with fewer steps they jump further than that."
        return Panel.of_columns("Generation", note, columns, prompts, (4,))
