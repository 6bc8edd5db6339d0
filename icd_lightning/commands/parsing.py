"""Command lines by jsonargparse: the signature is the schema, and an error is one line."""

from __future__ import annotations

import inspect
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter

from icd_lightning.commands.main import fail
from icd_lightning.files import check_folder

OTHER_NAMES = {"-o": "--output", "--cross": "--cross_replace", "--self": "--self_replace", "--family": "--model"}
"""Of options, by which they go too."""
MAY_BE_EMPTY = ("source", "target", "prompt", "grid")
"""Texts, not places; of those an empty name would be the folder that one is in."""
NOT_FINITE = re.compile(r'^Parser key "(\w+)":.*Given value: ([-+]?(?:nan|inf))$', re.DOTALL | re.IGNORECASE)


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """jsonargparse's, with examples on lines of their own."""


class Parser(ArgumentParser):
    """The parser of a plain command: no usage text and no traceback before what is wrong."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in one line, of nan and inf too, and exit with code 2."""
        if found := NOT_FINITE.search(message):
            name, value = found.groups()
            message = f"{name} {value} must be a finite number: {self._option_string_actions[f'--{name}'].help}"
        fail(message)


def call(function: Callable, name: str, args: list[str]) -> None:
    """Call `function` with the arguments that its signature defines; its docstring is the help.

    Parameters without default before the `*` are positional, `*prompts` takes any number, all others are options, and
    so are those of a function to which `**options` is handed on. `--two-words` is `--two_words`; an option of type
    `list[str]` takes words up to the next option.
    """
    values = _parser(function, name).parse_args([_underscored(arg) for arg in args]).as_dict()
    for key, value in values.items():
        if value == "" and key not in MAY_BE_EMPTY:
            fail(f"{key} is empty: give it a value, or leave it out")
    if (out := values.get("out")) and "://" not in out:  # everywhere a folder, here or in a store
        check_folder(Path(out))
    first: list[Any] = []
    for parameter in inspect.signature(function).parameters.values():
        if _is_positional(parameter):
            first.append(values.pop(parameter.name))
        elif parameter.kind is parameter.VAR_POSITIONAL:
            first += values.pop(parameter.name)
    function(*first, **values)


def _parser(function: Callable, name: str) -> Parser:
    """A parser of the function's signature. jsonargparse would take all of it for options, flags for `--flag true`."""
    text, hints = parse_docstring(function.__doc__ or ""), get_type_hints(function)
    helps = {parameter.arg_name: parameter.description for parameter in text.params}
    description = "\n\n".join(filter(None, (text.short_description, text.long_description)))
    parser = Parser(prog=f"icd {name}", description=description, allow_abbrev=False, formatter_class=HelpFormatter)
    ours = set()
    for key, parameter in inspect.signature(function).parameters.items():
        hint, options = hints.get(key), {"help": helps.get(key)}
        if _is_positional(parameter):
            parser.add_argument(key, type=hint, **options)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            parser.add_argument(key, nargs="*", default=[], type=hint, metavar=key.removesuffix("s").upper(), **options)
        elif hint is bool:
            parser.add_argument(f"--{key}", action=ActionYesNo, default=parameter.default, **options)
        elif hint == list[str] | None:
            parser.add_argument(f"--{key}", nargs="+", type=str, metavar=key.upper(), default=None, **options)
        else:
            continue
        ours.add(key)
    parser.add_function_arguments(function, as_group=False, as_positional=False, fail_untyped=True, skip=ours)
    return parser


def _underscored(arg: str) -> str:
    """An option's full name as Python has it; what is no option, and a value after =, stays as it is."""
    name, equals, value = arg.partition("=")
    name = OTHER_NAMES.get(name, name)
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if re.fullmatch(r"--[a-z][\w-]*", name) else arg


def _is_positional(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty
