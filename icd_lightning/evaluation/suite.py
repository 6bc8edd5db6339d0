"""`icd eval --benchmark ...`: which examples, which decodings, which scores; tables and curves of what came out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

from icd_lightning.data.manifest import sha256
from icd_lightning.diffusion import CADSGuidance, GuidanceSchedule, IntervalGuidance, StepGuidance
from icd_lightning.editing.limits import SHORT_NAMES, check_guidance_scale
from icd_lightning.editing.method import UNGUIDED, PictureMethod
from icd_lightning.evaluation import benchmarks, summaries
from icd_lightning.evaluation.benchmarks import Bench, Outcome, guidance_name, step_guidances
from icd_lightning.evaluation.examples import (
    Example,
    read_captions,
    read_coco_edits,
    read_pie_bench,
    scene_edits,
    scene_examples,
)
from icd_lightning.evaluation.methods import Models, check_names, edit_options
from icd_lightning.evaluation.published import GUIDANCES
from icd_lightning.evaluation.report import (
    Curve,
    Panel,
    Report,
    Section,
    Table,
    draw_section,
    markdown_table,
    print_table,
    wide_console,
    write_report,
)
from icd_lightning.evaluation.rows import Ranks
from icd_lightning.evaluation.runs import Results, Run, perform, places
from icd_lightning.evaluation.scoring import Scoring
from icd_lightning.models.family import shipped
from icd_lightning.tiny.scenes import HELD_OUT_SEED
from icd_lightning.tiny.study import write_json, write_text

log = logging.getLogger(__name__)

Benchmark = Literal["inversion", "generation", "guidance", "piebench", "coco_edit", "tiny_edit"]
EDITING = ("piebench", "coco_edit", "tiny_edit")
SCENES = 128
"""Held-out scenes to measure on where nobody says how many."""
PHOTOGRAPH_SIDE = 512
"""Pixels of a side at which photographs are scored, of every family: metrics are compared at one size."""
TURN_ON = tuple(i / 10 for i in range(11))
"""Thresholds of Fig. 4."""


@dataclass(frozen=True)
class Settings:
    """What to measure. `grid` holds settings to try, each a mapping of options, as `parse_grid` returns them.

    Args:
        metrics: names of the registry or of a preset; by default what suits the benchmark and the family.
        data: COCO's annotations, a CSV, or PIE-Bench's folder; without it, held-out scenes.
        images: folder that the data's file names are relative to.
        natural: leave out PIE-Bench's artificial pictures.
        count: how many examples, from the first; by default all, or 128 scenes.
    """

    benchmark: Benchmark
    methods: tuple[str, ...] = ("icd",)
    metrics: tuple[str, ...] | None = None
    data: Path | None = None
    images: Path | None = None
    natural: bool = False
    count: int | None = None
    guidance_scale: float | None = None
    tau: float | None = None
    grid: tuple[Mapping[str, float], ...] = field(default=({},))
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"count {self.count} must be 1 or more")
        if self.guidance_scale is not None:
            check_guidance_scale(self.guidance_scale)
        for options in self.grid:
            check_guidance_scale(options.get("w", 1.0), "grid option w")
            _check_together(options)
        self._check_unread()
        if not any(map(_in_order, self.grid)):
            raise ValueError("the grid leaves no setting: tau1 must not be above tau2, nor lo above hi")
        check_names(self.methods)
        if self.benchmark in ("piebench", "coco_edit") and self.data is None:
            what = "PIE-Bench's folder" if self.benchmark == "piebench" else "a CSV of edits"
            raise ValueError(f"--benchmark {self.benchmark} needs {what}: give --data")

    def _check_unread(self) -> None:
        """ValueError for what the benchmark does not read."""
        unread = {
            "data": self.data is not None and self.benchmark == "tiny_edit",
            "images": self.images is not None and (self.data is None or self.benchmark == "piebench"),
            "natural": self.natural and self.benchmark != "piebench",
            "tau": self.tau is not None and self.benchmark == "guidance",
            "grid": self.grid != ({},) and self.benchmark == "guidance",
        }
        if given := [name for name, value in unread.items() if value]:
            of = self.benchmark if self.data or self.benchmark == "tiny_edit" else f"{self.benchmark} without --data"
            raise ValueError(f"benchmark {of} does not read {', '.join(given)}: leave it out")

    def examples(self) -> list[Example]:
        """The examples to measure on, always the same and in the same order."""
        if self.benchmark == "tiny_edit":
            return scene_edits(self.count or SCENES, HELD_OUT_SEED)
        if self.data is None:
            return scene_examples(self.count or SCENES, HELD_OUT_SEED)
        if self.benchmark == "piebench":
            examples = read_pie_bench(self.data, natural=self.natural)
        elif self.benchmark == "coco_edit":
            examples = read_coco_edits(self.data, self.images)
        else:
            examples = read_captions(self.data, self.images)
        return examples[: self.count]


def parse_grid(text: str) -> tuple[dict[str, float], ...]:
    """Every combination of options written like "tau=0.6,0.8 cross_replace=0.2,0.4"; one empty one for ""."""
    axes: dict[str, list[float]] = {}
    for part in text.split():
        name, equals, values = part.partition("=")
        name = SHORT_NAMES.get(name, name)
        if name in axes:
            raise ValueError(f"the grid varies {name} twice: give all its values at once")
        try:
            axes[name] = [float(value) for value in values.split(",")]
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ValueError(f"grid {part!r} is not as in tau=0.6,0.7,0.8")
    return tuple(dict(zip(axes, values, strict=True)) for values in product(*axes.values()))


GUIDANCE_OPTIONS = ("w", "tau", "tau1", "tau2", "lo", "hi")


SCHEDULES = ({"tau"}, {"tau1", "tau2"}, {"lo", "hi"})
"""Options of a step, of CADS and of an interval: guidance follows one of these."""


def _check_together(options: Mapping[str, float]) -> None:
    kinds = [sorted(names & set(options)) for names in SCHEDULES if names & set(options)]
    if len(kinds) > 1:
        given = " and ".join(" and ".join(names) for names in kinds)
        raise ValueError(f"the grid has {given}, of different schedules: vary tau, or tau1 and tau2, or lo and hi")


def guidance_of(options: Mapping[str, float], default: StepGuidance) -> GuidanceSchedule:
    """A schedule from options of a grid: w with tau, with tau1 and tau2 (CADS), or with lo and hi (an interval)."""
    w = options.get("w", default.guidance_scale)
    if "tau1" in options or "tau2" in options:
        tau2 = options.get("tau2", 1.0)
        return CADSGuidance(w, options.get("tau1", min(default.tau, tau2)), tau2)
    if "lo" in options or "hi" in options:
        return IntervalGuidance(w, options.get("lo", 0.0), options.get("hi", 1.0))
    return StepGuidance(w, options.get("tau", default.tau))


def guidances_of(settings: Settings, default: StepGuidance) -> dict[str, GuidanceSchedule]:
    """Unguided, guided throughout and dynamically; or unguided and every setting of the grid."""
    if settings.grid == ({},):
        return step_guidances(default.guidance_scale, (1.0, default.tau))
    named: dict[str, GuidanceSchedule] = {"w 1": UNGUIDED}
    for options in settings.grid:
        if unknown := [name for name in options if name not in GUIDANCE_OPTIONS]:
            raise ValueError(f"grid option {unknown[0]!r} is none of {', '.join(GUIDANCE_OPTIONS)}")
        if _in_order(options):
            named[_name(options)] = guidance_of(options, default)
    return named


def edits_of(settings: Settings, default: StepGuidance) -> dict[str, dict[str, Any]]:
    """Options of a method's `edit` by name: guidance, and whatever else the grid says."""
    found = {}
    for options in filter(_in_order, settings.grid):
        rest = {name: value for name, value in options.items() if name not in GUIDANCE_OPTIONS}
        name = _name(options) if options else guidance_name(default.guidance_scale, default.tau)
        found[name] = {"guidance": guidance_of(options, default), **rest}
    return found


