"""A benchmark as a value: what methods do, with which examples, decoded how, scored by what, and shown how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from icd_lightning.diffusion import StepGuidance
from icd_lightning.editing.limits import check_guidance_scale
from icd_lightning.editing.method import PictureMethod
from icd_lightning.evaluation import decodings
from icd_lightning.evaluation.bench import Measure
from icd_lightning.evaluation.decodings import GUIDANCE_OPTIONS, Decoding, Options, constructor_options
from icd_lightning.evaluation.examples import DataSet, read_data
from icd_lightning.evaluation.methods import edit_options
from icd_lightning.registry import Entry, Registry

if TYPE_CHECKING:
    from icd_lightning.evaluation.report import Section
    from icd_lightning.evaluation.runs import Results

OURS = "icd_lightning.evaluation.benchmarks"
BENCHMARKS = Registry(
    "benchmark",
    "icd_lightning.benchmarks",
    {
        "inversion": Entry(f"{OURS}.inversion.INVERSION", "to noise and back (Tables 2 and 5)"),
        "generation": Entry(f"{OURS}.generation.GENERATION", "from drawn noise (Table 4; with --grid Fig. 5)"),
        "guidance": Entry(f"{OURS}.guidance.GUIDANCE", "guided at both ends (Table 1, Fig. 4)"),
        "piebench": Entry(f"{OURS}.piebench.PIEBENCH", "edits with masks (arXiv:2310.01506)"),
        "coco_edit": Entry(f"{OURS}.coco_edit.COCO_EDIT", "edits of COCO's captions"),
    },
)
"""Each a `Benchmark`."""


@dataclass(frozen=True)
class Settings:
    """What to measure. `grid` holds settings to try, each a mapping of options, as `parse_grid` returns them.

    Args:
        benchmark: a name of BENCHMARKS, or a benchmark's path, package.module.NAME.
        methods: by default the benchmark's own.
        metrics: names of the registry or of a preset; by default what suits the benchmark and the data.
        data: COCO's annotations, a CSV, PIE-Bench's folder, or a data set's name; by default held-out scenes.
        images: folder that the data's file names are relative to.
        natural: leave out PIE-Bench's artificial pictures.
        count: how many examples, from the first; by default all, or 128 scenes.
        seed, batch_size: by default 0, and the benchmark's own.
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
    grid: tuple[Options, ...] = field(default=({},))
    seed: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"count {self.count} must be 1 or more")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} must be 1 or more")
        if self.guidance_scale is not None:
            check_guidance_scale(self.guidance_scale)
        decodings.check_grid(self.grid)

    @property
    def has_grid(self) -> bool:
        """Whether several settings are to be tried."""
        return tuple(self.grid) != ({},)


Decodings = Callable[[Settings, StepGuidance, type[PictureMethod]], Sequence[Decoding]]
"""Of the settings, the method's own guidance and its class."""


def guided(settings: Settings, default: StepGuidance, method: type[PictureMethod]) -> list[Decoding]:
    """Unguided, guided throughout and dynamically; or unguided and every setting of the grid."""
    if not settings.has_grid:
        return decodings.steps(default.guidance_scale, (1.0, default.tau))
    return [decodings.UNGUIDED, *decodings.grid_decodings(settings.grid, default, constructor_options(method))]


def edited(settings: Settings, default: StepGuidance, method: type[PictureMethod]) -> list[Decoding]:
    """The method's own guidance, or every setting of the grid."""
    return decodings.grid_decodings(settings.grid, default, constructor_options(method))


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

    def check_grid(self, settings: Settings, name: str, method: type[PictureMethod]) -> None:
        """ValueError for an option of the grid that is neither guidance's nor the method's."""
        known = [*GUIDANCE_OPTIONS, *(edit_options(method) if self.edits else []), *constructor_options(method)]
        for option in dict.fromkeys(option for options in settings.grid for option in options):
            if option not in known:
                raise ValueError(f"grid option {option!r} is none of {', '.join(known)} (of method {name})")


@dataclass(frozen=True)
class Measured:
    """What a benchmark has to show: settings, examples, and the results of each task by its name."""

    settings: Settings
    data: DataSet
    results: Mapping[str, Sequence[Results]]
    out: Path


@dataclass(frozen=True)
class Published:
    """A table that a paper prints, for its rows to stand beside ours; no result of ours ever comes from here."""

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, Sequence[float]]


def _read(settings: Settings) -> DataSet:
    return read_data(settings.data, settings.images, settings.count)


@dataclass(frozen=True)
class Benchmark:
    """tasks: what is done. sections: the report's. read: the examples. grid_tasks: done too where a grid is tried.

    unread: settings that mean nothing here. write: writes more, and gives the paths. folder: under outputs/.
    """

    tasks: tuple[Task, ...]
    sections: Callable[[Measured], list[Section]]
    read: Callable[[Settings], DataSet] = _read
    grid_tasks: tuple[Task, ...] = ()
    published: tuple[Published, ...] = ()
    methods: tuple[str, ...] = ("icd",)
    unread: tuple[str, ...] = ("natural",)
    batch_size: int = 16
    needs_data: str = ""
    write: Callable[[Measured, list[Section]], list[Path]] | None = None
    folder: str | None = None

    @classmethod
    def find(cls, name: str) -> Benchmark:
        """By name, or by its path, package.module.NAME; ValueError if there is none."""
        benchmark = BENCHMARKS.find(name).load()
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
