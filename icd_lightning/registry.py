"""Parts by name: methods, metrics and benchmarks, ours and those that other packages register; any class by its path.

A registry maps names to entries. Another package adds its own by an entry point in the registry's group. Its value is
a mapping of names to entries, in a module that is light to import:

    [project.entry-points."icd_lightning.metrics"]
    mine = "my_package.parts:METRICS"

    METRICS = {"my-metric": Entry("my_package.metrics.MyMetric", "what it is")}

Without that, `my_package.metrics.MyMetric` is a name too, and so is a YAML file with `class_path` and `init_args`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from icd_lightning.files import read_yaml
from icd_lightning.trust import check_class


@dataclass(frozen=True)
class Entry:
    """A part's class, `module.Class`, what it is, in a line, and its settings beside the class's defaults."""

    class_path: str
    about: str = ""
    init_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.class_path, str) or "." not in self.class_path:
            raise ValueError(f"class_path {self.class_path!r} is no module.Class")
        if not isinstance(self.init_args, Mapping):
            raise ValueError(f"init_args {self.init_args!r} are no mapping")

    def load(self) -> Any:
        """The class, or the function that makes the part; ValueError if there is none."""
        module, _, name = self.class_path.rpartition(".")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: of names such as ../x
            absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
            remedy = ": install what holds it, or name its folder by PYTHONPATH=..." if absent else ""
            raise ValueError(f"there is no class {self.class_path} ({error}){remedy}") from error

    def build(self, **parts: Any) -> Any:
        """The part, made of `parts` and of its settings, checked against its constructor's types."""
        cls = self.load()
        if lacking := sorted(getattr(cls, "__abstractmethods__", ())):
            raise ValueError(f"{self.class_path} lacks {', '.join(lacking)}: write what its base class asks for")
        return cls(**parts, **typed(cls, self.init_args, skip=set(parts)))


class Registry:
    """Entries by name: `own`, and those of the entry points in `group`. `kind` is what messages call such a part."""

    def __init__(self, kind: str, group: str, own: Mapping[str, Entry]) -> None:
        self.kind, self.group, self.own = kind, group, own

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every entry by name; ValueError where two packages register one name."""
        entries = dict(self.own)
        for point in entry_points(group=self.group):
            try:
                registered = dict(point.load())
            except Exception as error:  # whatever another package's import may raise
                what = f"{self.kind}s of {point.value}"
                raise ValueError(f"{what} cannot be read ({error}): mend or remove it") from error
            if twice := entries.keys() & registered.keys():
                raise ValueError(f"{self.kind} {min(twice)!r} is registered twice, the second time by {point.value}")
            entries |= registered
        return entries

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def find(self, name: str, *, told_by: str | None = None) -> Entry:
        """The entry of a name, of a YAML file, or of a class's path; ValueError for anything else.

        told_by: the part of a configuration that says the name; its class must then be a trusted one.
        """
        if name in self.entries:
            return self.entries[name]
        if Path(name).suffix in (".yaml", ".yml"):
            return read_entry(Path(name))
        if "." in name:
            if told_by is not None:
                check_class(name, told_by)
            entry = Entry(name)
            entry.load()
            return entry
        raise ValueError(
            f"no {self.kind} {name!r}; there is: {', '.join(self.entries)}; or a class's path, or a YAML file with "
            "class_path and init_args"
        )


def read_entry(file: Path) -> Entry:
    """The entry in a YAML file; ValueError for any other content."""
    try:
        entry = Entry(**read_yaml(file))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} must hold class_path and init_args, as in conf/method ({error})") from error
    check_class(entry.class_path, file)
    return entry


def typed(cls: Any, settings: Mapping[str, Any], *, skip: set[str] = frozenset()) -> dict[str, Any]:
    """Settings as a class's constructor, or a function, wants them: checked, mappings turned to dataclasses."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if isinstance(cls, type) else parser.add_function_arguments
    add(cls, skip=set(skip))
    try:
        return vars(parser.instantiate_classes(parser.parse_object(dict(settings))))
    except ArgumentError as error:
        raise ValueError(f"{cls.__name__}: {error}") from error
