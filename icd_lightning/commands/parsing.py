"""Command lines by jsonargparse: the signature is the schema, and an error is one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NoReturn

from jsonargparse import ArgumentParser

from icd_lightning.commands.main import fail


class OneLineErrors:
    """Mixin for a parser of jsonargparse: no usage text and no traceback before what is wrong."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Shorten jsonargparse's report to its cause, and exit with code 2."""
        fail(shorten(message))
        raise AssertionError


class Parser(OneLineErrors, ArgumentParser):
    """The parser of a plain command."""


def call(function: Callable, name: str, args: list[str]) -> None:
    """Call `function` with the arguments that its signature defines; docstrings are the help."""
    parser = Parser(prog=f"icd {name}", description=(function.__doc__ or "").split("\n\nArgs:")[0])
    parser.add_function_arguments(function, as_positional=True, fail_untyped=True)
    values = parser.instantiate_classes(parser.parse_args(args))
    function(**values.as_dict())


def shorten(message: str) -> str:
    """One line of jsonargparse's several: the key, the value, and the innermost reasons."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reasons = [
        line.removeprefix("- ") for line in lines if not re.match(r"(Subtypes|Errors):?|- typing\.|Given value", line)
    ]
    return "; ".join(dict.fromkeys(reasons))