def _in_order(options: Mapping[str, float]) -> bool:
    """Whether a setting is one: a grid also combines a tau1 with smaller tau2."""
    return options.get("tau1", 0.0) <= options.get("tau2", 1.0) and options.get("lo", 0.0) <= options.get("hi", 1.0)


def check_options(settings: Settings, name: str, method: type[PictureMethod]) -> None:
    """ValueError for an option of the grid that is neither guidance's nor one of the method's `edit`."""
    known = [*GUIDANCE_OPTIONS, *edit_options(method)]
    for option in dict.fromkeys(option for options in settings.grid for option in options):
        if option not in known:
            raise ValueError(f"grid option {option!r} is none of {', '.join(known)} (of method {name})")


def _name(options: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in options.items())


@dataclass(frozen=True)
class Suite:
    """Settings, the models to measure, and where everything goes; under torchrun, this rank's share of it."""

    settings: Settings
    models: Models
    out: Path
    ranks: Ranks = field(default_factory=Ranks.from_environment)

    @cached_property
    def examples(self) -> list[Example]:
        """The settings' examples, read once."""
        return self.settings.examples()

    def run(self) -> list[Path]:
        """Measure every method; print and write the tables and curves; return the paths of the summary."""
        settings = self.settings
        results, sections = {
            "inversion": self._inversion,
            "generation": self._generation,
            "guidance": self._guidance,
        }.get(settings.benchmark, self._editing)()
        return self._write(results, sections) if self.ranks.rank == 0 else []

    # Benchmarks

    def _inversion(self):
        results = self.perform("inversion", benchmarks.inversion, "guidances", self._guidances)
        note = f"{self._pictures()}, encoded to noise at w 1 and decoded as the second column says."
        return results, [summaries.table("Inversion: to noise and back", note, results)]

    def _generation(self):
        results = made = self.perform("generation", benchmarks.generation, "guidances", self._guidances)
        sections: list[Section] = [
            summaries.table("Generation", f"{self._pictures()}: their captions, from drawn noise.", results)
        ]
        if self.settings.grid != ({},):
            back = self.perform("inversion", benchmarks.inversion, "guidances", self._guidances)
            joined = [_joined(*pair) for pair in zip(made, back, strict=True)]
            quality = next(c for c in (*made[0].columns, *made[0].set_scores) if c not in ("nfe", "seconds"))
            title = f"{quality} of generation against the error of inversion"
            sections.append(summaries.trade_off(joined, "latent_mse", quality, title))
            results = [*made, *(replace(r, name=f"{r.name}, to noise and back") for r in back)]
        return results, sections

    def _guidance(self):
        def both_ways(name: str, method: PictureMethod) -> dict[str, GuidanceSchedule]:
            w = self._default(name, method).guidance_scale
            return dict(zip(GUIDANCES, (UNGUIDED, *(StepGuidance(w, tau) for tau in (0.6, 0.8, 1.0))), strict=True))

        def thresholds(name: str, method: PictureMethod) -> dict[str, GuidanceSchedule]:
            w = self._default(name, method).guidance_scale
            return {f"tau {tau:g}": StepGuidance(w, tau) for tau in TURN_ON}

        (both,) = self.perform("guidance", benchmarks.guided_inversion, "guidances", both_ways, methods=("ddim",))
        results = self.perform("thresholds", benchmarks.inversion, "guidances", thresholds)
        sections = [
            *(summaries.table_1(both, quality) for quality in both.set_scores or ("latent_mse",)),
            summaries.table_1_nll(both),
            summaries.curve_over_tau(results, TURN_ON, "latent_mse"),
        ]
        return [replace(both, name="ddim, both ways"), *results], sections

    def _editing(self):
        def options(name: str, method: PictureMethod) -> dict[str, dict[str, Any]]:
            return edits_of(self.settings, self._default(name, method))

        for name in self.settings.methods:
            check_options(self.settings, name, self.models.method_class(name))
        results = self.perform("editing", benchmarks.editing, "settings", options)
        note = f"{self._pictures()}, each edited towards its target caption."
        title = f"Edits: {self.settings.benchmark}"
        sections: list[Section] = [summaries.table(title, note, results)]
        if self.ranks.rank == 0:
            sections.insert(0, summaries.panel(results, self.examples))
        if results[0].kinds:
            sections.append(summaries.table(f"{title}, by type", note, results, by_kind=True))
        pair = next((p for p in TRADE_OFFS if set(p) <= {*results[0].columns, *results[0].set_scores}), None)
        if pair is not None and len(results) * len(self.settings.grid) > 1:
            sections.append(summaries.trade_off(results, *pair, "Preservation against editing"))
        return results, sections

    def _guidances(self, name: str, method: PictureMethod) -> dict[str, GuidanceSchedule]:
        return guidances_of(self.settings, self._default(name, method))

    def _default(self, name: str, method: PictureMethod) -> StepGuidance:
        settings = self.settings
        edit = settings.benchmark in EDITING
        return self.models.guidance(name, method, settings.guidance_scale, settings.tau, edit=edit)

    def perform(
        self,
        what: str,
        measure: Callable[..., Iterator[Outcome]],
        argument: str,
        decodings: Callable[[str, PictureMethod], Mapping[str, Any]],
        *,
        methods: Sequence[str] | None = None,
    ) -> list[Results]:
        """Let each method do `what` to the examples: a function of `benchmarks` with `argument` = decodings(method)."""
        settings, examples = self.settings, self.examples
        scoring = Scoring.choose(settings.metrics, what, examples, self.models.device)
        results = []
        for name in methods or settings.methods:
            method = self.models.load(name)
            bench = Bench(method, self.models.resolution(method), settings.seed, self.models.device)
            named = decodings(name, method)
            determinants = {"benchmark": settings.benchmark, "what": what, "seed": settings.seed, "decodings": named}
            if settings.data is None:  # the scenes' judge
                determinants["scene_network"] = sha256(*(shipped() / "scene_network").glob("*.safetensors"))
            run = Run(
                name=Path(name).stem,
                root=self.out,
                examples=examples,
                measure=partial(measure, bench, **{argument: named}),
                determinants={**determinants, **self.models.determinants(name, method)},
                resolution=bench.resolution,
                batch_size=settings.batch_size,
                scored_at=None if settings.data is None else PHOTOGRAPH_SIDE,
                scorers=scoring.scorers,
                set_scorers=scoring.set_scorers,
            )
            log.info("%s: %d pictures, %s", name, len(examples), run.folder)
            results.append(perform(run, self.ranks))
        return results

    def _pictures(self) -> str:
        count = len(self.examples)
        return f"{count} held-out scenes" if self.settings.data is None else f"{count} of {self.settings.data.name}"

    def _write(self, results: Sequence[Results], sections: Sequence[Section]) -> list[Path]:
        console, name = wide_console(), self.settings.benchmark
        sections = [*sections, *(summaries.published(name) if self.settings.data is not None else [])]
        tables = [section for section in sections if isinstance(section, Table)]
        for table in tables:
            if "type" not in table.header:  # long, and in the files
                print_table(summaries.plain(table), console)
        markdown, numbers = self.out / f"{name}.md", self.out / f"{name}.json"
        write_text(markdown, "\n".join(markdown_table(table) for table in tables))
        summary = {
            "settings": vars(self.settings),
            "runs": places({r.name: r.folder for r in results}, self.out),
            "methods": {r.name: r.as_dict() for r in results},
        }
        write_json(numbers, summary)
        report = Report(f"icd eval --benchmark {name}", self._pictures(), sections=tuple(sections))
        figures = {"edits.png": Panel, "trade_off.png": Curve} if name in EDITING else {}
        drawn = [
            draw_section(section, self.out / name / file)
            for file, kind in figures.items()
            for section in sections
            if isinstance(section, kind)
        ]
        return [markdown, numbers, *write_report(report, self.out / name), *drawn]


TRADE_OFFS = (("psnr_outside", "changed"), ("psnr-unedited", "clip-score-edited"), ("dinov2", "clip-t"))
"""Preservation and editing, the first pair that was measured."""


def _joined(first: Results, second: Results) -> Results:
    """The rows of two runs over the same pictures and decodings, side by side."""
    found = {(row["key"], row["decoding"]): row for row in second.rows}
    rows = [{**found[row["key"], row["decoding"]], **row} for row in first.rows]
    return Results(first.name, rows, {**second.set_scores, **first.set_scores})
