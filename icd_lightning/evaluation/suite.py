"""`icd eval --benchmark ...`: methods measured one after another; tables and curves of what came out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

from icd_lightning.editing.method import PictureMethod
from icd_lightning.editing.methods import class_of
from icd_lightning.evaluation.benchmark import Bench, Benchmark, Measured, Outcome, Settings, Task
from icd_lightning.evaluation.decodings import GUIDANCE_OPTIONS, constructor_options
from icd_lightning.evaluation.examples import DataSet, Example
from icd_lightning.evaluation.methods import Models, edit_options, guided_as_told
from icd_lightning.evaluation.report import (
    Curve,
    Panel,
    Report,
    Section,
    Table,
    draw_section,
    markdown_table,
    print_tables,
    write_report,
)
from icd_lightning.evaluation.results import Results, places
from icd_lightning.evaluation.runs import Run, perform, ranks
from icd_lightning.evaluation.scoring import Scoring
from icd_lightning.evaluation.summaries import INTERVALS
from icd_lightning.files import write_json, write_text

log = logging.getLogger(__name__)


class Suite:
    """Settings, the models to measure, and where everything goes; under torchrun, this rank's share of it.

    ValueError, before anything is loaded, for settings that the benchmark or a method does not have.
    """

    def __init__(self, settings: Settings, models: Models, out: Path) -> None:
        self.settings, self.models, self.out = settings, models, out
        self.benchmark = Benchmark.find(settings.benchmark)
        self.benchmark.check(settings)
        self.methods = tuple(dict.fromkeys(settings.methods or self.benchmark.methods))
        self.tasks = (*self.benchmark.tasks, *(self.benchmark.grid_tasks if settings.has_grid else ()))
        for task in self.tasks:
            for name in task.methods or self.methods:
                cls = class_of(name, models.family)
                known = [*GUIDANCE_OPTIONS, *(edit_options(cls) if task.edits else []), *constructor_options(cls)]
                for option in dict.fromkeys(option for options in settings.grid for option in options):
                    if option not in known:
                        raise ValueError(f"grid option {option!r} is none of {', '.join(known)} (of method {name})")

    @cached_property
    def data(self) -> DataSet:
        return self.benchmark.read(self.settings)

    def run(self) -> list[Path]:
        """Measure every method; rank 0 prints and writes the tables and curves, and returns the summary's paths."""
        measured = self.measure()
        if ranks()[0] != 0:
            return []
        own = self.benchmark.sections(measured)
        if not isinstance(own, list) or not all(isinstance(one, Section) for one in own):
            raise ValueError(f"sections of benchmark {self.settings.benchmark} give {own!r:.60}: return a list of them")
        sections = [*own, *(self.benchmark.published if self.data.photographs else ())]
        printed = []
        for one in sections:
            if isinstance(one, Table) and "type" not in one.header:  # by type they are long, and in the files
                rows = tuple(tuple(float(v) if isinstance(v, float) else v for v in row) for row in one.rows)
                printed.append(replace(one, rows=rows, note=one.note.removesuffix(INTERVALS)))  # a terminal is narrow
        print_tables(printed)
        return (self.benchmark.write or write_summary)(measured, sections)

    def measure(self) -> Measured:
        """Let every method do every task; a method's networks are loaded once, and let go before the next one's."""
        return Measured(self.settings, self.data, self.perform(*self.tasks), self.out)

    def perform(self, *tasks: Task) -> dict[str, list[Results]]:
        scorings = [self.scoring(task) for task in tasks]
        names = {task.name: task.methods or self.methods for task in tasks}
        every = dict.fromkeys(name for each in names.values() for name in each)
        labels = labels_of(list(every))
        results: dict[str, list[Results]] = {task.name: [] for task in tasks}
        for name in every:
            method = self.models.load(name)
            for task, scoring in zip(tasks, scorings, strict=True):
                if name in names[task.name]:
                    results[task.name].append(self._perform(task, name, method, labels[name], scoring))
        return results

    def scoring(self, task: Task) -> Scoring:
        """How results of a task are scored; ValueError or FileNotFoundError for data or metrics that there are not."""
        side, device = self.data.score_side(self.models.family.resolution), self.models.device
        return Scoring.choose(self.settings.metrics, task, self.data, side, device)

    def _perform(self, task: Task, name: str, method: PictureMethod, label: str, scoring: Scoring) -> Results:
        settings = self.settings
        own = self.models.family_guidance() if task.as_family else self.models.guidance(name, method, edit=task.edits)
        default = guided_as_told(own, settings.guidance_scale, settings.tau)
        decodings = task.decodings(settings, default, class_of(name, self.models.family))
        bench = Bench(method, self.models.family.resolution, settings.seed or 0, self.models.device)
        parts = []  # decodings, by the method as they want it to be constructed
        for made, group in groupby(decodings, lambda one: one.constructor):
            parts.append((replace(bench, method=self.models.variant(name, method, made)), list(group)))

        def measure(batch: Sequence[Example]) -> Iterator[Outcome]:
            for one, group in parts:
                yield from task.measure(one, batch, group)

        run = Run(
            name=label,
            root=self.out,
            data=self.data,
            measure=measure,
            determinants={
                **{"benchmark": settings.benchmark, "what": task.name, "seed": bench.seed, "data": self.data.identity},
                "decodings": {one.name: f"{one.guidance} {one.edit} {one.constructor}" for one in decodings},
                **self.models.determinants(name, method),
            },
            resolution=bench.resolution,
            batch_size=settings.batch_size or self.benchmark.batch_size,
            scoring=scoring,
            decodings={one.name: one.options for one in decodings},
        )
        log.info("%s: %d pictures, %s", label, len(self.data.examples), run.folder)
        return replace(perform(run), name=label + task.suffix)


def write_summary(measured: Measured, sections: Sequence[Section]) -> list[Path]:
    """Write tables, numbers and a report, named after the benchmark; return their paths."""
    name, out = Path(measured.settings.benchmark.replace(":", ".")).name, measured.out
    runs = [result for results in measured.results.values() for result in results]
    markdown, numbers = out / f"{name}.md", out / f"{name}.json"
    write_text(markdown, "\n".join(markdown_table(section) for section in sections if isinstance(section, Table)))
    summary = {
        "settings": vars(measured.settings),
        "runs": places({run.name: run.folder for run in runs}, out),
        "methods": {run.name: run.as_dict() for run in runs},
    }
    write_json(numbers, summary)
    report = Report(f"icd eval --benchmark {name}", measured.data.name, sections=tuple(sections))
    paths = [markdown, numbers, *write_report(report, out / name)]
    if any(isinstance(section, Panel) for section in sections):
        for file, kind in (("edits.png", Panel), ("trade_off.png", Curve)):
            paths += [draw_section(one, out / name / file) for one in sections if isinstance(one, kind)]
    return paths


def labels_of(names: Sequence[str]) -> dict[str, str]:
    """What reports call methods: of files the stem, of a class its name; in full where two are called the same."""
    short = {name: Path(name).stem if Path(name).suffix in (".yaml", ".yml") else name.split(".")[-1] for name in names}
    times = Counter(short.values())
    return {name: label if times[label] == 1 else name for name, label in short.items()}
