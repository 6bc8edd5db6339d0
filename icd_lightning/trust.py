"""What a file that somebody else wrote may make `icd` do: build parts of trusted packages, and nothing else.

A configuration or a method's YAML names classes and their arguments, so whoever wrote it could name any class on this
machine, or a shell command in the place of a shard. Under `icd` both are refused but for `icd --trust-config ...`; code
that imports this package has nobody to be protected from.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

TRUSTED = ("icd_lightning", "lightning.pytorch", "lightning.fabric")  # the last two are Lightning, under both names
REMEDY = "if you trust what names it, say so: `icd --trust-config ...`"

_distrusting = False


@cache
def packages() -> list[str]:
    """Those whose classes a file may name: this one, Lightning, and what registers parts by an entry point."""
    points = [
        point
        for group in entry_points().groups
        if group.startswith("icd_lightning.")
        for point in entry_points(group=group)
    ]
    return sorted({*TRUSTED, *(point.module.partition(".")[0] for point in points)})


def begin(*, trusted: bool) -> None:
    """From now on, in this process, let files name anything, or trusted parts alone."""
    from jsonargparse import set_parsing_settings

    global _distrusting
    _distrusting = not trusted
    if _distrusting:
        set_parsing_settings(
            import_path_denylist=["*"], import_path_allowlist=packages(), instantiate_subclass_spec_in_any=False
        )


def check_class(class_path: str, file: object) -> None:
    """ValueError if a file names a class that it may not."""
    if _distrusting and not any(f"{class_path}.".startswith(f"{package}.") for package in packages()):
        raise ValueError(f"{file} names {class_path}, which is not of {', '.join(packages())}: {REMEDY}")


def check_command(url: str) -> None:
    """ValueError if a shard is what a shell command writes, and that may not be run."""
    if _distrusting:
        raise ValueError(f"{url} is a shell command in the place of a shard: {REMEDY}")
