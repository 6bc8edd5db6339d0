"""The reference of configurations: every class that a YAML file may name, and its arguments as `icd` parses them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass

import lightning
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import Strategy

from icd_lightning.data.curation.stages import Stage
from icd_lightning.diffusion import Loss
from icd_lightning.editing.method import PictureMethod
from icd_lightning.editing.methods import LOADED, METHODS
from icd_lightning.metrics.base import PictureMetric
from icd_lightning.metrics.registry import METRICS
from icd_lightning.models.backbones import Backbone
from icd_lightning.models.students import Students
from icd_lightning.tasks.base import Task

SEARCHED = ("tasks", "models", "diffusion", "data", "callbacks", "editing", "metrics", "tiny")
KINDS = {  # a heading, what its classes derive from, and where a configuration names them
    "Tasks": (Task, "`model.class_path`; the arguments are `model.init_args`"),
    "Students": (Students, "`model.init_args.students`"),
    "Losses": (Loss, "`model.init_args.losses.<name>`, further ones `model.init_args.losses.others.<name>`"),
    "Backbones": (Backbone, "`model.init_args.family.backbone`"),
    "Data": (lightning.LightningDataModule, "`data.class_path`; the arguments are `data.init_args`"),
    "Stages of curation": (Stage, "`stages` of a recipe, as the files in conf/data/curate"),
    "Callbacks": (lightning.Callback, "`trainer.callbacks`"),
    "Strategies": (Strategy, "`trainer.strategy`"),
    "Methods": (PictureMethod, "`--method FILE.yaml` of `icd edit` and `icd eval`, as the files in conf/method"),
    "Metrics": (PictureMetric, "`--metrics FILE.yaml`, and `metrics` of callbacks"),
}
INTRODUCTION = """\
# Configuration

What a YAML file may name, and its arguments, read from signatures and docstrings when this page was built.
`icd fit --config A --config B` lays files one over the other; keys on the command line come last. `icd fit --help` says
how they are used, and `--print_config` what came out.
"""


def page() -> str:
    """The page, in Markdown."""
    for part in SEARCHED:
        package = importlib.import_module(f"icd_lightning.{part}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    sections = [INTRODUCTION]
    for heading, (base, place) in KINDS.items():
        sections.append(f"## {heading}\n\nNamed in {place}.\n")
        sections += map(section, classes(base))
    return "\n".join(sections)


def classes(base: type) -> list[type]:
    """The classes of this package that derive from it and can be made, by name; the tiny world's come last."""
    below, found = [base], set[type]()
    while below:
        cls = below.pop()
        below += cls.__subclasses__()
        ours = cls.__module__.startswith("icd_lightning.") and cls is not base
        if ours and not inspect.isabstract(cls):
            found.add(cls)
    return sorted(found, key=lambda cls: (".tiny." in cls.__module__, cls.__name__))


def section(cls: type) -> str:
    """A class: its path, short names, what it is, and a table of its arguments."""
    path = f"{cls.__module__}.{cls.__qualname__}"
    short = [
        f"`{name}`"
        for registry in (METHODS, METRICS)
        for name, entry in registry.entries.items()
        if entry.class_path.endswith(f".{cls.__name__}")
    ]
    names = f" Short names: {', '.join(short)}." if short else ""
    return f"### {cls.__name__}\n\n`{path}`{names}\n\n{described(cls)}\n\n{table(cls)}"


def described(cls: type) -> str:
    """What a class's own docstring says beside its arguments."""
    text = inspect.cleandoc(vars(cls).get("__doc__") or "")
    return re.sub(r"^Args:\n(?:(?: .*)?\n)*(?: .*$)?", "", text, flags=re.MULTILINE)


def table(cls: type) -> str:
    """The arguments of a class, a row for each."""
    parser, parameters = ArgumentParser(), inspect.signature(cls, eval_str=True).parameters
    parser.add_class_arguments(cls, skip=LOADED & set(parameters) if issubclass(cls, PictureMethod) else set())
    groups = {name: one.annotation for name, one in parameters.items() if is_dataclass(one.annotation)}
    rows = list(arguments(parser, groups))
    head = "| argument | type | default | meaning |\n|---|---|---|---|\n" if rows else "It takes no arguments.\n"
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def arguments(parser: ArgumentParser, groups: Mapping[str, type]) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each argument that a parser takes.

    Those of a group, a dataclass, have dotted names, behind a row that says what the group is.
    """
    for action in parser._actions:
        if action.dest in groups and action.default == SUPPRESS:
            cls = groups[action.dest]
            yield f"`{action.dest}`", f"`{cls.__name__}`", "", " ".join(described(cls).split())
        if SUPPRESS in (action.help, action.default) or action.dest == "help":
            continue
        default = "required" if action.required else f"`{shown(action.default)}`"
        kind = type_name(getattr(action, "_typehint", None) or action.type)
        yield f"`{action.dest}`", f"`{kind}`", default, " ".join((action.help or "").split())


def type_name(hint: object) -> str:
    """A type without the modules of its names."""
    return re.sub(r"(?:\w+\.)+(?=\w)", "", inspect.formatannotation(hint))


def shown(value: object) -> str:
    """A default as a configuration says it: a class by its name, its arguments behind it."""
    if isinstance(value, dict) and "class_path" in value:
        given = ", ".join(f"{key}: {shown(one)}" for key, one in value.get("init_args", {}).items())
        return f"{value['class_path'].rpartition('.')[2]}({given})"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    return re.sub(r"<.*?(\w+) object at \w+>", r"\1", str(value))
