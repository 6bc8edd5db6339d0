"""How results are decoded: a guidance schedule, options of a method's `edit` and of its constructor, and a name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from icd_lightning.diffusion import CADSGuidance, GuidanceSchedule, IntervalGuidance, StepGuidance
from icd_lightning.editing.limits import SHORT_NAMES, check_guidance_scale

if TYPE_CHECKING:
    from icd_lightning.editing.method import PictureMethod
    from icd_lightning.evaluation.benchmark import Settings

Options = Mapping[str, float]

GUIDANCE_OPTIONS = ("w", "tau", "tau1", "tau2", "lo", "hi")
SCHEDULES = ({"tau"}, {"tau1", "tau2"}, {"lo", "hi"})
"""Options of a step, of CADS and of an interval: guidance follows one of these."""


@dataclass(frozen=True)
class Decoding:
    """`options` are what the decoding is named by; those that are not of guidance are in `edit` or in `constructor`."""

    guidance: GuidanceSchedule
    options: Options = field(default_factory=dict)
    edit: Options = field(default_factory=dict)
    constructor: Options = field(default_factory=dict)
    label: str = ""

    @classmethod
    def step(cls, guidance_scale: float, tau: float = 1.0) -> Decoding:
        """Guided for t <= tau T, throughout at tau 1: "w 3", "w 3, tau 0.8"."""
        return cls(StepGuidance(guidance_scale, tau), {"w": guidance_scale, **({"tau": tau} if tau < 1 else {})})

    @property
    def name(self) -> str:
        """As tables call it; a number in as many digits as tell it from every other."""
        words = []
        for option, value in self.options.items():
            short = f"{value:g}"
            words.append(f"{option} {short if float(short) == value else repr(value)}")
        return self.label or ", ".join(words)


UNGUIDED = Decoding.step(1.0)


def steps(guidance_scale: float, taus: Sequence[float]) -> list[Decoding]:
    """Unguided, then guided for t <= tau T with each tau, each once."""
    guided = [Decoding.step(guidance_scale, tau) for tau in taus]
    return list({decoding.name: decoding for decoding in (UNGUIDED, *guided)}.values())


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


def check_grid(grid: Iterable[Options]) -> None:
    """ValueError for guidance that cannot be, and where no setting is left."""
    for options in grid:
        check_guidance_scale(options.get("w", 1.0), "grid option w")
        kinds = [sorted(names & set(options)) for names in SCHEDULES if names & set(options)]
        if len(kinds) > 1:
            given = " and ".join(" and ".join(names) for names in kinds)
            raise ValueError(f"the grid has {given}, of different schedules: vary tau, or tau1 and tau2, or lo and hi")
    if not any(map(_in_order, grid)):
        raise ValueError("the grid leaves no setting: tau1 must not be above tau2, nor lo above hi")


def _in_order(options: Options) -> bool:
    """Whether a setting is one: a grid also combines a tau1 with smaller tau2."""
    return options.get("tau1", 0.0) <= options.get("tau2", 1.0) and options.get("lo", 0.0) <= options.get("hi", 1.0)


def guided(settings: Settings, default: StepGuidance, method: type[PictureMethod]) -> list[Decoding]:
    """Unguided, guided throughout and dynamically; or unguided and every setting of the grid."""
    if settings.has_grid:
        return [UNGUIDED, *edited(settings, default, method)]
    return steps(default.guidance_scale, (1.0, default.tau))


def edited(settings: Settings, default: StepGuidance, method: type[PictureMethod]) -> list[Decoding]:
    """The method's own guidance, or every setting of the grid: options of its constructor go there."""
    decodings = {}
    for options in filter(_in_order, settings.grid):
        w = options.get("w", default.guidance_scale)
        guidance: GuidanceSchedule = StepGuidance(w, options.get("tau", default.tau))
        if "tau1" in options or "tau2" in options:
            tau2 = options.get("tau2", 1.0)
            guidance = CADSGuidance(w, options.get("tau1", min(default.tau, tau2)), tau2)
        elif "lo" in options or "hi" in options:
            guidance = IntervalGuidance(w, options.get("lo", 0.0), options.get("hi", 1.0))
        other = {name: value for name, value in options.items() if name not in GUIDANCE_OPTIONS}
        arguments = {name: other.pop(name) for name in constructor_options(method) if name in other}
        named = options or Decoding.step(default.guidance_scale, default.tau).options
        decoding = Decoding(guidance, named, other, arguments)
        decodings[decoding.name] = decoding
    return list(decodings.values())


def constructor_options(cls: type[Any]) -> list[str]:
    """The numbers that a method's constructor takes beside what it is made of, and beside guidance."""
    parameters = inspect.signature(cls).parameters.values()
    numbers = [one.name for one in parameters if str(one.annotation) in ("int", "float", str(int), str(float))]
    return [name for name in numbers if name not in (*GUIDANCE_OPTIONS, "guidance_scale")]
