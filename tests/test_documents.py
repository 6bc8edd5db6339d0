"""What the documents show works: code runs, commands exist with their options, links lead somewhere."""

import ast
import importlib
import re
import shlex
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from documents_case import DOCUMENTS, ROOT, Fence, fences

from icd_lightning.commands.fit import FitCommand
from icd_lightning.commands.guide import GUIDES
from icd_lightning.commands.main import COMMANDS, main
from icd_lightning.commands.parsing import _parser, _underscored

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")

FENCES = {name: fences(path) for name, path in DOCUMENTS.items()}
RUN = {name: found for name, found in FENCES.items() if any(fence.is_run for fence in found)}
SLOW = {name for name, found in RUN.items() if any("slow" in fence.marks for fence in found)}
TARGETS = set(re.findall(r"^([a-z0-9-]+)(?=[ :a-z0-9-]*:)", (ROOT / "Makefile").read_text(), re.MULTILINE))
FILES = {"CONTRIBUTING.md"}
"""Documents whose Python is files, which tests/test_contributing.py writes and uses."""
BASE = ["fit", *(f"--config={ROOT}/conf/{name}.yaml" for name in ("base", "model/tiny"))]
OTHERS = {"pip", "img2dataset"}
"""Programs that are not ours."""


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """An empty folder that has what commands read of this repository, to run a document in."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(fence: Fence, names: dict) -> None:
    if fence.language == "python":
        exec(compile(fence.text, "<document>", "exec"), names)
        return
    for words in fence.commands():
        assert Path(words[0]).name == "icd", f"{words[0]} cannot be run here: mark the fence"
        main(words[1:])


def run_document(name: str, *, slow: bool) -> None:
    names: dict = {}
    for fence in RUN[name]:
        if fence.is_run and (slow or "slow" not in fence.marks):
            run(fence, names)


@pytest.mark.parametrize("document", sorted(RUN.keys() - FILES))
def test_the_code_of_a_document_runs(checkout, document):
    run_document(document, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("document", sorted(SLOW))
def test_all_code_of_a_document_runs(checkout, document):
    run_document(document, slow=True)


class Composed(FitCommand):
    """Parses, and makes nothing."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture(scope="module")
def fit_parser():
    return Composed(BASE, ExitStack()).parser


def check_icd(words: list[str], fit_parser) -> None:
    """Exit code 2, which fails the test, for a command or an option that does not exist."""
    name = next(" ".join(words[:count]) for count in (2, 1) if " ".join(words[:count]) in COMMANDS)
    if name in GUIDES:
        fit_parser.parse_args(words)
        return
    module, _, attribute = COMMANDS[name][0].partition(":")
    function = getattr(importlib.import_module(f"icd_lightning.commands.{module}"), attribute)
    _parser(function, name).parse_args(list(map(_underscored, words[len(name.split()) :])))


def check_command(words: list[str], fit_parser) -> None:
    program, *rest = words
    if "icd" in (names := [Path(word).name for word in words]):  # maybe behind torchrun
        check_icd(words[names.index("icd") + 1 :], fit_parser)
    elif program == "make":
        assert {word for word in rest if "=" not in word} <= TARGETS
    elif names[0] == "python":
        assert (ROOT / rest[0]).is_file()
    else:
        assert program in OTHERS, f"{program} is no program known here"


def test_the_commands_of_make_figures_exist(fit_parser):
    making = ["make", "--dry-run", "--assume-old=installed", "STAMP=installed", "figures"]
    lines = subprocess.run(making, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    calls = [
        words for line in lines.replace("\\\n", " ").splitlines() if "/icd " in line and (words := shlex.split(line))
    ]
    assert len(calls) >= 8
    for words in calls:
        check_command(words, fit_parser)


@pytest.mark.parametrize("document", sorted(FENCES))
def test_every_fence_is_sound(document, fit_parser, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # configurations are named from here
    for fence in FENCES[document]:
        if fence.language == "bash":
            for words in fence.commands():
                check_command(words, fit_parser)
        elif fence.language == "python":
            check_imports(fence.text)
        elif fence.language == "yaml":
            check_yaml(fence.text, tmp_path / "overlay.yaml", fit_parser)
        else:
            assert fence.language == "text"


def check_yaml(text: str, file: Path, fit_parser) -> None:
    """An overlay of a training is laid over one; of anything else, and of classes in the text's own files, the form."""
    content = yaml.safe_load(text)
    assert content
    if "model" in content and "my_" not in text:
        file.write_text(text)
        fit_parser.parse_args([*BASE, f"--config={file}"])


def check_imports(text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("icd_lightning"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("document", sorted(DOCUMENTS))
def test_every_fence_is_seen(document):
    """A fence of another form would be skipped without a word."""
    assert DOCUMENTS[document].read_text().count("\n```") == 2 * len(FENCES[document])


@pytest.mark.parametrize("document", sorted(DOCUMENTS))
def test_links_lead_to_files(document):
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", DOCUMENTS[document].read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r'(?:\]\(|src=")(?!https?:|#)([^)\s"#]+)', prose)
    assert [link for link in links if not (DOCUMENTS[document].parent / link).exists()] == []
