"""The documents that people read, and what stands in their fences."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from string import Template

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "benchmarks", "data", "docs", "notebooks")
DOCUMENTS = {str(path.relative_to(ROOT)): path for folder in FOLDERS for path in (ROOT / folder).glob("*.md")}
FENCE = re.compile(r"^```(\w+)(?: \{([^}\n]*)\})?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PARSED_ALONE = {"needs-weights", "needs-data", "takes-minutes"}
"""Marks of fences that no test runs: their commands must exist, with these options."""


@dataclass(frozen=True)
class Fence:
    """A piece of code in a document: ```language {.mark}."""

    language: str
    marks: frozenset[str]
    text: str

    @property
    def is_run(self) -> bool:
        return self.language in ("bash", "python") and not self.marks & PARSED_ALONE

    def commands(self) -> Iterator[list[str]]:
        """The words of each line of a shell's text, without comments; variables as `export` sets them, or by name."""
        variables: dict[str, str] = {}
        for line in self.text.replace("\\\n", " ").splitlines():
            words = [Template(word).safe_substitute(variables) for word in shlex.split(line, comments=True)]
            words = list(dropwhile(re.compile(r"[A-Z_]+=").match, words))
            if words[:1] == ["export"]:
                variables |= dict(word.split("=", 1) for word in words[1:])
            elif words:
                yield words


def fences(document: Path) -> list[Fence]:
    return [
        Fence(language, frozenset(re.findall(r"\.([\w-]+)", marks)), text)
        for language, marks, text in FENCE.findall(document.read_text())
    ]
