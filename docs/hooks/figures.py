"""Puts what `make figures` measured where documents show it: tables between marks, and pictures.

`<!-- outputs/demo/tables.md | Edits by prompt -->` begins a table, that of the file whose title begins so, and
`<!-- end -->` ends it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/results.md")
MARKED = re.compile(r"(<!-- (\S+) \| (.+?) -->\n).*?(?=<!-- end -->)", re.DOTALL)
PICTURES = {
    "docs/demo.png": ("outputs/demo/report.png", 1600),
    "docs/jumps.png": ("outputs/jumps/report.png", 1072),
    "docs/edits.png": ("outputs/eval-tiny_edit/tiny_edit/edits.png", 752),
    "docs/trade_off.png": ("outputs/eval-trade-off/tiny_edit/trade_off.png", 1504),
}
"""Where each comes from, and its width in pixels."""


def table(root: Path, file: str, title: str) -> str:
    """The table of a file of tables whose title begins with `title`, under it and with its note."""
    tables = re.split(r"(?=^\*\*)", (root / file).read_text(), flags=re.MULTILINE)
    found = [one.strip() for one in tables if one.startswith(f"**{title}")]
    if len(found) != 1:
        raise ValueError(f"{file} has {len(found)} tables {title!r}: a mark must name one")
    return found[0] + "\n"


def fill(text: str, root: Path) -> str:
    """A document with the tables of today in the place of those between its marks."""
    return MARKED.sub(lambda mark: mark[1] + table(root, mark[2], mark[3]), text)


def main(root: Path = ROOT) -> None:
    """Everything is read before anything is written."""
    texts = {root / name: fill((root / name).read_text(), root) for name in DOCUMENTS}
    pictures = {}
    for name, (file, width) in PICTURES.items():
        with Image.open(root / file) as picture:
            smaller = picture.convert("RGB").resize((width, round(picture.height * width / picture.width)))
            pictures[root / name] = smaller.quantize(256)  # colours: a third of the bytes
    for path, text in texts.items():
        path.write_text(text)
    for path, picture in pictures.items():
        picture.save(path, optimize=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"{error}; `make figures` measures what is missing")
