"""A benchmark as a value: what methods do, with which examples, decoded how, scored by what, and shown how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from icd_lightning.diffusion import StepGuidance
from icd_lightning.editing.limits import check_guidance_scale
from icd_lightning.editing.method import PictureMethod
from icd_lightning.evaluation.decodings import Decoding, Options, check_grid, guided
from icd_lightning.evaluation.examples import DataSet, Example, read_data, stack
from icd_lightning.evaluation.methods import CPU
from icd_lightning.evaluation.report import Section, Table
from icd_lightning.evaluation.results import Results
from icd_lightning.registry import Entry, Registry

OURS = "icd_lightning.evaluation.benchmarks"
BENCHMARKS = Registry(
    "benchmark",
    "icd_lightning.benchmarks",
    {
        "inversion": Entry(f"{OURS}.inversion.INVERSION", "to noise and back (Tables 2 and 5)"),
        "generation": Entry(f"{OURS}.generation.GENERATION", "from drawn noise (Table 4; with --grid Fig. 5)"),
        "guidance": Entry(f"{OURS}.guidance.GUIDANCE", "guided at both ends (Table 1, Fig. 4)"),
        "piebench": Entry(f"{OURS}.editing.PIEBENCH", "edits with masks (arXiv:2310.01506)"),
        "coco_edit": Entry(f"{OURS}.editing.COCO_EDIT", "edits of COCO's captions"),
    },
)
"""Each a `Benchmark`."""
MOST_EXAMPLES = 1_000_000  # more are never measured, and a summary that says so would be read for ever


@dataclass(frozen=True)
class Settings:
    """What to measure: the options of `icd eval`, read.

    `methods`, `metrics` and `batch_size` are the benchmark's own by default; `data` may be a data set's name; `grid`
    holds settings to try, each a mapping of options, as `parse_grid` returns them.
    """

    benchmark: str
    methods: tuple[str, ...] = ()
    metrics: tuple[str, ...] | None = None
    data: Path | None = None
    images: Path | None = None
    natural: bool = False
    count: int | None = None
    guidance_scale: float | None = None
    tau: float | None = None
    grid: tuple[Options, ...] = ({},)
    seed: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("count", "batch_size"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST_EXAMPLES:
                raise ValueError(f"{name} {value} must be from 1 to {MOST_EXAMPLES:,}")
        if self.guidance_scale is not None:
            check_guidance_scale(self.guidance_scale)
        check_grid(self.grid)

    @property
    def has_grid(self) -> bool:
        return self.grid != ({},)


@dataclass(frozen=True)
class Outcome:
    """Results (B, 3, R, R) of one decoding; evaluations and seconds of one picture, and further `values` (B,)."""

    decoding: str
    images: Tensor
    nfe: int
    seconds: float
    values: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """A method at its resolution, on its device, with the seed of the run."""

    method: PictureMethod
    resolution: int
    seed: int = 0
    device: torch.device = CPU

    def images(self, batch: Sequence[Example]) -> Tensor:
        """The batch's pictures (B, 3, R, R)."""
        return stack(batch, self.resolution).to(self.device)

    def seeds(self, batch: Sequence[Example]) -> list[int]:
        return [example.seed(self.seed) for example in batch]


Measure = Callable[[Bench, Sequence[Example], Sequence[Decoding]], Iterator[Outcome]]
"""What a benchmark does with a batch: an `Outcome` for each decoding, what they share being done once."""
Decodings = Callable[[Settings, StepGuidance, type[PictureMethod]], Sequence[Decoding]]
"""Of the settings, the method's own guidance and its class."""


@dataclass(frozen=True)
class Task:
    """One thing that methods do with examples.

    edits: towards target captions, so that results are scored by these. as_family: every method is guided as the family
    is by default, not in its own way. methods: in place of those asked for. suffix: of its results' names, where a
    benchmark does several things.
    """

    name: str
    measure: Measure
    metrics: tuple[str, ...]
    decodings: Decodings = guided
    edits: bool = False
    as_family: bool = False
    methods: tuple[str, ...] = ()
    suffix: str = ""


@dataclass(frozen=True)
class Measured:
    """What a benchmark has to show: settings, examples, and the results of each task by its name."""

    settings: Settings
    data: DataSet
    results: Mapping[str, Sequence[Results]]
    out: Path


def published(title: str, columns: tuple[str, ...], rows: Mapping[str, Sequence[float]]) -> Table:
    """A table that a paper prints, to stand beside ours; no result of ours ever comes from here."""
    return Table(
        f"As published: {title}", "Not run here.", ("row", *columns), tuple((name, *row) for name, row in rows.items())
    )


@dataclass(frozen=True)
class Benchmark:
    """tasks: what is done. sections: the report's. read: the examples. grid_tasks: done too where a grid is tried.

    unread: settings that mean nothing here. write: writes more, and gives the paths. folder: under outputs/.
    """

    tasks: tuple[Task, ...]
    sections: Callable[[Measured], list[Section]]
    read: Callable[[Settings], DataSet] = read_data
    grid_tasks: tuple[Task, ...] = ()
    published: tuple[Table, ...] = ()
    methods: tuple[str, ...] = ("icd",)
    unread: tuple[str, ...] = ("natural",)
    batch_size: int = 16
    needs_data: str = ""
    write: Callable[[Measured, list[Section]], list[Path]] | None = None
    folder: str | None = None

    def __post_init__(self) -> None:
        for name, kind in (("tasks", Task), ("methods", str)):
            given = getattr(self, name)
            if not isinstance(given, tuple) or not given or not all(isinstance(one, kind) for one in given):
                raise ValueError(
                    f"a benchmark's {name} are {given!r}: give a tuple of {kind.__name__}, (x,) for one alone"
                )
        named = [task.name for task in (*self.tasks, *self.grid_tasks)]
        if twice := [name for name in named if named.count(name) > 1]:
            raise ValueError(f"two of a benchmark's tasks are named {twice[0]!r}: give each a name, and a suffix")

    @classmethod
    def find(cls, name: str, *, told_by: str | None = None) -> Benchmark:
        """By name, or by its path, package.module.NAME; ValueError if there is none, or `told_by` may not name it."""
        benchmark = BENCHMARKS.find(name, told_by=told_by).load()
        if not isinstance(benchmark, cls):
            raise ValueError(f"{name} is {benchmark!r}, and no Benchmark of icd_lightning.evaluation.benchmark")
        return benchmark

    def check(self, settings: Settings) -> None:
        """ValueError for data that are missing, and for what the benchmark does not read."""
        if self.needs_data and settings.data is None:
            raise ValueError(f"--benchmark {settings.benchmark} needs {self.needs_data}: give --data")
        unread = {*self.unread, *({"images"} if settings.data is None else ())}
        given = [name for name, value in vars(settings).items() if name in unread and value not in (None, False, ({},))]
        if given:
            where = "" if settings.data or "data" in self.unread else " without --data"
            raise ValueError(f"benchmark {settings.benchmark}{where} does not read {', '.join(given)}: leave it out")
