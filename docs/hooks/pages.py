"""MkDocs hooks: pages whose text lies elsewhere in the repository or is made of the code, and the links between all."""

from __future__ import annotations

import io
import posixpath
import re
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path

from mkdocs.structure.files import File

import icd_lightning  # isort: skip  (before all that imports torchvision)
import configuration  # beside this file

from icd_lightning.commands.main import COMMANDS, help_text, main

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "data/README.md": "data.md",
    "notebooks/README.md": "notebooks.md",
    "benchmarks/README.md": "speed.md",
    "benchmarks/step_time.png": "step_time.png",
    "icd_lightning/weights/tiny/README.md": "tiny.md",
}
"""Files of the repository that are pages of the site."""
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
SOURCE = re.compile(r'(?<=src=")[^"]+')
PARTS = sorted(path.parent.name for path in Path(icd_lightning.__file__).parent.glob("*/__init__.py"))


def on_config(config):
    """Add the API reference to the navigation, a page for each part of the package."""
    config.nav.append({"API": [{part: f"api/{part}.md"} for part in PARTS]})
    return config


def on_files(files, config):
    """Add the pages that are not in docs/."""
    for path, uri in ELSEWHERE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for uri, text in made().items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links, which hold where the text lies, hold in the site; a file that is not in the site loses its link."""
    uri = page.file.src_uri
    folder = posixpath.dirname(next((path for path, other in ELSEWHERE.items() if other == uri), f"docs/{uri}"))

    def path_of(link: str) -> str:
        return posixpath.normpath(posixpath.join(folder, link))

    def moved(path: str) -> str | None:
        """The site's name of a file of the repository, seen from this page; None: the site does not have it."""
        place = ELSEWHERE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        return place and posixpath.relpath(place, posixpath.dirname(uri) or ".")

    def replaced(match: re.Match[str]) -> str:
        text, path, anchor = match[1], path_of(match[2]), match[3] or ""
        if not (ROOT / path).exists():
            return match[0]
        if re.match(r"icd_lightning/.*\.py$", path):
            return f"[{text}][{path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}]"
        return f"[{text}]({place}{anchor})" if (place := moved(path)) else text

    return SOURCE.sub(lambda match: moved(path_of(match[0])) or match[0], LINK.sub(replaced, markdown))


def made() -> dict[str, str]:
    """The pages that are made of the code, by name."""
    api = {f"api/{part}.md": f"# {part}\n\n" + "\n".join(map("::: {}\n".format, modules(part))) for part in PARTS}
    return {"configuration.md": configuration.page(), "commands.md": commands(), **api}


def modules(part: str) -> Iterator[str]:
    """The modules of a part of the package, itself first."""
    root = Path(icd_lightning.__file__).parent
    for path in sorted((root / part).rglob("*.py"), key=lambda path: (path.parent, path.name != "__init__.py", path)):
        words = path.relative_to(root.parent).with_suffix("").parts
        yield ".".join(words[:-1] if words[-1] == "__init__" else words)


def commands() -> str:
    """What each command's --help says."""
    shown = [f"# Commands\n\n```text\n{help_text()}```\n"]
    for name in COMMANDS:
        with redirect_stdout(io.StringIO()) as out, suppress(SystemExit):
            main([*name.split(), "--help"])
        shown.append(f"## icd {name}\n\n```text\n{out.getvalue()}```\n")
    return "\n".join(shown)
